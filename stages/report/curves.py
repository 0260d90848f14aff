"""What a report reads off curves of one run or several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def time_to_loss(x: Sequence[float], losses: Sequence[float], target: float) -> float:
  """The x (steps, tokens, seconds) where the loss first reaches target, interpolated; else inf."""
  reached = np.flatnonzero(np.asarray(losses) <= target)
  if not len(reached):
    return math.inf
  i = int(reached[0])
  if i == 0:
    return float(x[0])
  before, after = losses[i - 1], losses[i]
  share = (before - target) / (before - after) if math.isfinite(before) else 1.0
  return float(x[i - 1] + share * (x[i] - x[i - 1]))


def band(
  curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """(x, mean, min, max) over seeds of curves (x, y), at the x that all of them have."""
  shared = curves[0][0]
  for x, _ in curves[1:]:
    shared = np.intersect1d(shared, x)
  y = np.stack([y[np.searchsorted(x, shared)] for x, y in curves])
  return shared, y.mean(0), y.min(0), y.max(0)
