"""The statistics against published tables and simulation; the verdict against its rules."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stages.judge.intervals import student_t, verdict_on
from stages.judge.paired import compare, sign_flip_p
from stages.judge.single import describe
from stages.report.curves import band, time_to_loss

# Two-sided 95 % and 99 % and one-sided 80 % points of Student's t (Fisher and Yates, table III).
TABLE = {
  1: (12.706, 63.657, 1.376),
  2: (4.303, 9.925, 1.061),
  3: (3.182, 5.841, 0.978),
  4: (2.776, 4.604, 0.941),
  9: (2.262, 3.250, 0.883),
  30: (2.042, 2.750, 0.854),
  120: (1.980, 2.617, 0.845),
}

finite = st.floats(-100, 100, allow_subnormal=False)
pairs = st.integers(1, 7).flatmap(
  lambda n: st.tuples(
    st.lists(finite, min_size=n, max_size=n), st.lists(finite, min_size=n, max_size=n)
  )
)
directions = st.sampled_from(["lower", "higher", "none"])
effects = st.floats(0, 10, allow_subnormal=False)
OPPOSITE = {"lower": "higher", "higher": "lower", "none": "none"}


@pytest.mark.parametrize("df", TABLE)
def test_student_t_is_the_published_table(df):
  found = (student_t(0.975, df), student_t(0.995, df), student_t(0.8, df))
  np.testing.assert_allclose(found, TABLE[df], atol=5.1e-4)


def test_student_t_with_one_and_two_degrees_has_a_closed_form():
  for p in (0.6, 0.9, 0.999):
    assert student_t(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-12)
    exact = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    assert student_t(p, 2) == pytest.approx(exact, rel=1e-12)
  assert student_t(0.5, 5) == pytest.approx(0, abs=1e-12) and math.isnan(student_t(0.9, 0))


def test_a_paired_example_by_hand():
  """Differences −1, −2, −3: mean −2, sd 1, interval −2 ± 4.3027/√3, mde (4.3027 + 1.0607)/√3."""
  found = compare([10.0, 20.0, 30.0], [9.0, 18.0, 27.0], direction="lower", min_effect=0.5)
  assert (found.n, found.differences) == (3, (-1.0, -2.0, -3.0))
  assert (found.mean_difference, found.sd) == pytest.approx((-2.0, 1.0))
  assert found.interval == pytest.approx((-2 - 2.48414, -2 + 2.48414), abs=1e-5)
  assert found.mde == pytest.approx(3.09651, abs=1e-5)
  assert found.correlation == pytest.approx(1.0)
  assert found.noise_floor == pytest.approx(math.sqrt((200 + 162) / 4))
  assert found.p_sign_flip == 0.25
  assert found.verdict == "inconclusive"
  assert json.loads(json.dumps(found.as_dict()))["verdict"] == "inconclusive"


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(n):
  rng = np.random.default_rng(n)
  trials, truth, covered = 3000, -0.3, 0
  for _ in range(trials):
    seed_effect = rng.normal(0, 2, n)
    a = seed_effect + rng.normal(0, 0.5, n)
    b = seed_effect + truth + rng.normal(0, 0.5, n)
    low, high = compare(a, b, direction="lower", min_effect=0).interval
    covered += low <= truth <= high
  error = math.sqrt(0.95 * 0.05 / trials)
  assert abs(covered / trials - 0.95) < 4 * error


def test_the_smallest_detectable_effect_is_found_with_the_stated_power():
  """With the true sd known on average, an effect of one mde is found in about 80 % of trials."""
  rng = np.random.default_rng(0)
  n, trials, found = 10, 3000, 0
  effect = (student_t(0.975, n - 1) + student_t(0.8, n - 1)) / math.sqrt(n)
  for _ in range(trials):
    low, high = compare(
      np.zeros(n), rng.normal(effect, 1, n), direction="none", min_effect=0
    ).interval
    found += low > 0 or high < 0
  assert 0.76 < found / trials < 0.86


def test_a_true_null_is_seldom_confirmed():
  rng = np.random.default_rng(1)
  wrong = sum(
    compare(rng.normal(0, 1, 4), rng.normal(0, 1, 4), direction="lower", min_effect=0.0).verdict
    == "confirmed"
    for _ in range(2000)
  )
  assert abs(wrong / 2000 - 0.025) < 4 * math.sqrt(0.025 * 0.975 / 2000)


@given(pairs, directions, effects)
def test_swapping_the_arms_mirrors_everything(values, direction, min_effect):
  a, b = values
  one = compare(a, b, direction=direction, min_effect=min_effect)
  two = compare(b, a, direction=OPPOSITE[direction], min_effect=min_effect)
  assert one.verdict == two.verdict
  assert one.interval == pytest.approx((-two.high, -two.low), nan_ok=True)
  assert one.p_sign_flip == two.p_sign_flip and one.mde == pytest.approx(two.mde)


@given(pairs, st.sampled_from(["lower", "higher"]), effects, st.floats(0, 50))
def test_a_larger_effect_never_makes_the_verdict_worse(values, direction, min_effect, shift):
  a, b = values
  sign = -1 if direction == "lower" else 1
  rank = {"refuted": 0, "inconclusive": 1, "confirmed": 2}
  before = compare(a, b, direction=direction, min_effect=min_effect)
  edge = min(abs(abs(x) - min_effect) for x in (*before.interval, min_effect + 1))
  assume(edge > 1e-9)
  after = compare(a, [v + sign * shift for v in b], direction=direction, min_effect=min_effect)
  assert rank[after.verdict] >= rank[before.verdict] or shift < 1e-9
  stricter = compare(a, b, direction=direction, min_effect=min_effect + shift)
  assert rank[stricter.verdict] <= rank[before.verdict]


@given(st.floats(-5, 5), st.floats(0, 5), directions, st.floats(0, 3))
def test_the_verdict_follows_its_rules(center, half, direction, m):
  low, high = center - half, center + half
  verdict, reason = verdict_on(center, (low, high), 3, direction, m)
  if direction == "none":
    inside, outside = max(abs(low), abs(high)) <= m, low > m or high < -m
  else:
    effect = (low, high) if direction == "higher" else (-high, -low)
    inside, outside = effect[0] >= m and effect[0] > 0, effect[1] < m or effect[1] <= 0
  assert not (inside and outside)
  assert verdict == ("confirmed" if inside else "refuted" if outside else "inconclusive")
  assert reason.endswith(".") and "over 3 seeds" in reason


def test_the_reason_names_the_numbers():
  found = compare([1.1, 1.2, 1.15], [1.0, 1.12, 1.04], direction="lower", min_effect=0.01)
  assert found.reason == (
    "variant − baseline = −0.09667 [−0.1346, −0.05872] over 3 seeds: "
    "the whole interval is lower by 0.01 or more."
  )


def test_one_seed_has_no_interval():
  found = compare([1.0], [0.5], direction="lower", min_effect=0.1)
  assert (found.verdict, found.mde, found.interval) == (
    "inconclusive",
    math.inf,
    (-math.inf, math.inf),
  )
  assert "run at least 3" in found.reason
  assert math.isnan(found.sd) and found.p_sign_flip == 1.0


def test_equal_arms():
  same = [1.0, 2.0, 3.0]
  assert compare(same, same, direction="none", min_effect=0).verdict == "confirmed"
  assert compare(same, same, direction="lower", min_effect=0).verdict == "refuted"
  assert compare(same, same, direction="none", min_effect=0).p_sign_flip == 1.0


@pytest.mark.parametrize(
  ("baseline", "variant", "direction", "verdict"),
  [
    ([1, 1, 1], [0.5, math.nan, 0.5], "lower", "refuted"),
    ([1, 1, 1], [0.5, None, 0.5], "none", "refuted"),
    ([1, math.inf, 1], [0.5, 0.5, 0.5], "lower", "inconclusive"),
    ([1, math.nan, 1], [1, 1, 1], "none", "refuted"),
    ([1, None, 1], [0.5, None, 0.5], "lower", "inconclusive"),
    ([None, 1, 1], [0.5, None, 0.5], "lower", "refuted"),
    ([None], [None], "lower", "inconclusive"),
  ],
)
def test_divergence_is_an_outcome(baseline, variant, direction, verdict):
  found = compare(baseline, variant, direction=direction, min_effect=0.1)
  assert found.verdict == verdict and "diverged at" in found.reason
  assert found.diverged_variant == sum(v is None or not math.isfinite(v) for v in variant)


def test_what_is_not_pairs_is_refused():
  for a, b in (([], []), ([1.0], [1.0, 2.0])):
    with pytest.raises(ValueError, match="are not pairs"):
      compare(a, b, direction="none", min_effect=0)


@given(st.lists(finite, min_size=1, max_size=6))
def test_sign_flips_against_enumeration(d):
  flips = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in signs_of(len(d))]
  slack = 1e-9 * sum(map(abs, d))
  assume(all(abs(f - abs(sum(d))) < 1e-3 * slack or abs(f - abs(sum(d))) > slack for f in flips))
  exact = sum(f >= abs(sum(d)) - slack / 2 for f in flips) / len(flips)
  assert sign_flip_p(d) == exact


def signs_of(n):
  return list(itertools.product((1, -1), repeat=n))


def test_sign_flips_reach_their_smallest_p_and_stop_at_twenty():
  assert sign_flip_p([1.0] * 6) == 2**-5
  assert math.isnan(sign_flip_p([1.0] * 21)) and math.isnan(sign_flip_p([]))


def test_one_arm_against_a_reference():
  values = [2.0, 2.1, 1.9]
  plain = describe(values)
  assert plain.verdict == "described" and plain.mean == pytest.approx(2.0)
  assert plain.high - plain.mean == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
  judged = describe(values, reference=4.5, direction="lower", min_effect=0.5)
  assert judged.verdict == "confirmed" and re.match(
    r"2 − 4.5 \(a unigram .*\) = −2.5 \[", judged.reason
  )
  assert (
    describe(values, reference=2.3, direction="lower", min_effect=0.5).verdict == "inconclusive"
  )
  diverged = describe([2.0, math.nan], reference=4.5, direction="lower")
  assert (diverged.verdict, diverged.diverged, diverged.n) == ("refuted", 1, 1)


def test_time_to_loss_interpolates_the_first_crossing():
  x, loss = [0, 10, 20, 30], [4.0, 3.0, 1.0, 1.5]
  assert time_to_loss(x, loss, 2.0) == 15
  assert time_to_loss(x, loss, 4.5) == 0 and time_to_loss(x, loss, 0.5) == math.inf
  assert time_to_loss([0, 10], [math.inf, 1.0], 2.0) == 10
  assert time_to_loss([], [], 2.0) == math.inf


def test_band_over_the_steps_that_all_seeds_have():
  curves = [
    (np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0])),
    (np.array([2, 3, 4]), np.array([4.0, 1.0, 9.0])),
  ]
  x, mean, low, high = band(curves)
  assert (x.tolist(), mean.tolist()) == ([2, 3], [3.0, 2.0])
  assert (low.tolist(), high.tolist()) == ([2.0, 1.0], [4.0, 3.0])
