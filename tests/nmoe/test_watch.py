"""The guard, the load's health, the phases' clock, the progress line."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.distributed.parallel import Parallel
from nmoe.errors import DivergedError
from nmoe.train import clock
from nmoe.train.clock import Clock
from nmoe.train.progress import Progress
from nmoe.train.watch import Watch, load_values


class Session:
  """What a Watch asks of a session, of one rank on the cpu."""

  def __init__(self, config):
    self.config, self.stop, self.parallel = config, False, Parallel()


def a_watch(lab) -> Watch:
  made = Watch.__new__(Watch)
  made.session, made.config, made.total = Session(lab.config), lab.config, 12
  made.bad_step = torch.full((), -1, dtype=torch.int64)
  return made


def test_guard_gives_the_clip_factor(lab):
  guard = a_watch(lab).guard
  assert float(guard(3, torch.tensor(2.0), torch.tensor(0.5))) == 1.0
  assert float(guard(3, torch.tensor(2.0), torch.tensor(4.0))) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_guard_stops_at_the_first_value_that_is_not_finite(lab, bad, where):
  values = {"loss": 2.0, "norm": 0.5} | {where: bad}
  with pytest.raises(DivergedError, match="step 8: .*Lower the learning rates"):
    a_watch(lab).guard(7, torch.tensor(values["loss"]), torch.tensor(values["norm"]))


def test_guard_without_the_host(lab, monkeypatch):
  """Where the host does not look, the factor is NaN from the first bad step on."""
  found = a_watch(lab)
  looked, check = [], found.check
  monkeypatch.setattr(found, "check", looked.append)
  ok, bad = torch.tensor(1.0), torch.tensor(math.inf)
  factors = [float(found.guard(step, ok, bad if step in (2, 4) else ok)) for step in range(6)]
  assert [math.isnan(f) for f in factors] == [False, False, True, True, True, True]
  assert looked == [-1, -1, 2, 2, 2, 2]
  with pytest.raises(DivergedError, match="step 3:"):
    check(int(found.bad_step))


counts = st.lists(st.integers(0, 5000), min_size=2, max_size=64).filter(sum)


@given(counts)
def test_load_values_are_those_of_the_definitions(count):
  """NumPy in float64; a layer of 0 tokens aside, which no step has."""
  values = load_values(torch.tensor([count]), [0.25])
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
  values = load_values(torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2]]), [1.0, 0.0])
  assert (values["moe/0/load_max_over_mean"], values["moe/1/load_max_over_mean"]) == (4.0, 1.0)
  assert (values["moe/0/dead"], values["moe/1/dead"]) == (3.0, 0.0)
  assert (values["moe/0/entropy"], values["moe/1/entropy"]) == (0.0, pytest.approx(1.0))
  assert load_values(torch.empty(0, 4), []) == {}


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


def test_progress_is_a_line_of_json(lab):
  reader, writer = os.pipe()
  found = a_watch(lab)
  found.session.progress = Progress(writer)
  found._progress(3, {"train/loss": 2.5, "train/tokens_per_s": 100.0})
  line = os.read(reader, 1000).decode()
  told = {"step": 3, "total": 12, "loss": 2.5, "tokens_per_s": 100.0}
  assert json.loads(line) == told | {"left_s": 9 * 512 / 100}
  assert line.endswith("}\n") and not found.session.stop
  os.close(reader)
  found._progress(4, {"train/loss": 2.5, "train/tokens_per_s": 100.0})
  assert found.session.stop
  os.close(writer)
