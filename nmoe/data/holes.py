"""Samples that a run leaves out: data.holes, pairs of the first one and how many.

Sample n of a run is the n-th of those that are not in a hole: a pure function of n and the holes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Holes = Sequence[Sequence[int]]


def skipped(ids: Sequence[int] | np.ndarray, holes: Holes) -> np.ndarray:
  """uint64: the samples of the order without holes that are the `ids` of the one with them."""
  found = np.array(ids, dtype=np.uint64)
  for first, count in sorted(map(tuple, holes)):
    found[found >= first] += np.uint64(count)
  return found


def with_hole(holes: Holes, start: int, stop: int) -> tuple[tuple[int, int], ...]:
  """The holes, and in addition the samples start .. stop - 1 of the order with them."""
  first, last = (int(n) for n in skipped([start, stop - 1], holes))
  apart = [(a, n) for a, n in holes if a + n <= first or a > last]
  return tuple(sorted([*apart, (first, last + 1 - first)]))
