"""The timing harness against a clock that the test winds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.tools import timing


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_spread_is_numpys(samples):
  wanted = np.percentile(samples, [50, 10, 90])
  assert timing.spread(samples) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
  ("nbytes", "cache", "sets"), [(100, 50, 3), (25, 50, 3), (24, 50, 4), (1, 50, 51), (50, 0, 3)]
)
def test_all_sets_but_one_fill_the_cache(nbytes, cache, sets):
  assert timing.num_sets(nbytes, cache) == sets
  assert (sets - 1) * nbytes >= cache


class Runs:
  """A run whose seconds per call are those of a table, and a protocol of what was run."""

  def __init__(self, seconds: dict):
    self.seconds, self.log = seconds, []

  def __call__(self, variant, calls, first):
    self.log.append((variant, calls, first))
    drift = 1 + len(self.log) * 1e-6
    return {phase: s * drift for phase, s in self.seconds[variant].items()}


def test_variants_take_turns_and_the_first_rounds_are_dropped():
  runs = Runs({"a": {"": 0.001}, "b": {"": 0.1}})
  samples = timing.interleaved({"A": "a", "B": "b"}, runs, burst_s=0.3, warmup=2, repeats=3)
  assert [(name, calls) for name, calls, _ in runs.log[4:]] == [("a", 300), ("b", 3)] * 5
  assert [first for *_, first in runs.log[4::2]] == [0, 1, 2, 3, 4]
  assert samples["A", ""] == pytest.approx([1.0 * (1 + n * 1e-6) for n in (9, 11, 13)], rel=1e-12)
  assert samples["B", ""] == pytest.approx([100 * (1 + n * 1e-6) for n in (10, 12, 14)], rel=1e-12)


def test_phases_and_the_slowest_rank():
  runs = Runs({"a": {"send": 0.001, "receive": 0.002}})
  samples = timing.interleaved(
    {"A": "a"}, runs, burst_s=0.3, warmup=0, repeats=1, slowest=lambda s: [2 * x for x in s]
  )
  assert runs.log[2][1] == 50  # calls of 6 ms, the slowest's
  assert samples.keys() == {("A", "send"), ("A", "receive")}
  assert samples["A", "receive"][0] == pytest.approx(4.0, rel=1e-5)


def test_a_slow_variant_is_called_once_a_run():
  runs = Runs({"a": {"": 5.0}})
  timing.interleaved({"A": "a"}, runs, warmup=0, repeats=1)
  assert [calls for _, calls, _ in runs.log] == [1, timing.SETS, 1]


def test_the_stopwatch_rotates_inputs_and_measures_a_call():
  seen = []

  def variant(i: int) -> None:
    seen.append(i)
    time.sleep(0.01)

  run = timing.stopwatch(torch.device("cpu"), sets=4)
  assert 0.01 <= run(variant, 6, 3)[timing.WHOLE] < 0.03
  assert seen == [3, 0, 1, 2, 3, 0]
