"""Which rank of a run is slow, in which phase, and what unequal loads cost.

All of it is in rank 0's file: ranks tell it their phases and rows at each log. Ranks wait for each
other within a step, so their steps take equally long and a slow rank shows only in the phase in
which it is late: there it stands above the median of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from nmoe.records.live import RankValues
from stages.viz.columns import framed

# A rank waits for nobody in the first two; so of two ranks, one late in them and the other waiting
# for it in a later phase as long, the first is told.
ORDER = "load step forward backward graph clip gather log".split()
# of the largest delay: a phase with as much that stands before it in ORDER is the cause
LIKELY = 0.8


@dataclass(frozen=True)
class Phase:
  """Means over the run, in seconds since the log before: of the slowest rank and of the median."""

  name: str
  rank: int
  seconds: float
  median: float
  share: float  # of their difference in the time between two logs

  @property
  def above(self) -> float:
    return self.seconds - self.median


def answer(found: RankValues | None, expert_share: float | None) -> bytes:
  """The header: n, ranks, phases, late (the phase of ORDER in which a rank is late, or null), each
  (name -> the mean of every rank), rounds, gain (of balanced routing, a share, or null). The
  columns: step, tokens, time float64 [n]; float32 [ranks, n]: the share of the time between two
  logs by which a rank was late in its latest phase, which phase that was, its rows over the mean.
  """
  if found is None:
    return framed({"n": 0, "ranks": 0}, [])
  told = {name: np.nan_to_num(of_Rn) for name, of_Rn in found.values.items()}
  names = [name for name in ORDER if f"{name}_s" in told]
  seconds_PRn = np.stack([told[f"{name}_s"] for name in names])
  median_P1n = np.median(seconds_PRn, axis=1, keepdims=True)
  delay_PRn = seconds_PRn - median_P1n
  late_Rn = delay_PRn.max(axis=0) / np.maximum(median_P1n.sum(axis=0), 1e-9)
  rows_Rn = found.values.get("rows", np.full(late_Rn.shape, np.nan))
  phases = of_phases(names, seconds_PRn.mean(axis=2))
  header = {
    "n": len(found.step),
    "ranks": len(late_Rn),
    "names": names,
    "phases": [asdict(phase) | {"above": phase.above} for phase in phases],
    "late": late(phases) if len(late_Rn) > 1 else None,
    "each": {name: of_Rn.mean(axis=1).tolist() for name, of_Rn in told.items()},
    "rounds": float(told["rounds"][:, -1].max()) if "rounds" in told else 0.0,
    "gain": gain(told["rows"].mean(axis=1), expert_share) if "rows" in told else None,
  }
  even_Rn = rows_Rn / np.maximum(rows_Rn.mean(axis=0), 1e-9)
  columns = [found.step, found.tokens, found.time - found.time[0]]
  maps = [late_Rn, delay_PRn.argmax(axis=0), even_Rn]
  return framed(
    header, [x.astype("<f8").tobytes() for x in columns] + [m.astype("<f4").tobytes() for m in maps]
  )


def latest(found: RankValues) -> Phase | None:
  """The phase in which a rank is late, of the last part; None with one rank."""
  names = [name for name in ORDER if f"{name}_s" in found.values]
  last_PR = np.nan_to_num(np.stack([found.values[f"{name}_s"][:, -1] for name in names]))
  phases = of_phases(names, last_PR)
  return phases[late(phases)] if last_PR.shape[1] > 1 else None


def of_phases(names: Sequence[str], mean_PR: np.ndarray) -> list[Phase]:
  """Of each phase the slowest rank against the median."""
  median_P = np.median(mean_PR, axis=1)
  between = max(float(median_P.sum()), 1e-9)
  slow_P = mean_PR.argmax(axis=1)
  return [
    Phase(name, int(r), float(of[r]), float(mid), float(of[r] - mid) / between)
    for name, r, of, mid in zip(names, slow_P, mean_PR, median_P, strict=True)
  ]


def late(phases: Sequence[Phase]) -> int:
  """The place of the phase in which a rank is late."""
  most = max(phase.above for phase in phases)
  return next(i for i, phase in enumerate(phases) if phase.above >= LIKELY * most)


def gain(rows_R: np.ndarray, expert_share: float | None) -> float | None:
  """By what share steps would be faster at most, were every rank's rows the mean: the experts' part
  of the FLOPs takes as long as the fullest rank needs.
  """
  if expert_share is None or len(rows_R) < 2 or not rows_R.max() > 0:
    return None
  saved = expert_share * (1 - rows_R.mean() / rows_R.max())
  return float(saved / (1 - saved))
