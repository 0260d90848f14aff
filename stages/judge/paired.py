"""Two arms over shared seeds, compared pair by pair, and the verdict on a hypothesis.

Arms share seeds, so initial weights and data order: d_i = variant_i − baseline_i; the interval is
that of mean(d) (stages/judge/intervals.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nmoe.records.reader import Hypothesis
from nmoe.wording import counted
from stages.judge.intervals import Direction, Verdict, floats, interval_of, student_t, verdict_on
from stages.judge.table import Judgement, Table

MAX_EXACT_FLIPS = 20


@dataclass(frozen=True)
class Paired:
  """Two arms over shared seeds. Differences are variant − baseline, in the metric's unit.

  n, differences  the pairs in which both values are finite
  low, high       interval of the mean difference (infinite for n = 1)
  sd              sample sd of the differences
  correlation     of the arms over seeds (NaN below 3 pairs): what pairing gains
  noise_floor     pooled sd over seeds within an arm: how far one run lies from another by chance
  mde             smallest mean difference found with 80 % power: (t(1−α/2) + t(0.8)) · sd / √n
  p_sign_flip     exact two-sided sign-flip test; at least 2^(1−n); NaN above 20 pairs
  diverged_*      seeds whose value is not finite
  """

  n: int
  differences: tuple[float, ...]
  mean_difference: float
  low: float
  high: float
  confidence: float
  sd: float
  correlation: float
  noise_floor: float
  mde: float
  p_sign_flip: float
  diverged_baseline: int
  diverged_variant: int
  verdict: Verdict
  reason: str

  @property
  def interval(self) -> tuple[float, float]:
    return self.low, self.high

  def as_dict(self) -> dict[str, Any]:
    return asdict(self)


def judge(hypothesis: Hypothesis, table: Table) -> Judgement:
  """Compare the second arm of a table with its first, seed by seed."""
  baseline, variant = table.arms
  metric = hypothesis.metric
  one = compare(
    table.values(baseline, metric),
    table.values(variant, metric),
    direction=hypothesis.direction,
    min_effect=hypothesis.min_effect,
  )
  return Judgement(one.verdict, one.reason, one.as_dict())


def compare(
  baseline: Sequence[float | None],
  variant: Sequence[float | None],
  *,
  direction: Direction,
  min_effect: float,
  confidence: float = 0.95,
) -> Paired:
  """Compare two arms, seed by seed, and judge the hypothesis (the rules: intervals.verdict_on).

  Pass NaN, an infinity or None as the metric of a run that diverged. Raises ValueError if the
  lists are empty or of different lengths.
  """
  a, b = floats(baseline), floats(variant)
  if len(a) != len(b) or len(a) == 0:
    raise ValueError(f"{len(a)} baseline and {len(b)} variant values are not pairs")
  ok_a, ok_b = np.isfinite(a), np.isfinite(b)
  both = ok_a & ok_b
  d = b[both] - a[both]
  one = interval_of(d, confidence)
  quantiles = student_t((1 + confidence) / 2, len(d) - 1) + student_t(0.8, len(d) - 1)
  verdict, reason = verdict_on(one.mean, (one.low, one.high), len(d), direction, min_effect)
  if not both.all():
    verdict, reason = _judge_diverged(ok_a, ok_b, direction)
  return Paired(
    n=len(d),
    differences=tuple(d.tolist()),
    mean_difference=one.mean,
    low=one.low,
    high=one.high,
    confidence=confidence,
    sd=one.sd,
    correlation=_correlation(a[both], b[both]),
    noise_floor=_pooled_sd(a[ok_a], b[ok_b]),
    mde=quantiles * one.sd / math.sqrt(len(d)) if len(d) > 1 else math.inf,
    p_sign_flip=sign_flip_p(d),
    diverged_baseline=int((~ok_a).sum()),
    diverged_variant=int((~ok_b).sum()),
    verdict=verdict,
    reason=reason,
  )


def _judge_diverged(
  ok_a: np.ndarray, ok_b: np.ndarray, direction: Direction
) -> tuple[Verdict, str]:
  """Where a run diverged, its pair has no difference: stability decides, or nothing does."""
  alone_b, alone_a = int((ok_a & ~ok_b).sum()), int((~ok_a & ok_b).sum())
  seeds = f"of {counted(len(ok_a), 'seed')}"
  if alone_b:
    reason = f"The variant diverged at {alone_b} {seeds} where the baseline did not."
    return "refuted", reason
  if not alone_a:
    return "inconclusive", f"Both arms diverged at {int((~ok_a).sum())} {seeds}."
  reason = f"The baseline diverged at {alone_a} {seeds} where the variant did not"
  if direction == "none":
    return "refuted", f"{reason}."
  return "inconclusive", f"{reason}: it is more stable, but its effect has no measured size."


def sign_flip_p(differences: Sequence[float]) -> float:
  """Exact two-sided p: the share of the 2^n sign assignments whose |sum| is at least the observed.

  NaN for no difference at all and above MAX_EXACT_FLIPS of them.
  """
  d = np.asarray(differences, dtype=np.float64)
  if not 0 < len(d) <= MAX_EXACT_FLIPS:
    return math.nan
  sums = np.zeros(1)
  for value in d:
    sums = np.concatenate((sums + value, sums - value))
  return float(np.mean(np.abs(sums) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  if len(a) < 3 or a.std() == 0 or b.std() == 0:
    return math.nan
  return float(np.corrcoef(a, b)[0, 1])


def _pooled_sd(*arms: np.ndarray) -> float:
  """√ of the arms' squared deviations over their degrees of freedom; NaN without any."""
  freedom = sum(max(len(arm) - 1, 0) for arm in arms)
  squares = sum(float(((arm - arm.mean()) ** 2).sum()) for arm in arms if len(arm) > 1)
  return math.sqrt(squares / freedom) if freedom else math.nan
