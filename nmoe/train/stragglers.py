"""Ranks that become slower than they were, from the phase times that all tell rank 0 at each log.

A rank's score is the least time that its optimizer took so far over the time that it took now: that
phase waits for nobody. A rank is a straggler whose score stays below SLOW for LOGS logs while most
ranks keep theirs (NVRx's individual score). What was slow from the start `nmoe prod check` finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

PHASES = (  # of nmoe.train.clock, in the order in which ranks tell them
  *("load", "forward", "backward", "graph", "clip", "step", "gather", "log", "eval", "checkpoint"),
)
LOCAL = PHASES.index("step")
SLOW = 0.9
LOGS = 5


class Stragglers:
  """Of `ranks` ranks."""

  def __init__(self, ranks: int):
    self.best = [float("inf")] * ranks
    self.since = [0] * ranks

  def add(self, seconds: Sequence[float]) -> list[int]:
    """seconds: of the optimizer a step, by rank, since the last log. The ranks that become
    stragglers with it.
    """
    self.best = [min(best, s) for best, s in zip(self.best, seconds, strict=True)]
    scores = [best / max(s, 1e-9) for best, s in zip(self.best, seconds, strict=True)]
    steady = median(scores) >= SLOW
    late = [steady and score < SLOW for score in scores]
    self.since = [n + 1 if slow else 0 for n, slow in zip(self.since, late, strict=True)]
    return [rank for rank, n in enumerate(self.since) if n == LOGS]


def tags(times: Sequence[Sequence[float]]) -> dict[str, float]:
  """What rank 0 logs of all ranks' phases [R, PHASES]: per rank `rank/{r}/{phase}_s`, seconds since
  the last log. Phases that no rank was in are left out.
  """
  return {
    f"rank/{rank}/{phase}_s": row[i]
    for i, phase in enumerate(PHASES)
    if any(row[i] for row in times)
    for rank, row in enumerate(times)
  }
