"""Whether learning rates tuned at a base hold at a larger scale, from the points of a sweep.

x is log2 of a rate over the base's. Seeds are blocks: runs of one seed share initial weights and
data, so each has its own level and optimum of a parabola whose curvature all seeds share:
L = a_s + c · (x − x*_s)², over the points within two octaves of the best one. Shift and regret are
differences within a seed, their intervals Student's over seeds. What noise could have made is never
called a result: a group whose parabola is not there is "not identified".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nmoe.wording import counted
from stages.judge.intervals import Interval, interval_of, number, rejected, student_t, upper_tail

Seeds = Mapping[int, Mapping[float, float]]  # seed -> x -> loss in nats, NaN where a run diverged
WINDOW = 2.0  # octaves on either side of the best point, or one step of a coarser grid
BLUR = 1.6  # noise over curvature, above which an optimum is not placed to a quarter of an octave
STRUCTURE = 8.0  # range of a grid's losses over noise, below which noise alone may have made it
WITHOUT = {"off": "without the rule", "embed_only": "with the embedding's factor alone"}
CURVED = 0.995  # one-sided confidence that a parabola opens upward


@dataclass(frozen=True)
class Fit:
  """The parabolas of one scale. optimum, level: seed -> x* and the loss there; NaN where the
  curvature is not above 0, missing where a seed has too few points.

  interior: there are worse points, or diverged ones, on both sides of the best. design: variance
  of the curvature over that of the noise. rss, freedom: of the noise.
  """

  best: float
  interior: bool
  curvature: float
  design: float
  optimum: Mapping[int, float]
  level: Mapping[int, float]
  rss: float
  freedom: int
  spread: float  # of the losses of the first seed's grid
  points: int
  diverged: int


def fit(seeds: Seeds) -> Fit:
  """The common curvature and each seed's optimum. `best` is NaN if every run diverged."""
  total = [loss for grid in seeds.values() for loss in grid.values()]
  diverged = sum(not math.isfinite(loss) for loss in total)
  first = next(iter(seeds.values()))
  finite = {x: loss for x, loss in first.items() if math.isfinite(loss)}
  if not finite:
    return Fit(math.nan, False, math.nan, math.inf, {}, {}, 0.0, 0, math.nan, len(total), diverged)
  best = min(finite, key=finite.get)
  interior = min(first) < best < max(first)
  spread = max(finite.values()) - min(finite.values())
  xs = sorted(first)
  window = max([WINDOW, *(b - a for a, b in itertools.pairwise(xs))]) + 1e-9
  blocks = [
    (seed, [(x - best, grid[x]) for x in grid if abs(x - best) < window and finite_at(grid, x)])
    for seed, grid in seeds.items()
  ]
  blocks = [(seed, points) for seed, points in blocks if len(points) >= 3]
  curvature, design, rss, freedom = _parabolas([points for _, points in blocks])
  optimum, level = {}, {}
  for seed, points in blocks:
    x, y = np.array(points).T
    slope, start = np.polyfit(x, y - curvature * x**2, 1)
    found = curvature > 0
    optimum[seed] = float(best - slope / (2 * curvature)) if found else math.nan
    level[seed] = float(start - slope**2 / (4 * curvature)) if found else math.nan
  places = (curvature, design, optimum, level)
  return Fit(best, interior, *places, rss, freedom, spread, len(total), diverged)


def finite_at(grid: Mapping[float, float], x: float) -> bool:
  return math.isfinite(grid[x])


def _parabolas(blocks: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float, float, int]:
  """Curvature, its design, residual squares and degrees of freedom of L = a_s + b_s x + c x²."""
  squares = product = 0.0
  rests = []
  for points in blocks:
    x, y = np.array(points).T
    line = np.stack([np.ones_like(x), x], axis=1)
    basis = np.linalg.qr(line)[0]
    q, rest = (v - basis @ (basis.T @ v) for v in (x**2, y))
    squares, product = squares + q @ q, product + q @ rest
    rests.append((q, rest))
  if squares <= 1e-12:
    return math.nan, math.inf, 0.0, 0
  curvature = product / squares
  rss = sum(float(((rest - curvature * q) ** 2).sum()) for q, rest in rests)
  freedom = sum(len(q) - 2 for q, _ in rests) - 1
  return float(curvature), float(1 / squares), rss, freedom


@dataclass(frozen=True)
class Scale:
  """One scale of a group: its name, its ratio to the base, and what was measured."""

  name: str
  ratio: float
  seeds: Seeds


@dataclass(frozen=True)
class Limits:
  max_shift: float = 1.0  # octaves
  max_regret: float = 0.01  # nats at the largest scale
  min_control_shift: float = 1.0  # octaves that the control must move
  confidence: float = 0.95


@dataclass(frozen=True)
class Group:
  """What a sweep says of the rates of one group.

  state     "transfers", "drifts", "undecided", "not identified", "no interior optimum", or, by
            `with_control`, "cannot tell"
  shift     of the optimum from base to the largest scale, in octaves, over seeds
  regret    of the base's optimum at the largest scale, in nats, over seeds
  levels    losses at the optima
  exponent  p of x* = x₀ − p · log2(ratio), over seeds, where there are three scales or more
  noise     between rates of one seed, in nats; NaN where no parabola leaves a degree of freedom
  """

  name: str
  state: str
  reason: str
  optima: Mapping[str, Mapping[int, float]]
  levels: Mapping[str, Mapping[int, float]]
  curvature: Mapping[str, float]
  noise: float
  shift: Interval
  regret: Interval
  exponent: Interval | None = None
  p_equal: float = 1.0  # of a shift as large as max_shift, given what was seen
  p_moved: float = 1.0  # of a shift no larger
  diverged: int = 0

  def as_dict(self) -> dict[str, Any]:
    return asdict(self)


NOTHING = Interval(0, math.nan, math.nan, -math.inf, math.inf)


def judge_group(name: str, scales: Sequence[Scale], limits: Limits, placed: bool = True) -> Group:
  """The state of a group from its scales, base first and largest last; `holm` decides over all.

  placed: whether its optima must be placed to a quarter of an octave. A control's need not: that it
  moved by octaves shows in its shift over seeds, if its losses are more than noise.
  """
  fits = {scale.name: fit(scale.seeds) for scale in scales}
  ends = (fits[scales[0].name], fits[scales[-1].name])
  freedom = sum(f.freedom for f in fits.values())
  noise = math.sqrt(sum(f.rss for f in fits.values()) / freedom) if freedom > 0 else math.nan
  optima = {key: dict(f.optimum) for key, f in fits.items()}
  levels = {key: dict(f.level) for key, f in fits.items()}
  curvature = {key: f.curvature for key, f in fits.items()}
  diverged = sum(f.diverged for f in fits.values())
  shift, regret = _moves(ends)
  exponent = _exponent(scales, fits)
  found = (optima, levels, curvature, noise, shift, regret, exponent)
  group = Group(name, "", "", *found, diverged=diverged)
  state, reason = _missing(scales, fits, noise, freedom, placed)
  if state:
    return _said(group, state, reason)
  return _tested(group, limits)


def _missing(
  scales: Sequence[Scale], fits: Mapping[str, Fit], noise: float, freedom: int, placed: bool
) -> tuple[str, str]:
  """Why there are no optima to compare, if so."""
  for scale in (scales[0], scales[-1]):
    f = fits[scale.name]
    if math.isnan(f.best):
      return "no interior optimum", f"Every run at {scale.name} diverged."
    if math.isnan(noise):
      points = f"{counted(f.points, 'point')} at {scale.name}"
      return "not identified", f"{points}: nothing to tell noise by; add points or seeds."
    if f.spread < STRUCTURE * noise:
      found = f"losses differ by {number(f.spread)} nats at {scale.name}"
      return "not identified", f"{found}, noise is {number(noise)}."
    if not f.interior:
      return "no interior optimum", f"The best rate at {scale.name} is the last of its grid."
    if not placed:
      continue
    low = f.curvature - student_t(CURVED, freedom) * noise * math.sqrt(f.design)
    if not low > 0 or noise > BLUR * f.curvature:
      found = f"curvature {number(f.curvature)} at {scale.name} with noise {number(noise)}"
      return "not identified", f"{found} places no optimum to a quarter of an octave."
  return "", ""


def _moves(ends: tuple[Fit, Fit]) -> tuple[Interval, Interval]:
  """Shift and regret over the seeds that both ends have."""
  base, target = ends
  seeds = [seed for seed in base.optimum if seed in target.optimum]
  shifts = np.array([target.optimum[s] - base.optimum[s] for s in seeds])
  if not len(shifts):
    return NOTHING, NOTHING
  return interval_of(shifts, 0.95), interval_of(target.curvature * shifts**2, 0.95)


def _exponent(scales: Sequence[Scale], fits: Mapping[str, Fit]) -> Interval | None:
  """Over seeds, the slope of −x* against log2 of the ratio; a seed of two scales has one too."""
  if len(scales) < 3:
    return None
  slopes = []
  for seed in fits[scales[0].name].optimum:
    known = [(math.log2(s.ratio), fits[s.name].optimum.get(seed, math.nan)) for s in scales]
    known = [(m, x) for m, x in known if math.isfinite(x)]
    if len({m for m, _ in known}) > 1:
      m, x = np.array(known).T
      slopes.append(-np.polyfit(m, x, 1)[0])
  return interval_of(np.array(slopes), 0.95) if slopes else None


def _tested(group: Group, limits: Limits) -> Group:
  """The two one-sided tests of |shift| against max_shift, and of its opposite."""
  n, mean, sd = group.shift.n, group.shift.mean, group.shift.sd
  if n < 2:
    return _said(group, "undecided", "One seed has no interval; run at least 3.")
  error = max(sd / math.sqrt(n), 1e-12)
  near = upper_tail((limits.max_shift - abs(mean)) / error, n - 1)
  return _said(group, "", "", p_equal=near, p_moved=1 - near)


def _said(group: Group, state: str, reason: str, **more: float) -> Group:
  return Group(**{**_fields(group), "state": state, "reason": reason, **more})


def _fields(group: Group) -> dict[str, Any]:
  return {name: getattr(group, name) for name in group.__dataclass_fields__}


def holm(groups: Sequence[Group], limits: Limits) -> list[Group]:
  """Decide the groups that were tested, each error rate over all of them (Holm 1979)."""
  level = (1 - limits.confidence) / 2
  tested = [g for g in groups if not g.state]
  equal = rejected([g.p_equal for g in tested], level)
  moved = rejected([g.p_moved for g in tested], level)
  states = {}
  for g, same, other in zip(tested, equal, moved, strict=True):
    found = f"shift {_shown(g.shift)} octaves, regret {_shown(g.regret)} nats"
    if same and g.regret.high <= limits.max_regret:
      states[g.name] = _said(g, "transfers", f"{found}: within the limits.")
    elif other:
      states[g.name] = _said(g, "drifts", f"{found}: beyond {counted(limits.max_shift, 'octave')}.")
    else:
      states[g.name] = _said(g, "undecided", f"{found}: neither within nor beyond the limits.")
  return [states.get(g.name, g) for g in groups]


def with_control(group: Group, control: Group, limits: Limits) -> Group:
  """A sweep in which the optimum stays without the rule too cannot credit the rule."""
  if group.state != "transfers":
    return group
  low, high = control.shift.low, control.shift.high
  moved = low >= limits.min_control_shift or high <= -limits.min_control_shift
  moved &= control.regret.low > 0
  seen = control.state in ("", "transfers", "drifts", "undecided")
  if moved and seen:
    return group
  found = f"{WITHOUT[control.name]} the optimum moves {_shown(control.shift)} octaves"
  why = control.reason if not seen else f"less than {limits.min_control_shift:g} is not excluded"
  return _said(group, "cannot tell", f"{found} ({why}): this sweep shows no gain of the rule.")


def _shown(i: Interval) -> str:
  return f"{number(i.mean, '+')} [{number(i.low, '+')}, {number(i.high, '+')}]"


@dataclass(frozen=True)
class Sweep:
  """The groups of a sweep, decided together, and its controls."""

  groups: tuple[Group, ...]
  controls: tuple[Group, ...]
  verdict: str = field(default="")
  reason: str = field(default="")

  def as_dict(self) -> dict[str, Any]:
    parts = {"groups": self.groups, "controls": self.controls}
    return {name: [g.as_dict() for g in part] for name, part in parts.items()}


def judge(
  groups: Mapping[str, Sequence[Scale]], controls: Mapping[str, Sequence[Scale]], limits: Limits
) -> Sweep:
  """Confirmed if every identified group transfers, refuted if one drifts; the first is "joint".

  controls: "off" and "embed_only", of the joint rate at base and largest scale.
  """
  decided = holm([judge_group(name, scales, limits) for name, scales in groups.items()], limits)
  without = tuple(judge_group(name, scales, limits, False) for name, scales in controls.items())
  for control in without:
    decided = [with_control(g, control, limits) for g in decided]
  states = [g.state for g in decided]
  if "drifts" in states:
    verdict = "refuted"
  elif states[0] == "transfers" and set(states) <= {"transfers", "not identified"}:
    verdict = "confirmed"
  else:
    verdict = "inconclusive"
  reason = " ".join(f"{g.name} {g.state}: {g.reason}" for g in decided)
  return Sweep(tuple(decided), without, verdict, reason)
