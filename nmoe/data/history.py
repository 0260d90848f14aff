"""What a run has read after so many tokens: another that begins with its checkpoint reads on.

A mixture with more sources, or other weights from a later token on, leaves what was read before as
it was. Whatever changes that would repeat or leave out text, and is no way on from a checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

from nmoe.config.sections import Config
from nmoe.data.holes import skipped
from nmoe.data.mixture import phases
from nmoe.data.prepared import PreparedData, drawn

Drawn = tuple[str, str, int, int]  # a source's name, its digest, its tokens, its samples of a cycle


class History(NamedTuple):
  """phases: from which sample on which sources are drawn; holes: those that were met."""

  phases: tuple[tuple[int, tuple[Drawn, ...]], ...]
  holes: tuple[tuple[int, ...], ...]


def read_before(data: PreparedData, config: Config, tokens: int) -> History:
  """What a run of the configuration reads of the data in its first `tokens` tokens, with one seed.

  Equal histories of equal seq_len and seed are equal samples. ConfigError, DataError as of `drawn`.
  """
  c, samples = config.data, tokens // config.data.seq_len
  of = phases([source.name for source in data.sources], c.weights, c.weights_from)
  counts, streams = drawn(data, of, c.fraction, c.seq_len)
  found = []
  for phase, count in zip(of, counts, strict=True):
    first = -(-phase.tokens // c.seq_len)
    each = zip(data.sources, streams, count.tolist(), strict=True)
    used = tuple((s.name, s.folder.name, stream.length, n) for s, stream, n in each if n)
    found += [(first, used)] if first < samples else []
  last = int(skipped([max(samples, 1) - 1], c.holes)[0])
  return History(tuple(found), tuple(hole for hole in sorted(c.holes) if hole[0] <= last))
