"""Paired comparison of two arms over seeds, and the verdict on a hypothesis.

Arms share seeds, so initial weights and data order: d_i = variant_i − baseline_i. The interval is
Student's, mean(d) ± t(1 − α/2, n − 1) · sd(d) / √n. Steps or batches of one run are never
replicates: n counts seeds. A run that diverged is an outcome, not missing data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

Direction = Literal["lower", "higher", "none"]
Verdict = Literal["confirmed", "refuted", "inconclusive", "described"]

MAX_EXACT_FLIPS = 20


@dataclass(frozen=True)
class Single:
  """One arm over its seeds: n finite values, mean, sample sd, Student interval [low, high].

  With a reference value the verdict is on mean − reference; without one it is "described".
  """

  n: int
  mean: float
  sd: float
  low: float
  high: float
  diverged: int
  reference: float | None = None
  verdict: Verdict = "described"
  reason: str = ""

  def as_dict(self) -> dict[str, Any]:
    return asdict(self)


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


def paired(
  baseline: Sequence[float | None],
  variant: Sequence[float | None],
  *,
  direction: Direction,
  min_effect: float,
  confidence: float = 0.95,
) -> Paired:
  """Compare two arms, seed by seed, and judge the hypothesis (`judge` has the rules).

  Pass NaN, an infinity or None as the metric of a run that diverged. Raises ValueError if the
  lists are empty or of different lengths.
  """
  a, b = _floats(baseline), _floats(variant)
  if len(a) != len(b) or len(a) == 0:
    raise ValueError(f"{len(a)} baseline and {len(b)} variant values are not pairs")
  ok_a, ok_b = np.isfinite(a), np.isfinite(b)
  both = ok_a & ok_b
  d = b[both] - a[both]
  one = _describe(d, confidence)
  quantiles = student_t((1 + confidence) / 2, len(d) - 1) + student_t(0.8, len(d) - 1)
  verdict, reason = judge(one.mean, (one.low, one.high), len(d), direction, min_effect)
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


def single(
  values: Sequence[float | None],
  *,
  reference: float | None = None,
  direction: Direction = "none",
  min_effect: float = 0.0,
  confidence: float = 0.95,
) -> Single:
  """One arm over its seeds, judged against a constant (the unigram model's bpb, say) if given.

  Values that are not finite, or None, count as diverged: any of them refutes the hypothesis.
  """
  one = _describe(_floats(values), confidence)
  if reference is None:
    return one
  interval = (one.low - reference, one.high - reference)
  subject = f"{_number(one.mean)} − {_number(reference)}"
  verdict, reason = judge(one.mean - reference, interval, one.n, direction, min_effect, subject)
  if one.diverged:
    verdict, reason = "refuted", f"{one.diverged} of {len(values)} runs diverged."
  return replace(one, reference=reference, verdict=verdict, reason=reason)


def judge(
  mean: float,
  interval: tuple[float, float],
  n: int,
  direction: Direction,
  min_effect: float,
  subject: str = "variant − baseline",
) -> tuple[Verdict, str]:
  """The verdict and its reason, from the interval [low, high] of the mean difference over n seeds.

  direction "lower" or "higher" claims an effect of at least m = min_effect in that direction. With
  [low, high] the interval of the effect in the claimed direction (for "lower" it is mirrored):
    confirmed     low ≥ m and low > 0    the whole interval is an effect that matters
    refuted       high < m or high ≤ 0   an effect that matters is excluded
    inconclusive  otherwise
  direction "none" claims that no difference matters:
    confirmed     −m ≤ low and high ≤ m  every difference in the interval is too small to matter
    refuted       low > m or high < −m   every difference in the interval matters
    inconclusive  otherwise
  One seed has no interval and is inconclusive.
  """
  if n == 0:
    return "inconclusive", "No seed has a finite value."
  found = f"{subject} = {_number(mean, '+')}"
  if n == 1:
    return "inconclusive", f"{found} at one seed, which has no interval; run at least 3."
  low, high = interval
  found += f" [{_number(low, '+')}, {_number(high, '+')}] over {n} seeds"
  if direction == "none":
    return _judge_none(low, high, min_effect, found)
  if direction == "lower":
    low, high = -high, -low
  wanted = f"{direction} by {_number(min_effect)} or more" if min_effect else direction
  if low >= min_effect and low > 0:
    return "confirmed", f"{found}: the whole interval is {wanted}."
  if high < min_effect or high <= 0:
    return "refuted", f"{found}: the interval excludes {wanted}."
  return "inconclusive", f"{found}: the interval neither excludes nor establishes {wanted}."


def _judge_none(low: float, high: float, min_effect: float, found: str) -> tuple[Verdict, str]:
  bound = f"a difference of more than {_number(min_effect)}"
  if -min_effect <= low and high <= min_effect:
    return "confirmed", f"{found}: the interval excludes {bound}."
  if low > min_effect or high < -min_effect:
    return "refuted", f"{found}: the whole interval is {bound}."
  return "inconclusive", f"{found}: the interval neither excludes nor establishes {bound}."


def _judge_diverged(
  ok_a: np.ndarray, ok_b: np.ndarray, direction: Direction
) -> tuple[Verdict, str]:
  """Where a run diverged, its pair has no difference: stability decides, or nothing does."""
  alone_b, alone_a = int((ok_a & ~ok_b).sum()), int((~ok_a & ok_b).sum())
  seeds = f"of {len(ok_a)} seeds"
  if alone_b:
    reason = f"The variant diverged at {alone_b} {seeds} where the baseline did not."
    return "refuted", reason
  if not alone_a:
    return "inconclusive", f"Both arms diverged at {int((~ok_a).sum())} {seeds}."
  reason = f"The baseline diverged at {alone_a} {seeds} where the variant did not"
  if direction == "none":
    return "refuted", f"{reason}."
  return "inconclusive", f"{reason}: it is more stable, but its effect has no measured size."


def student_t(p: float, df: int) -> float:
  """The quantile t with P(T ≤ t) = p of Student's distribution, 0.5 ≤ p < 1; NaN for df < 1.

  Bisection on θ = atan(t / √df): for integer df, P(|T| ≤ t) is a finite sum in θ (Abramowitz and
  Stegun 26.7.3 and 26.7.4).
  """
  if df < 1:
    return math.nan
  low, high = 0.0, math.pi / 2
  for _ in range(100):
    middle = (low + high) / 2
    low, high = (middle, high) if _central(middle, df) < 2 * p - 1 else (low, middle)
  return math.sqrt(df) * math.tan((low + high) / 2)


def _central(theta: float, df: int) -> float:
  """P(|T| ≤ √df · tan θ)."""
  sine, cosine = math.sin(theta), math.cos(theta)
  term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
  for k in range(1 if df % 2 else 0, df - 1, 2):
    total += term
    term *= cosine * cosine * (k + 1) / (k + 2)
  return 2 / math.pi * (theta + sine * total) if df % 2 else sine * total


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


def _number(value: float, sign: str = "") -> str:
  text = f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"
  return text.replace("-", "−")


def _floats(values: Sequence[float | None]) -> np.ndarray:
  return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def _describe(values: np.ndarray, confidence: float) -> Single:
  finite = values[np.isfinite(values)]
  n = len(finite)
  mean = float(finite.mean()) if n else math.nan
  sd = float(finite.std(ddof=1)) if n > 1 else math.nan
  half = student_t((1 + confidence) / 2, n - 1) * sd / math.sqrt(n) if n > 1 else math.inf
  return Single(n, mean, sd, mean - half, mean + half, len(values) - n)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  if len(a) < 3 or a.std() == 0 or b.std() == 0:
    return math.nan
  return float(np.corrcoef(a, b)[0, 1])


def _pooled_sd(*arms: np.ndarray) -> float:
  """√ of the arms' squared deviations over their degrees of freedom; NaN without any."""
  freedom = sum(max(len(arm) - 1, 0) for arm in arms)
  squares = sum(float(((arm - arm.mean()) ** 2).sum()) for arm in arms if len(arm) > 1)
  return math.sqrt(squares / freedom) if freedom else math.nan
