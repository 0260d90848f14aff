"""The judge of transfer on simulated sweeps, whose truth is known."""

import math

import numpy as np
import pytest

from stages.judge.intervals import student_t, upper_tail
from stages.judge.transfer import Limits, Scale, fit, judge, judge_group

LIMITS = Limits(max_regret=0.1)


def grid(rng, optimum, curvature, noise, xs, jitter=0.1, seeds=3):
  """A scale as a sweep measures it: the first seed's whole grid, the others at its best three."""
  found = {}
  for seed in range(seeds):
    own, level = optimum + jitter * rng.normal(), 2 + 0.03 * rng.normal()
    if seed:
      best = min(found[0], key=found[0].get)
      xs = [x for x in found[0] if abs(x - best) <= 1]
    found[seed] = {float(x): level + curvature * (x - own) ** 2 + noise * rng.normal() for x in xs}
  return found


def sweep(rng, shift, curvature=0.03, noise=0.01, control=-2.5):
  xs = np.arange(-4, 5)
  scales = [
    Scale(name, ratio, grid(rng, x, curvature, noise, xs))
    for name, ratio, x in (("base", 1, 0.0), ("large", 8, shift))
  ]
  off = [scales[0], Scale("large", 8, grid(rng, control, 0.03, noise, xs))]
  return judge({"joint": scales}, {"off": off}, LIMITS)


def states(shift, **more):
  rng = np.random.default_rng(7)
  found = [sweep(rng, shift, **more).groups[0].state for _ in range(200)]
  return {state: found.count(state) for state in set(found)}


def test_error_rates_over_200_simulated_sweeps():
  assert states(1.5).get("transfers", 0) <= 10
  assert states(-1.5).get("transfers", 0) <= 10
  at_zero = states(0.0)
  assert at_zero.get("drifts", 0) <= 10
  assert at_zero["transfers"] >= 100  # and it finds what is there
  assert states(2.5)["drifts"] >= 100
  assert states(0.0, curvature=0.0) == {"not identified": 200}


def test_without_a_control_that_moves_it_cannot_tell():
  found = states(0.0, control=0.0)
  assert "transfers" not in found and found["cannot tell"] >= 100


def credited(control, curvature, noise, seeds=3):
  """Of 200 sweeps whose joint optimum stays, how many credit the rule."""
  rng = np.random.default_rng(11)
  xs = np.arange(-4, 5)
  count = 0
  for _ in range(200):
    base, large = (Scale(name, 1, grid(rng, 0, 0.03, 2e-3, xs)) for name in ("base", "large"))
    off = Scale("large", 8, grid(rng, control, curvature, noise, xs, seeds=seeds))
    count += judge({"joint": [base, large]}, {"off": [base, off]}, LIMITS).groups[0].state == (
      "transfers"
    )
  return count


def test_a_control_credits_the_rule_only_where_it_moved():
  """Its optimum need not be placed to a quarter octave; flat or unmoved ones are no control."""
  assert credited(-2.5, curvature=0.02, noise=0.018) >= 100
  assert credited(0.0, curvature=0.02, noise=0.018) <= 10
  assert credited(-0.9, curvature=0.02, noise=0.018) <= 10
  assert credited(0.0, curvature=0.0, noise=0.018) <= 10


def test_one_control_that_stays_is_enough():
  """What the embedding's factor alone does is no gain of the rule."""
  rng = np.random.default_rng(0)
  xs = np.arange(-4, 5)
  base, large, off, embed = (
    Scale(name, 1, grid(rng, x, 0.03, 2e-3, xs))
    for name, x in (("base", 0), ("large", 0), ("large", -2.5), ("large", 0))
  )
  found = judge({"joint": [base, large]}, {"off": [base, off], "embed_only": [base, embed]}, LIMITS)
  assert found.groups[0].state == "cannot tell"
  assert "with the embedding's factor alone the optimum moves" in found.reason


def test_a_parabola_is_found_exactly():
  """Each seed its own optimum and level; a diverged point is none of the parabola's."""
  seeds = {
    seed: {x: 2 + seed + 0.05 * (x - at) ** 2 for x in (-3.0, -2.0, -1.0, 0.0, 1.0)}
    for seed, at in ((0, -0.75), (1, -0.5))
  }
  seeds[0][2.0] = math.nan
  found = fit(seeds)
  assert found.curvature == pytest.approx(0.05)
  assert found.optimum == {0: pytest.approx(-0.75), 1: pytest.approx(-0.5)}
  assert found.level == {0: pytest.approx(2), 1: pytest.approx(3)}
  assert (found.diverged, found.interior, found.best) == (1, True, -1.0)
  assert found.rss == pytest.approx(0, abs=1e-20)


def test_the_curvatures_error_is_that_of_least_squares():
  """Against numpy's covariance of one seed's parabola."""
  rng = np.random.default_rng(0)
  x = np.arange(-2.0, 3.0)
  y = 0.03 * x**2 + 0.001 * rng.normal(size=5)
  found = fit({0: dict(zip(x.tolist(), y.tolist(), strict=True))})
  coefficients, covariance = np.polyfit(x, y, 2, cov=True)
  assert found.curvature == pytest.approx(coefficients[0])
  assert found.freedom == 2
  assert found.design * found.rss / 2 == pytest.approx(covariance[0, 0])
  assert found.optimum[0] == pytest.approx(-coefficients[1] / (2 * coefficients[0]))


def scale(name, losses, ratio=1):
  return Scale(name, ratio, {s: {x: v + s for x, v in losses.items()} for s in range(3)})


def curve(at, noise=1e-3):
  return {float(x): 0.03 * (x - at) ** 2 + noise * math.sin(9 * x) for x in range(-3, 4)}


@pytest.mark.parametrize(
  ("large", "state"),
  [
    ({x: math.nan for x in (-1.0, 0.0, 1.0)}, "no interior optimum"),
    ({float(x): 0.1 * x for x in range(-3, 4)}, "no interior optimum"),
    ({0.0: 1.0}, "not identified"),
    ({float(x): 1e-3 * math.sin(7 * x) for x in range(-3, 4)}, "not identified"),
  ],
)
def test_states_of_what_has_no_optimum(large, state):
  found = judge_group("joint", [scale("base", curve(0)), scale("large", large, 8)], LIMITS)
  assert found.state == state
  assert "large" in found.reason


def test_all_points_alone_tell_nothing():
  found = judge_group("joint", [scale("base", {0.0: 1.0}), scale("large", {0.0: 1.0}, 8)], LIMITS)
  assert found.state == "not identified"
  assert "nothing to tell noise by" in found.reason


def test_the_exponent_over_scales():
  """x* = −0.25 · log2(ratio)."""
  scales = [scale(f"{r}", curve(-0.25 * math.log2(r)), r) for r in (1, 2, 4, 8)]
  found = judge_group("joint", scales, LIMITS)
  assert found.exponent.mean == pytest.approx(0.25, abs=0.05)
  assert found.shift.mean == pytest.approx(-0.75, abs=0.1)
  assert found.regret.mean == pytest.approx(0.03 * 0.75**2, rel=0.2)


def test_holm_is_stricter_over_more_groups():
  """Ten groups, of which each alone would just transfer at 95 %."""
  rng = np.random.default_rng(3)
  xs = np.arange(-4, 5)

  def made():
    return [Scale(n, r, grid(rng, 0.0, 0.03, 0.012, xs)) for n, r in (("base", 1), ("large", 8))]

  groups = {f"g{i}": made() for i in range(10)}
  alone = [judge({name: scales}, {}, LIMITS).groups[0].state for name, scales in groups.items()]
  together = [g.state for g in judge(groups, {}, LIMITS).groups]
  assert together.count("transfers") < alone.count("transfers")


def test_upper_tail_inverts_the_quantile():
  for df in (1, 2, 5, 30):
    assert upper_tail(student_t(0.975, df), df) == pytest.approx(0.025)
    assert upper_tail(-student_t(0.9, df), df) == pytest.approx(0.9)
