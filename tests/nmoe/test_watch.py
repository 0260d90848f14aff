"""The guard, the load's health, the phases' clock, what is logged and told."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.errors import DivergedError
from nmoe.train import clock
from nmoe.train import loop as train
from nmoe.train.clock import Clock
from nmoe.train.guard import Guard
from nmoe.train.progress import Progress
from nmoe.train.watch import StepValues, Watch, load_values


@pytest.fixture
def guard() -> Guard:
  return Guard(1.0, torch.device("cpu"))


def test_guard_gives_the_clip_factor(guard):
  assert float(guard.factor(3, torch.tensor(2.0), torch.tensor(0.5))) == 1.0
  assert float(guard.factor(3, torch.tensor(2.0), torch.tensor(4.0))) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_guard_stops_at_the_first_value_that_is_not_finite(guard, bad, where):
  values = {"loss": 2.0, "norm": 0.5} | {where: bad}
  with pytest.raises(DivergedError, match="step 8: .*Lower the learning rates"):
    guard.factor(7, torch.tensor(values["loss"]), torch.tensor(values["norm"]))


def test_guard_without_the_host(guard, monkeypatch):
  """Where the host does not look, the factor is NaN from the first bad step on."""
  looked, check = [], guard.check
  monkeypatch.setattr(guard, "check", looked.append)
  ok, bad = torch.tensor(1.0), torch.tensor(math.inf)
  factors = [float(guard.factor(step, ok, bad if step in (2, 4) else ok)) for step in range(6)]
  assert [math.isnan(f) for f in factors] == [False, False, True, True, True, True]
  assert looked == [-1, -1, 2, 2, 2, 2]
  with pytest.raises(DivergedError, match="step 3:"):
    check(int(guard.bad_step))


counts = st.lists(st.integers(0, 5000), min_size=2, max_size=64).filter(sum)


@given(counts)
def test_load_values_are_those_of_the_definitions(count):
  """NumPy in float64; a layer of 0 tokens aside, which no step has."""
  values = load_values(torch.tensor([count]), torch.tensor([[0.5, *[0.25] * (len(count) - 1)]]))
  load = np.array(count) / np.mean(count)
  share = np.array(count) / np.sum(count)
  entropy = -sum(p * math.log(p) for p in share if p) / math.log(len(count))
  want = {
    "load_max_over_mean": load.max(),
    "load_p05": np.percentile(load, 5),
    "load_p50": np.percentile(load, 50),
    "load_p95": np.percentile(load, 95),
    "dead": float(sum(load < 0.01)),
    "entropy": entropy,
    "bias_range": 0.25,
  }
  assert values == pytest.approx({f"moe/0/{k}": v for k, v in want.items()}, rel=1e-9, abs=1e-12)


def test_load_values_of_every_layer():
  values = load_values(torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2]]), torch.eye(2, 4))
  assert (values["moe/0/load_max_over_mean"], values["moe/1/load_max_over_mean"]) == (4.0, 1.0)
  assert (values["moe/0/dead"], values["moe/1/dead"]) == (3.0, 0.0)
  assert (values["moe/0/entropy"], values["moe/1/entropy"]) == (0.0, pytest.approx(1.0))
  assert load_values(torch.empty(0, 4), torch.empty(0, 4)) == {}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 100)), max_size=20))
def test_phases_add_up_to_the_time_that_passed(stretches):
  now = 50.0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(clock.time, "perf_counter", lambda: now)
    timer, want = Clock(torch.device("cpu")), {"step": 0.0}
    for phase, seconds in stretches:
      timer.start(phase)
      now += seconds
      want[phase] = want.get(phase, 0.0) + seconds
    found = timer.read()
    assert found == pytest.approx(want)
    assert sum(found.values()) == pytest.approx(now - 50.0)
    now += 3.0
    last = stretches[-1][0] if stretches else "step"
    assert timer.read() == {last: pytest.approx(3.0)}


def test_what_is_logged_and_told(lab, guard):
  """The values of a step, by their definitions; a launcher that is gone stops the run."""
  reader, writer = os.pipe()
  session = lab.session(lab.record(), progress=Progress(writer))
  state = train.build(session.config, session.target, session.parallel)
  state.step, state.tokens = 3, 3 * 512
  watch = Watch(session, 1, Clock(session.target.device), guard)
  norms = {"all": torch.tensor(0.5), "dense": torch.tensor(0.25)}
  loss_T, target_BS = torch.tensor([2.0, 4.0, 7.0]), torch.tensor([[101, 102, 256]])
  count_LE = torch.tensor([[4, 2, 1, 1]])
  values = StepValues(0.5, torch.tensor(2.5), norms, count_LE, loss_T, target_BS, 0.125)
  watch.log(state, values)
  logged = {tag: float(v[-1]) for tag, (_, _, v) in session.metrics.read().items()}
  assert logged["train/loss"] == 2.5 and logged["grad_norm/dense"] == 0.25
  assert logged["train/bpb"] == pytest.approx((2 + 4) / 2 / math.log(2))  # a separator has no bytes
  assert logged["lr/dense"] == session.config.optim.dense_lr / 2
  assert logged["data/wait_s"] == 0.125 and logged["moe/0/load_max_over_mean"] == 2.0
  told = json.loads(os.read(reader, 1000))
  rate = logged["train/tokens_per_s"]
  assert told == {
    "step": 3,
    "total": session.config.steps,
    "loss": 2.5,
    "tokens_per_s": pytest.approx(rate),
    "left_s": pytest.approx((session.config.steps - 3) * 512 / rate),
  }
  assert not session.stop
  os.close(reader)
  state.step, state.tokens = 4, 4 * 512
  watch.log(state, values)
  assert session.stop
  os.close(writer)
