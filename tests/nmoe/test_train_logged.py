"""What a run logs: every tag, times that add up, the loads of every expert."""

import time
from itertools import pairwise

import numpy as np
import pytest

from nmoe.records import checkpoint, metrics
from nmoe.records.live import Live
from nmoe.records.metrics import COUNT
from nmoe.train.clock import Clock
from nmoe.train.startup import PHASES as STARTUP

PHASES = ("load", "forward", "backward", "clip", "step", "log")
MOE = ("load_max_over_mean", "load_p05", "load_p50", "load_p95", "dead", "entropy", "bias_range")
TAGS = {
  *("train/loss", "train/bpb", "train/tokens_per_s", "train/flops_per_token", "train/mfu"),
  "data/wait_s",
  *("lr/dense", "lr/router", "lr/expert", "memory/peak_bytes", "val/loss", "val/bpb"),
  *(f"grad_norm/{group}" for group in ("all", "dense", "router", "expert")),
  *(f"time/{phase}_s" for phase in PHASES),
  *(f"moe/0/{name}" for name in MOE),
  *(f"startup/{phase}_s" for phase in STARTUP),
}


def test_every_tag_is_logged(lab):
  run = lab.record(train__eval_every=2)
  assert lab.attempt(run) == 0
  series = metrics.read(lab.root, run)
  assert series.keys() == TAGS | {"time/eval_s", "time/checkpoint_s", "checkpoint/stall_s"}
  steps, tokens, loss = series["train/loss"]
  assert tokens.tolist() == [step * 512 for step in steps]
  assert series["val/loss"][0].tolist() == [2, 4, 6, 8, 10, 12]
  assert loss[-1] < loss[0] - 0.5
  assert series["lr/dense"][2].max() == pytest.approx(1e-2)
  assert all(series[f"startup/{phase}_s"][0].tolist() == [steps[0]] for phase in STARTUP)


def test_phases_add_up(lab, monkeypatch):
  """Between two logs, the phases' times sum to the wall clock's."""
  marks, read = [], Clock.read

  def timed(self):
    marks.append(time.perf_counter())
    return read(self)

  def written(writer, *args):
    start(writer, *args)
    writer.wait()

  start = checkpoint.Writer.start
  monkeypatch.setattr(checkpoint.Writer, "start", written)  # no thread beside the clock
  monkeypatch.setattr(Clock, "read", timed)
  run = lab.record(train__eval_every=4, train__log_every=2)
  assert lab.attempt(run) == 0
  series = metrics.read(lab.root, run)
  told = dict.fromkeys(series["train/loss"][0].tolist(), 0.0)
  for tag, (steps, _, values) in series.items():
    if tag.startswith("time/"):
      for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        told[step] += value
  walls = [after - before for before, after in pairwise(marks[: len(told)])]  # then the results'
  assert list(told.values())[1:] == pytest.approx(walls, abs=5e-3)
  assert lab.run(run).results["wall_s"] == pytest.approx(sum(told.values()), rel=0.5)


def test_speed_leaves_evaluations_out(lab):
  run = lab.record(train__eval_every=1, train__checkpoint_every=1)
  assert lab.attempt(run) == 0
  series = {tag: values for tag, (_, _, values) in metrics.read(lab.root, run).items()}
  seconds = sum(series[f"time/{phase}_s"] for phase in PHASES)
  assert series["train/tokens_per_s"] == pytest.approx(512 / seconds)
  median = float(np.median(series["train/tokens_per_s"]))
  assert lab.run(run).results["train/tokens_per_s"] == median


def test_the_loads_of_every_expert_are_logged_and_are_those_of_the_health_tags(lab, tmp_path):
  run = lab.record()
  assert lab.attempt(run) == 0
  steps, counts = Live(lab.root, tmp_path / "cache").file(run).experts(0, COUNT, 1000)
  logged = dict(lab.logged(run)["moe/0/load_max_over_mean"])
  assert steps.tolist() == list(logged)
  c = lab.config
  np.testing.assert_array_equal(counts.sum(1), c.schedule.batch_tokens * c.moe.top_k)
  np.testing.assert_allclose(counts.max(1) / counts.mean(1), list(logged.values()))
