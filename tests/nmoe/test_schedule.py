"""WSD by tokens against the formula of science: warm-up, sustain, decay."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import BASE

from nmoe.config.file import changed
from nmoe.config.sections import ScheduleConfig
from nmoe.train.schedule import lr_factor, rate_phases, remarks

BATCH = 100


def schedule(**values) -> ScheduleConfig:
  given = {"total_tokens": 10_000, "batch_tokens": BATCH, "warmup_tokens": 1_000}
  return ScheduleConfig(**(given | {"decay_tokens": 2_000} | values))


def test_first_and_last_steps_move_the_weights():
  config = schedule()
  assert lr_factor(0, config) == 50 / 1_000
  assert lr_factor(10_000 - BATCH, config) > 0


def test_sustain_is_exactly_the_peak():
  config = schedule()
  assert {lr_factor(t, config) for t in range(1_000, 7_900, BATCH)} == {1.0}


@pytest.mark.parametrize(
  ("decay", "at_quarter"), [("linear", 0.75), ("sqrt", 0.5)], ids=["linear", "sqrt"]
)
def test_decay_at_a_quarter(decay, at_quarter):
  config = schedule(decay=decay, final_ratio=0.1)
  tokens = 8_000 + 500 - BATCH // 2
  assert lr_factor(tokens, config) == pytest.approx(0.1 + 0.9 * at_quarter, abs=1e-12)


def test_no_warmup_and_no_decay_is_constant():
  config = schedule(warmup_tokens=0, decay_tokens=0)
  assert {lr_factor(t, config) for t in range(0, 20_000, BATCH)} == {1.0}


def test_beyond_the_end_stays_at_the_final_ratio():
  assert lr_factor(50_000, schedule(final_ratio=0.25)) == 0.25


def test_rates_sum_to_the_area_under_the_curve():
  """A linear warm-up and decay to 0 are two triangles beside the plateau; any batch size agrees."""
  for batch in (10, 100, 500):
    config = schedule(batch_tokens=batch, decay="linear")
    area = sum(lr_factor(t, config) * batch for t in range(0, 10_000, batch))
    assert area == pytest.approx(1_000 / 2 + 7_000 + 2_000 / 2, rel=1e-12)


@given(
  tokens=st.integers(0, 200_000),
  warmup=st.integers(0, 50_000),
  decay_tokens=st.integers(0, 50_000),
  decay=st.sampled_from(["linear", "sqrt"]),
  final=st.floats(0, 1),
)
def test_formula(tokens, warmup, decay_tokens, decay, final):
  total = 100_000
  config = schedule(
    total_tokens=total,
    warmup_tokens=warmup,
    decay_tokens=decay_tokens,
    decay=decay,
    final_ratio=final,
  )
  factor = lr_factor(tokens, config)
  t = tokens + BATCH / 2
  assert min(final, BATCH / 2 / max(warmup, BATCH)) <= factor <= 1
  if t < warmup:
    assert factor == t / warmup
  elif t <= total - decay_tokens or decay_tokens == 0:
    assert factor == 1
  else:
    x = min(1, (t - (total - decay_tokens)) / decay_tokens)
    g = {"linear": 1 - x, "sqrt": 1 - math.sqrt(x)}[decay]
    assert factor == pytest.approx(final + (1 - final) * g, abs=1e-12)


@pytest.mark.faults
@pytest.mark.parametrize("total", [3071, 3072, 4095, 4096])
def test_the_last_step_is_in_the_decay(total):
  """The schedule ends with the last token trained, whatever is left over."""
  config = schedule(
    total_tokens=total, batch_tokens=1024, decay_tokens=1024, warmup_tokens=0, decay="linear"
  )
  assert lr_factor((total // 1024 - 1) * 1024, config) == 0.5


@pytest.mark.faults
@given(
  batch=st.integers(1, 5000),
  steps=st.integers(2, 50),
  rest=st.integers(0, 4999),
  share=st.floats(0, 1),
)
def test_what_is_left_over_changes_no_rate(batch, steps, rest, share):
  exact = schedule(
    total_tokens=steps * batch,
    batch_tokens=batch,
    warmup_tokens=0,
    decay_tokens=int(share * steps * batch),
  )
  over = dataclasses.replace(exact, total_tokens=steps * batch + rest % batch)
  for step in range(steps):
    assert lr_factor(step * batch, over) == lr_factor(step * batch, exact)


@pytest.mark.faults
@given(
  batch=st.integers(1, 300),
  steps=st.integers(1, 40),
  rest=st.integers(0, 299),
  warm=st.floats(0, 1),
  decay=st.floats(0, 1),
)
def test_phases_are_the_steps_that_the_factors_say(batch, steps, rest, warm, decay):
  """Against a walk over every step."""
  trained = steps * batch
  warmup = int(warm * trained)
  config = schedule(
    total_tokens=trained + rest % batch,
    batch_tokens=batch,
    warmup_tokens=warmup,
    decay_tokens=int(decay * (trained - warmup)),
  )
  walk = {"warm-up": [], "sustain": [], "decay": []}
  for step in range(steps):
    middle = (step + 0.5) * batch
    factor = lr_factor(step * batch, config)
    if middle < config.warmup_tokens:
      walk["warm-up"].append(factor)
    elif middle > trained - config.decay_tokens:
      walk["decay"].append(factor)
    else:
      walk["sustain"].append(factor)
  found = {p.name: (p.steps, p.first, p.last) for p in rate_phases(config)}
  assert found == {name: (len(f), f[0], f[-1]) for name, f in walk.items() if f}


@pytest.mark.faults
def test_what_is_rounded_is_said():
  exact = {"schedule.total_tokens": 1228800, "schedule.warmup_tokens": 81920}
  even = exact | {"data.val_tokens": 2 * BASE.data.seq_len, "train.checkpoint_every": 300}
  assert remarks(changed(BASE, even)) == []
  odd = {
    "schedule.total_tokens": 1228801,
    "schedule.warmup_tokens": 6144,
    "data.val_tokens": 2 * BASE.data.seq_len + 1,
    "train.checkpoint_every": 301,
  }
  total, warmup, val, checkpoints = remarks(changed(BASE, odd))
  assert "300 · 4,096 and 1 token more, too few for a step" in total
  assert "1,228,800 and 1,232,896" in total
  assert warmup == "schedule.warmup_tokens = 6,144 is 1.50 batches of 4,096: no step ends there"
  assert f"rounded to {2 * BASE.data.seq_len:,}, 2 windows" in val
  assert checkpoints == "train.checkpoint_every = 301 is never reached in 300 steps"
