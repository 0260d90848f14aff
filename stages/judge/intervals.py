"""Student's interval of a mean over seeds, and what it says of a hypothesis.

The interval is mean ± t(1 − α/2, n − 1) · sd / √n. Steps or batches of one run are never
replicates: n counts seeds. A run that diverged is an outcome, not missing data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Direction = Literal["lower", "higher", "none"]
Verdict = Literal["confirmed", "refuted", "inconclusive", "described"]


@dataclass(frozen=True)
class Interval:
  """n finite values: mean, sample sd, Student interval [low, high] (infinite for n = 1)."""

  n: int
  mean: float
  sd: float
  low: float
  high: float


def interval_of(values: np.ndarray, confidence: float) -> Interval:
  """Of the finite ones among the values."""
  finite = values[np.isfinite(values)]
  n = len(finite)
  mean = float(finite.mean()) if n else math.nan
  sd = float(finite.std(ddof=1)) if n > 1 else math.nan
  half = student_t((1 + confidence) / 2, n - 1) * sd / math.sqrt(n) if n > 1 else math.inf
  return Interval(n, mean, sd, mean - half, mean + half)


def verdict_on(
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
  found = f"{subject} = {number(mean, '+')}"
  if n == 1:
    return "inconclusive", f"{found} at one seed, which has no interval; run at least 3."
  low, high = interval
  found += f" [{number(low, '+')}, {number(high, '+')}] over {n} seeds"
  if direction == "none":
    return _judge_none(low, high, min_effect, found)
  if direction == "lower":
    low, high = -high, -low
  wanted = f"{direction} by {number(min_effect)} or more" if min_effect else direction
  if low >= min_effect and low > 0:
    return "confirmed", f"{found}: the whole interval is {wanted}."
  if high < min_effect or high <= 0:
    return "refuted", f"{found}: the interval excludes {wanted}."
  return "inconclusive", f"{found}: the interval neither excludes nor establishes {wanted}."


def _judge_none(low: float, high: float, min_effect: float, found: str) -> tuple[Verdict, str]:
  bound = f"a difference of more than {number(min_effect)}"
  if -min_effect <= low and high <= min_effect:
    return "confirmed", f"{found}: the interval excludes {bound}."
  if low > min_effect or high < -min_effect:
    return "refuted", f"{found}: the whole interval is {bound}."
  return "inconclusive", f"{found}: the interval neither excludes nor establishes {bound}."


def two_sided_p(t: float, df: int) -> float:
  """P(|T| ≥ |t|) of Student's distribution with integer df ≥ 1."""
  return 1.0 - _central(math.atan(abs(t) / math.sqrt(df)), df)


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


def upper_tail(t: float, df: int) -> float:
  """P(T > t) of Student's distribution, df ≥ 1."""
  half = _central(math.atan(abs(t) / math.sqrt(df)), df) / 2
  return 0.5 - half if t >= 0 else 0.5 + half


def _central(theta: float, df: int) -> float:
  """P(|T| ≤ √df · tan θ)."""
  sine, cosine = math.sin(theta), math.cos(theta)
  term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
  for k in range(1 if df % 2 else 0, df - 1, 2):
    total += term
    term *= cosine * cosine * (k + 1) / (k + 2)
  return 2 / math.pi * (theta + sine * total) if df % 2 else sine * total


def rejected(ps: Sequence[float], level: float) -> list[bool]:
  """Which hypotheses are rejected at a level, all errors together: Holm's step-down (1979). The
  smallest p is held against level / n, the next against level / (n − 1), … until one stands.
  """
  found = [False] * len(ps)
  for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
    if ps[i] > level / (len(ps) - rank):
      break
    found[i] = True
  return found


def number(value: float, sign: str = "") -> str:
  text = f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"
  return text.replace("-", "−")


def floats(values: Sequence[float | None]) -> np.ndarray:
  return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
