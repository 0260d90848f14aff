"""What a model thinks of answers: nats of every choice, and whether greedy decoding gives it.

Shapes are fixed, and no batch size can be chosen: rows are padded on the right to a width of 128,
256, … up to the model's context, T / width rows a batch, where T is training's micro-batch in
tokens, so that memory, RDEP's buffers and kernels are those of training. Rows are sorted before
they are cut into batches, batch i belongs to rank i mod R, and missing batches are padding: what a
row computes depends neither on the order of requests nor on the number of ranks.

Of the last states only those before an answer's token meet the head, POSITIONS at a time, in fp32
and over blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nmoe.distributed.parallel import Parallel
from nmoe.evals.requests import Row
from nmoe.model.decoder import Model

NARROWEST = 128
POSITIONS = 512  # states that meet the head at once
VOCABULARY = 16384  # ids of a block of the head


Told = Callable[[int, int], None]


def untold(done: int, total: int) -> None:
  """Nobody is told how far it is."""


@dataclass(frozen=True)
class Batch:
  """Rows of a batch of `shape` (rows, width), none of them: padding alone.

  first: of each row the number of its first answer token among all of a suite. The arrays are made
  anew whenever asked for: of a whole suite they would be gigabytes.
  """

  shape: tuple[int, int]
  rows: tuple[Row, ...] = ()
  first: tuple[int, ...] = ()

  @property
  def tokens(self) -> np.ndarray:
    """int64 [rows, width], padded with 0 on the right and below."""
    tokens = np.zeros(self.shape, dtype=np.int64)
    for line, row in zip(tokens, self.rows, strict=False):
      line[: len(row.ids) - 1] = row.ids[:-1]
    return tokens

  @property
  def answers(self) -> np.ndarray:
    """int64 [3, answer tokens of the batch]: the place in the flattened batch before the token, its
    id, and its number.
    """
    width, parts = self.shape[1], [np.zeros((3, 0), dtype=np.int64)]
    for at, (row, first) in enumerate(zip(self.rows, self.first, strict=True)):
      before = np.arange(row.start - 1, len(row.ids) - 1)
      ids = row.ids[row.start :].astype(np.int64)
      parts.append(np.stack([at * width + before, ids, first + np.arange(len(ids))]))
    return np.concatenate(parts, axis=1)


def width_of(row: Row, longest: int) -> int:
  """The width of the batches that a row belongs to."""
  width = NARROWEST
  while width < len(row.ids) - 1:
    width *= 2
  return min(width, longest)


def batches(rows: Sequence[Row], order: Sequence[int], longest: int, tokens: int) -> list[Batch]:
  """All batches, of `tokens` each at most; rows in this order within their width.

  Answer tokens are numbered row by row as `rows` has them.
  """
  first = np.concatenate([[0], np.cumsum([len(r.ids) - r.start for r in rows])]).tolist()
  by_width: dict[int, list[int]] = {}
  for i in order:
    by_width.setdefault(width_of(rows[i], longest), []).append(i)
  made = []
  for width, members in sorted(by_width.items()):
    size = max(1, tokens // width)
    for begin in range(0, len(members), size):
      part = members[begin : begin + size]
      made.append(Batch((size, width), tuple(rows[i] for i in part), tuple(first[i] for i in part)))
  return made


@torch.no_grad()
def score(
  model: Model, parallel: Parallel, made: Sequence[Batch], total: int, told: Told = untold
) -> tuple[np.ndarray, np.ndarray]:
  """float64 [total] nats, and bool [total] whether it is the first choice, of every answer token.

  Every rank calls it with the same batches and gets the same answer. told: called after each batch
  of this rank with how many are done, and of how many.
  """
  device = model.head_weight.device
  found = torch.zeros(2, total, dtype=torch.float64, device=device)
  share = list(_share(made, parallel))
  for done, batch in enumerate(share, 1):
    x_TD = model.hidden(torch.from_numpy(batch.tokens).to(device))[0].flatten(0, 1)
    answers = batch.answers
    for begin in range(0, answers.shape[1], POSITIONS):
      before, target, number = answers[:, begin : begin + POSITIONS]
      at, wanted = (_padded(x, device) for x in (before, target))
      nats, hits = nats_of(x_TD[at], model.head_weight, wanted)
      place, count = torch.from_numpy(number).to(device), len(number)
      found[0, place], found[1, place] = nats[:count].double(), hits[:count].double()
    told(done, len(share))
  nats_A, hits_A = parallel.sum(found).cpu().numpy()
  return nats_A, hits_A > 0.5


def _share(made: Sequence[Batch], parallel: Parallel) -> Iterator[Batch]:
  """This rank's batches; every rank has as many of each shape, since experts live on all."""
  for shape in sorted({batch.shape for batch in made}):
    alike = [batch for batch in made if batch.shape == shape]
    for begin in range(0, len(alike), parallel.ranks):
      mine = begin + parallel.rank
      yield alike[mine] if mine < len(alike) else Batch(shape)


def _padded(values: np.ndarray, device: torch.device) -> Tensor:
  out = np.zeros(POSITIONS, dtype=np.int64)
  out[: len(values)] = values
  return torch.from_numpy(out).to(device)


def nats_of(x_AD: Tensor, head_VD: Tensor, target_A: Tensor) -> tuple[Tensor, Tensor]:
  """-ln p(target) fp32 [A] (fp64 of fp64 states), and whether no other id is more probable."""
  x_AD = x_AD if x_AD.dtype == torch.float64 else x_AD.float()
  chosen, total, best = x_AD.new_full((3, len(x_AD)), -torch.inf)
  first = torch.zeros_like(target_A)
  for begin in range(0, head_VD.shape[0], VOCABULARY):
    block = x_AD @ head_VD[begin : begin + VOCABULARY].to(x_AD.dtype).T
    inside = (target_A >= begin) & (target_A < begin + block.shape[1])
    at = (target_A - begin).clamp(0, block.shape[1] - 1)
    chosen = torch.where(inside, block.gather(1, at[:, None])[:, 0], chosen)
    highest, where = block.max(-1)
    first = torch.where(highest > best, where + begin, first)
    best = torch.maximum(best, highest)
    total = torch.logaddexp(total, block.logsumexp(-1))
  return total - chosen, first == target_A
