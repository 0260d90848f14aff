"""The loader: sample n of a run as a pure function of (seed, n, mixture).

Samples: the shares p_i of the sources are rounded to whole counts c_i of a cycle of CYCLE samples
(largest remainders, at least 1). Any CYCLE consecutive samples hold exactly c_i of source i. The
sources are interleaved evenly: any m consecutive samples hold m · c_i / CYCLE of source i, with an
error of at most 1 + S · c_i / CYCLE among S sources. The order of sources is the same for all
seeds. Where the weights change after some tokens, a new cycle begins at the first sample that
begins there or after; each source goes on at the window it had come to.

Windows: a source's training documents, each followed by the separator, form one circular stream
of L tokens. An epoch cuts it at a keyed phase into L // seq_len windows (seq_len inputs, and the
token after them as the last target) and visits them in a keyed permutation: no input position
repeats within an epoch, and at most seq_len - 1 tokens are left out, others in each epoch.
Windows cross documents and attention is not masked (concat-and-split packing, as DeepSeek-V3,
arXiv 2412.19437 section 4.1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from nmoe.data.holes import Holes, skipped
from nmoe.data.mixture import Phase
from nmoe.data.permutation import key, mix, permute
from nmoe.data.prepared import CYCLE, PreparedData, allot, drawn, heldout_windows, shares
from nmoe.errors import ConfigError

WINDOWS = 64  # of the held-out set, counted at once
PREFETCH = 2  # batches that are made ahead


class Loader:
  """The training samples of a run; it has no state, so to resume is to ask for the next n.

  data: prepared data; seq_len: input tokens a sample; seed: of the order; weights: see `shares`,
  or phases of them, the first from token 0; fraction: of each source's tokens, the first ones;
  holes: samples that are left out (nmoe.data.holes).
  Raises DataError when a source with a positive share is shorter than one window.
  """

  def __init__(
    self,
    data: PreparedData,
    *,
    seq_len: int,
    seed: int,
    weights: Mapping[str, float] | Sequence[Phase] | None = None,
    fraction: float = 1.0,
    holes: Holes = (),
  ):
    self.holes = holes
    self.data, self.seq_len, self.seed = data, seq_len, seed
    of = weights if isinstance(weights, Sequence) else (Phase(0, weights),)
    counts, self._streams = drawn(data, of, fraction, seq_len)
    self._length = np.array([s.length for s in self._streams], dtype=np.uint64)
    self._windows = np.maximum(self._length // np.uint64(seq_len), np.uint64(1))
    self._keys = np.array([key("order", seed, s.name) for s in data.sources], dtype=np.uint64)
    self._first_P = np.array([-(-phase.tokens // seq_len) for phase in of], dtype=np.uint64)
    self._counts_PS = np.array(counts, dtype=np.uint64)
    interleaved = [_interleave(c) for c in counts]
    self._pattern_P, self._rank_P = (np.stack(each) for each in zip(*interleaved, strict=True))
    self._before_PS = self._drawn_before()

  def _drawn_before(self) -> np.ndarray:
    """uint64 [P, S]: the samples of each source before each phase."""
    before = np.zeros_like(self._counts_PS)
    for p, samples in enumerate(np.diff(self._first_P)):
      cycles, rest = np.divmod(samples, np.uint64(CYCLE))
      partial = np.bincount(self._pattern_P[p, : int(rest)], minlength=before.shape[1])
      before[p + 1] = before[p] + cycles * self._counts_PS[p] + partial.astype(np.uint64)
    return before

  def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where samples lie: (source index, epoch, first token in the source's stream) of each id."""
    ids = skipped(ids, self.holes)
    phase_of = np.searchsorted(self._first_P, ids, side="right") - 1
    cycle, slot = np.divmod(ids - self._first_P[phase_of], np.uint64(CYCLE))
    source = self._pattern_P[phase_of, slot]
    ordinal = cycle * self._counts_PS[phase_of, source] + self._rank_P[phase_of, slot]
    ordinal += self._before_PS[phase_of, source]
    windows, length = self._windows[source], self._length[source]
    epoch, index = np.divmod(ordinal, windows)
    keys = mix(self._keys[source] ^ mix(epoch))
    phase = mix(keys) % length
    window = permute(index, windows, keys)
    return source, epoch, (phase + window * np.uint64(self.seq_len)) % length

  def samples(self, ids: np.ndarray) -> np.ndarray:
    """int64 [len(ids), seq_len + 1]: the inputs and, shifted by one, the targets."""
    rows = np.empty((len(ids), self.seq_len + 1), dtype=np.int64)
    source, _, offset = self.locate(ids)
    for row, s, o in zip(rows, source.tolist(), offset.tolist(), strict=True):
      self._streams[s].read(o, row)
    return rows

  def batch(
    self, step: int, batch_size: int, rank: int = 0, ranks: int = 1
  ) -> tuple[np.ndarray, np.ndarray]:
    """This rank's slice of a step's global batch: tokens and targets, int64 [b, seq_len].

    The global batch is samples step · batch_size + i, i < batch_size; rank r has the r-th of
    `ranks` equal runs of i, b = batch_size / ranks.
    """
    return self.batch_from(step * batch_size, batch_size, rank, ranks)

  def batch_from(
    self, first: int, batch_size: int, rank: int = 0, ranks: int = 1
  ) -> tuple[np.ndarray, np.ndarray]:
    """`batch`, of the global batch that begins at sample `first`."""
    if batch_size % ranks:
      raise ConfigError(f"batch of {batch_size} samples is not divisible by {ranks} ranks")
    local = batch_size // ranks
    first += rank * local
    rows = self.samples(np.arange(first, first + local, dtype=np.uint64))
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def _interleave(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The source of each slot of a cycle, and which of its source's samples it is (uint64).

  Source i's sample j of c_i lies at (j + 1/2) / c_i of the cycle.
  """
  source = np.repeat(np.arange(len(counts)), counts)
  rank = np.concatenate([np.arange(c, dtype=np.uint64) for c in counts])
  order = np.argsort((rank + 0.5) / counts[source], kind="stable")
  return source[order], rank[order]


class Prefetcher:
  """The batches of steps `start` .. `stop` - 1, made ahead by a thread and moved to `device`.

  seen: samples of the steps before `start`; None: as many as of steps like these. Yields tokens and
  targets, int64 [b, seq_len]. What the loader raises is raised by `next`.
  """

  def __init__(
    self,
    loader: Loader,
    batch_size: int,
    *,
    start: int,
    stop: int,
    seen: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
  ):
    self._device = torch.device(device)
    self._make = lambda first: _tensors(
      loader.batch_from(first, batch_size, rank, ranks), self._device
    )
    first = start * batch_size if seen is None else seen
    self._firsts = iter(range(first, first + (stop - start) * batch_size, batch_size))
    self._pool = ThreadPoolExecutor(1, "prefetch")
    self._pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
    self._waited = 0.0
    for _ in range(PREFETCH):
      self._submit()

  def wait_s(self) -> float:
    """Seconds that `next` has waited for batches since this was last asked."""
    waited, self._waited = self._waited, 0.0
    return waited

  def _submit(self) -> None:
    first = next(self._firsts, None)
    if first is not None:
      self._pending.append(self._pool.submit(self._make, first))

  def __iter__(self) -> Prefetcher:
    return self

  def __next__(self) -> tuple[Tensor, Tensor]:
    if not self._pending:
      raise StopIteration
    begin = perf_counter()
    tokens, targets = self._pending.popleft().result()
    self._waited += perf_counter() - begin
    self._submit()
    return (
      tokens.to(self._device, non_blocking=True),
      targets.to(self._device, non_blocking=True),
    )


def _tensors(arrays: tuple[np.ndarray, ...], device: torch.device) -> tuple[Tensor, ...]:
  tensors = tuple(map(torch.from_numpy, arrays))
  return tuple(t.pin_memory() for t in tensors) if device.type == "cuda" else tensors


class Validation:
  """The held-out set: one frozen packing, whatever the seed, the weights and the number of ranks.

  Each source's held-out documents, each followed by the separator, are cut into windows of seq_len
  inputs from the first token on. At most tokens // seq_len windows are taken: of each source in
  proportion to what it has, evenly spaced. Losses of different seq_len must not be compared.

  Raises DataError when no source has held out one whole window.
  """

  def __init__(self, data: PreparedData, *, seq_len: int, tokens: int):
    self.seq_len = seq_len
    self.names = tuple(source.name for source in data.sources)
    self._streams = [source.heldout for source in data.sources]
    self._token_bytes_V = data.tokenizer.token_bytes()
    have = heldout_windows(data, seq_len)
    take = have if have.sum() * seq_len <= tokens else allot(max(1, tokens // seq_len), have)
    chosen = [(np.arange(n) * 2 + 1) * h // (2 * n) for n, h in zip(take, have, strict=True) if n]
    self.source_W = np.repeat(np.arange(len(take)), take)  # of each window
    self._offset_W = np.concatenate(chosen) * seq_len

  def batches(
    self, batch_size: int, rank: int = 0, ranks: int = 1
  ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's tokens and targets, int64, and bytes of the targets, int32, each [batch_size, S].

    Every rank gets equally many batches. Missing windows of the last ones are padding: token 0,
    target -1, 0 bytes. Separators have 0 bytes too.
    """
    for first in range(rank * batch_size, self._padded(batch_size * ranks), ranks * batch_size):
      rows = np.zeros((batch_size, self.seq_len + 1), dtype=np.int64)
      rows[:, 1:] = -1
      for row, w in zip(rows, range(first, len(self._offset_W)), strict=False):
        self._streams[self.source_W[w]].read(int(self._offset_W[w]), row)
      targets = rows[:, 1:].copy()
      num_bytes = np.where(targets >= 0, self._token_bytes_V[targets], 0).astype(np.int32)
      tokens = np.maximum(rows[:, :-1], 0)
      yield torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(num_bytes)

  def _padded(self, multiple: int) -> int:
    return -(-len(self._offset_W) // multiple) * multiple


def bits_per_byte(nats: float, num_bytes: float) -> float:
  """nats / (ln 2 · bytes): the summed loss of the targets that have bytes over their raw bytes.

  Special tokens have no bytes; they are in neither sum. Across ranks sum both before dividing.
  """
  return nats / (math.log(2) * num_bytes)


def unigram_bpb(data: PreparedData, validation: Validation) -> float:
  """Bits per byte, on the targets that a model's `val/bpb` is of, of the best model that ignores
  context.

  Its probabilities are the sources' id frequencies in training text, each count raised by one,
  mixed by the mixture's shares. A baseline: a trained model must be far below it.
  """
  share = shares(data)
  p_V = np.zeros(data.tokenizer.vocab_size)
  for source in data.sources:
    counts_V = source.train_counts() + 1
    p_V += share[source.name] * counts_V / counts_V.sum()
  seen_V = np.zeros_like(p_V)
  for _, targets, _ in validation.batches(WINDOWS):
    seen_V += np.bincount(targets[targets >= 0], minlength=len(p_V))
  bytes_V = data.tokenizer.token_bytes()
  counted_V = np.where(bytes_V > 0, seen_V, 0)
  return bits_per_byte(-(counted_V * np.log(p_V)).sum(), (counted_V * bytes_V).sum())
