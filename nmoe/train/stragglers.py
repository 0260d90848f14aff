"""Ranks that become slower than they were, from what all tell rank 0 at each log: so one file has
the phases and rows of every rank, and who looks at a run of many ranks opens no other.

A rank's score is the time that its optimizer took at its best over the time that it took now: that
phase waits for nobody. Its best is the least median of LOGS logs in a row, since a single log can
be wrong. A rank is a straggler whose score stays below SLOW for LOGS logs while most ranks keep
theirs (NVRx's individual score). What was slow from the start `nmoe prod check` finds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

PHASES = "load forward backward graph clip step gather log eval checkpoint".split()  # of the clock
TOLD = (  # the tags of which every rank tells its values, in this order
  *(f"time/{phase}_s" for phase in PHASES),
  *("data/wait_s", "rdep/rows", "rdep/rounds"),
)
LOCAL = TOLD.index("time/step_s")
SLOW = 0.9
LOGS = 5


class Stragglers:
  """Of `ranks` ranks."""

  def __init__(self, ranks: int):
    self.last = [deque(maxlen=LOGS) for _ in range(ranks)]
    self.best = [float("inf")] * ranks
    self.since = [0] * ranks

  def add(self, seconds: Sequence[float]) -> list[int]:
    """seconds: of the optimizer a step, by rank, since the last log. The ranks that become
    stragglers with it.
    """
    for rank, s in enumerate(seconds):
      self.last[rank].append(s)
      if len(self.last[rank]) == LOGS:
        self.best[rank] = min(self.best[rank], median(self.last[rank]))
    scores = [best / max(s, 1e-9) for best, s in zip(self.best, seconds, strict=True)]
    steady = median(scores) >= SLOW
    late = [steady and score < SLOW for score in scores]
    self.since = [n + 1 if slow else 0 for n, slow in zip(self.since, late, strict=True)]
    return [rank for rank, n in enumerate(self.since) if n == LOGS]


def tags(told: Sequence[Sequence[float]]) -> dict[str, float]:
  """What rank 0 logs of all ranks' values [R, TOLD]: per rank `rank/{r}/NAME`, such as "forward_s",
  seconds since the last log, or "rows". What is 0 on every rank is left out.
  """
  return {
    f"rank/{rank}/{tag.partition('/')[2]}": row[i]
    for i, tag in enumerate(TOLD)
    if any(row[i] for row in told)
    for rank, row in enumerate(told)
  }
