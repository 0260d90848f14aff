"""Prepared data: a mixture's sources as they are opened, their shares, and whether a run can read
them. Imports no torch, so that a command knows it before it records a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmoe.config.sections import Config
from nmoe.data import tokenizer
from nmoe.data.hashes import HASHES, Hashes
from nmoe.data.mixture import Phase, phases
from nmoe.data.shards import Stream, check_files, load_array, open_stream, read_manifest
from nmoe.data.tokenizer import Tokenizer
from nmoe.errors import ConfigError, DataError

CYCLE = 1 << 16  # samples after which the sources come in the same order again


@dataclass(frozen=True)
class PreparedSource:
  name: str
  weight: float | None
  folder: Path
  manifest: dict[str, Any]
  train: Stream
  heldout: Stream

  def train_counts(self) -> np.ndarray:
    """int64 [V], how often each id occurs in training text."""
    return load_array(self.folder / "train-counts.npy")


@dataclass(frozen=True)
class PreparedData:
  digest: str  # of the mixture, its content and its tokenizer
  tokenizer: Tokenizer
  temperature: float
  sources: tuple[PreparedSource, ...]

  @property
  def train_tokens(self) -> dict[str, int]:
    return {source.name: source.train.length for source in self.sources}

  @property
  def heldout_tokens(self) -> dict[str, int]:
    return {source.name: source.heldout.length for source in self.sources}


def open_data(folder: Path, verify: bool = True) -> PreparedData:
  """Open a prepared mixture. `verify` compares every file's hash, which is remembered as long as
  its size, time and inode stay (nmoe.data.hashes); without it only sizes are compared.

  Raises DataError naming the file, what was found, what was expected and the remedy.
  """
  folder = Path(folder)
  manifest = read_manifest(folder)
  store = folder.parent / "sources"
  with Hashes(folder.parent / HASHES) as hash_of:
    used = hash_of if verify else None
    sources = tuple(_open_source(store / e["source"], e, used) for e in manifest["sources"])
  ids = tokenizer.get(manifest["tokenizer"])
  for source in sources:
    _check_tokenizer(source, ids)
  return PreparedData(
    digest=folder.name,
    tokenizer=ids,
    temperature=float(manifest["temperature"]),
    sources=sources,
  )


def _check_tokenizer(source: PreparedSource, ids: Tokenizer) -> None:
  """DataError if its file is another one than when the source was prepared."""
  written = source.manifest["tokenizer"].get("sha256", ids.content)
  if written != ids.content:
    raise DataError(
      f"{source.folder} was made by a {ids.name} of sha256 {written[:12]}, which is now another "
      f"file ({ids.content[:12]}); restore it, or run again to prepare the text anew"
    )


def _open_source(folder: Path, entry: dict[str, Any], hash_of: Hashes | None) -> PreparedSource:
  manifest = read_manifest(folder)
  check_files(folder, manifest, hash_of)
  return PreparedSource(
    name=entry["name"],
    weight=entry["weight"],
    folder=folder,
    manifest=manifest,
    train=open_stream(folder, manifest["train"]),
    heldout=open_stream(folder, manifest["heldout"]),
  )


def shares(data: PreparedData, weights: Mapping[str, float] | None = None) -> dict[str, float]:
  """The shares p_i of the sources, of samples and so of tokens; they sum to 1.

  From `weights` if given (source name -> weight), else from the mixture's weights, else
  p_i = n_i^(1/temperature) / Σ_j n_j^(1/temperature) over training tokens n_i (temperature 1:
  proportional, inf: uniform). Raises ConfigError when `weights` does not name every source once.
  """
  names = [source.name for source in data.sources]
  if weights is not None and sorted(weights) != sorted(names):
    raise ConfigError(f"weights name {sorted(weights)}; the mixture's sources are {sorted(names)}")
  if weights is None and data.sources[0].weight is not None:
    weights = {source.name: source.weight for source in data.sources}
  if weights is None:
    weights = {n: t ** (1 / data.temperature) for n, t in data.train_tokens.items()}
  total = math.fsum(weights.values())
  if any(w < 0 for w in weights.values()) or not 0 < total < math.inf:
    raise ConfigError(
      f"weights {dict(weights)} must not be negative and must have a finite sum > 0"
    )
  return {name: weights[name] / total for name in names}


def cycle_counts(share: np.ndarray) -> np.ndarray:
  """Whole counts of CYCLE samples for shares that sum to 1: largest remainders, at least 1.

  A share of 0 gets 0; what the raised ones cost is taken from the largest.
  """
  counts = allot(CYCLE, share)
  counts[(share > 0) & (counts == 0)] = 1
  counts[np.argmax(counts)] -= int(counts.sum()) - CYCLE
  return counts


def allot(total: int, have: np.ndarray) -> np.ndarray:
  """`total` in proportion to `have`, whole numbers by largest remainders."""
  ideal = total * have / have.sum()
  take = np.floor(ideal).astype(np.int64)
  take[np.argsort(take - ideal, kind="stable")[: total - int(take.sum())]] += 1
  return take


def check(config: Config, data: PreparedData) -> None:
  """Whether a run of the configuration can read the data. ConfigError, DataError."""
  check_vocabulary(config, data.tokenizer)
  c, names = config.data, [source.name for source in data.sources]
  drawn(data, phases(names, c.weights, c.weights_from), c.fraction, c.seq_len)
  heldout_windows(data, c.seq_len)


def check_vocabulary(config: Config, ids: Tokenizer) -> None:
  """ConfigError if the tokenizer's ids do not fit the embedding."""
  if config.model.vocab_size < ids.vocab_size:
    raise ConfigError(
      f"model.vocab_size = {config.model.vocab_size} is less than the {ids.vocab_size} ids of "
      f"tokenizer {ids.name!r}; set model.vocab_size = {ids.vocab_size} or more"
    )


def drawn(
  data: PreparedData, phases: Sequence[Phase], fraction: float, seq_len: int
) -> tuple[list[np.ndarray], list[Stream]]:
  """(counts of a cycle by phase; what is read of each source).

  DataError if a source with a positive share is shorter than one sample.
  """
  shares_P = [list(shares(data, phase.weights).values()) for phase in phases]
  counts = [cycle_counts(np.array(share)) for share in shares_P]
  streams = [s.train.first(math.ceil(fraction * s.train.length)) for s in data.sources]
  for source, stream, count in zip(data.sources, streams, sum(counts), strict=True):
    if count and stream.length <= seq_len:
      raise DataError(
        f"source {source.name!r} has {stream.length} training tokens, a sample of seq_len "
        f"{seq_len} needs {seq_len + 1}; shorten data.seq_len, raise data.fraction, add text, or "
        "drop the source"
      )
  return counts, streams


def heldout_windows(data: PreparedData, seq_len: int) -> np.ndarray:
  """int64 [S], the windows of seq_len that each source has held out. DataError if none has one."""
  have = np.array([max(0, source.heldout.length - 1) // seq_len for source in data.sources])
  if not have.any():
    raise DataError(
      f"the held-out documents have {data.heldout_tokens} tokens, a validation window needs "
      f"{seq_len + 1}; raise mixture.holdout, add text or shorten data.seq_len"
    )
  return have
