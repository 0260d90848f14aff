"""`nmoe bench step`: its numbers against the metrics that it read them from."""

import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from labs import Lab, write_variant
from rich.console import Console

from nmoe.bench.loader import loader_rate
from nmoe.config import plan
from nmoe.errors import ConfigError, RunError
from nmoe.records import metrics
from nmoe.train.startup import process_age
from stages import runs
from stages.proofs import bench_step as bench


def call(lab: Lab, file: Path | None = None, **options) -> tuple[bench.StepBench, str]:
  out = io.StringIO()
  found = bench.step(file or lab.file, 40, Console(file=out, width=160), **options)
  return found, " ".join(out.getvalue().split())


def test_a_measurement(lab, launches):
  age = process_age()
  found, said = call(lab)
  run = lab.records.run(launches.ids[0])
  series = {tag: values for tag, (_, _, values) in metrics.read(lab.root, run.id).items()}
  assert found.steps == 38  # of 40, in stretches of two; the first is the warm-up
  assert found.phases_ms.keys() == {"load", "forward", "backward", "clip", "step", "log"}
  for phase, ms in found.phases_ms.items():
    assert ms == pytest.approx(series[f"time/{phase}_s"][1:] * 500)
  assert found.ms == pytest.approx(np.sum(list(found.phases_ms.values()), axis=0))
  assert found.tokens_per_s == pytest.approx(512e3 / np.median(found.ms))
  outside = np.add(found.phases_ms["load"], found.phases_ms["log"])
  assert found.outside == pytest.approx(np.median(outside / np.array(found.ms)))
  assert f"outside forward, backward and optimizer: {found.outside:.2%} of a step" in said
  assert sum(found.flops_terms.values()) == plan.plan(lab.config).flops_per_token
  assert found.mfu == pytest.approx(np.median(series["train/mfu"])) and 0 < found.mfu < 1
  assert found.peak_bytes > 1e8
  assert found.retries == 0 and "memory ran short" not in said and "waited" not in said
  out = io.StringIO()
  bench._show(replace(found, retries=4), Console(file=out, width=160))
  assert "memory ran short 4 times: torch waited for the GPU and freed its cache" in out.getvalue()
  assert not lab.checkpoints(run.id).exists()
  assert 0 < found.data_s < found.first_step_s - age < process_age() - age
  assert (
    f"step 1, the first logged: {found.first_step_s:.1f} s after the command's start, "
    f"{found.data_s:.1f} s of it for data"
  ) in said
  assert (lab.records.list()[0].stage, lab.records.list()[0].verdict) == ("bench", "measured")
  last = {tag: values[-1] for tag, values in series.items()}
  (uneven,) = [x for tag, x in last.items() if tag.endswith("/load_max_over_mean")]
  assert found.routing.startswith(
    "real, after 40 steps, 2 of them warm-up: the fullest expert has "
  )
  assert f"{uneven:.2f} to {uneven:.2f} times the mean" in found.routing and found.routing in said


@pytest.mark.parametrize(("steps", "kept"), [(3, 3), (64, 40)])
def test_the_warm_up_is_the_configuration_s(lab, steps, kept):
  """Cut to the measured steps; the lab's batch has 512 tokens, and logs are of each second step."""
  body = f"[schedule]\ntotal_tokens = 65536\nwarmup_tokens = {steps * 512}\n"
  _, said = call(lab, write_variant(lab.file, "warm", body))
  assert f"routing: real, after 40 steps, {kept} of them warm-up: " in said
  run = lab.records.runs(lab.records.list()[0].id)[0]
  first = metrics.read(lab.root, run.id)["lr/dense"][2][0]
  assert first == pytest.approx(1.5 / kept * lab.config.optim.dense_lr)  # of step 2's middle


def test_a_bench_is_of_one_host(lab):
  body = '[launch]\nengine = "slurm"\nranks = 4\nranks_per_node = 2\n[rdep]\ngroup = 2\n'
  file = write_variant(lab.file, "two", body + "[train]\nmicro_batch = 2\n")
  with pytest.raises(ConfigError, match="has 4 ranks on 2 hosts, .* a configuration of 2"):
    bench.step(file, 10, Console(file=io.StringIO()))


def test_a_benchmark_s_routing_is_no_real_one(lab):
  found, said = call(lab, write_variant(lab.file, "forced", "[moe]\nforced_balance = true\n"))
  assert found.routing == "forced balance" and "routing: forced balance MFU" in said


def test_a_phase_that_not_every_stretch_enters():
  """As with a CUDA graph, which takes the passes over from the second step on."""
  loss, forward, graph = np.array([5, 10, 20]), np.array([5]), np.array([10, 20])
  series = {
    "train/loss": (loss, loss, loss),
    "time/forward_s": (forward, forward, np.array([1.0])),
    "time/graph_s": (graph, graph, np.array([0.5, 2.0])),
    "time/clip_s": (forward + 5, forward, np.array([0.01])),
  }
  assert bench.phases_ms(series) == {"graph": [100, 200], "clip": [2, 0]}


def test_what_slows_steps_unseen_is_said(lab):
  """Of a fabricated GPU's metrics: passes that waited for counts, and memory that ran short."""
  at = np.array([5, 10, 20])
  tags = {"memory/retries": [3.0, 3.0, 7.0], "rdep/waiting_passes": [1.0, 6.0, 16.0]}
  tags |= {"moe/0/load_max_over_mean": [2.0] * 3, "moe/0/dead": [0.0] * 3}
  tags |= {"rdep/capacity_needed": [2.0, 1.6, 1.734], "rdep/full_passes": [1.0, 2.0, 4.0]}
  series = {tag: (at, at, np.array(values)) for tag, values in tags.items()}
  assert bench.retries_of(series) == 4 and bench.retries_of({}) == 0
  passes = lab.config.steps * lab.config.micro_batches
  said = (
    f"experts are dead; of {passes} forward passes 4 had more rows than rdep.capacity, 1.5, and 16 "
    "waited for counts: of the logged micro-batches the last needed 1.74, one 2.00"
  )
  assert bench.routing_of(lab.config, series).endswith(said)


def test_against_earlier_runs(lab, launches):
  """One run against one has no interval; several earlier ones have Student's, for one new run."""
  files = [lab.root / f"before-{i}.json" for i in range(3)]
  before, _ = call(lab, out=files[0])
  assert json.loads(files[0].read_text())["ms"] == before.ms
  for i, file in enumerate(files):
    file.write_text(json.dumps({"ms": [x + i for x in before.ms]}))
  after, said = call(lab, against=files[:1])
  delta = np.median(after.ms) - np.median(before.ms)
  assert (
    f"against before-0.json: {delta:+.3f} ms/step, {delta / np.median(before.ms):+.2%};" in said
  )
  assert "of one run each there is no interval" in said and "95 %" not in said
  after, said = call(lab, against=files)
  delta = np.median(after.ms) - np.median(before.ms) - 1
  half = 4.303 * 1.0 * math.sqrt(4 / 3)  # t(0.975, 2), sd of x, x + 1, x + 2
  found = re.search(r"95 % interval (\S+) to (\S+), 3 earlier runs", said)
  assert float(found[1]) == pytest.approx(delta - half, abs=2e-3)
  assert float(found[2]) == pytest.approx(delta + half, abs=2e-3)
  assert len(set(launches.ids)) == 3  # measured anew, never reused


def test_a_stretch_that_writes_a_profile_is_not_what_a_step_costs(lab):
  """On two H200s the profile was written for 25 s within one logged step of 1.3 s."""
  before, _ = call(lab, out=lab.root / "before.json")
  ms, log = [*before.ms], [*before.phases_ms["log"]]
  ms[7], log[7] = ms[7] + 25e3, log[7] + 25e3
  stalled = replace(before, ms=ms, phases_ms=before.phases_ms | {"log": log})
  assert abs(stalled.outside - before.outside) < 0.1 < stalled.phases_ms["log"][7] / sum(before.ms)
  (lab.root / "stalled.json").write_text(json.dumps({"ms": ms}))
  after, said = call(lab, against=[lab.root / "stalled.json"])
  delta = float(re.search(r"against stalled.json: (\S+) ms/step", said)[1])
  assert delta == pytest.approx(np.median(after.ms) - np.median(ms), abs=2e-3)


def test_of_equal_runs_the_interval_excludes_no_change_in_one_of_twenty():
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(2000):
    said = bench.change(100 + rng.normal(), (100 + rng.normal(size=5)).tolist(), "x")
    low, high = map(float, re.search(r"interval (\S+) to (\S+),", said).groups())
    inside += low <= 0 <= high
  assert 0.935 <= inside / 2000 <= 0.965


def test_the_first_line_counts_from_the_command(lab, monkeypatch):
  """Of a real child: before its other lines, and not from the child's own start."""
  seen = []
  execute = runs.Work.execute

  def follow(*arguments):
    *rest, lines = arguments
    return execute(*rest, lambda line: (lines(line), seen.append(process_age())))

  monkeypatch.setattr(runs.Work, "execute", follow)
  found, _ = call(lab)
  assert len(seen) == 20 and found.first_step == 2
  assert seen[0] - 0.1 < found.first_step_s <= seen[0] < seen[-1]
  assert list(found.startup_s) == ["imports", "kernels", "ranks_and_data", "model", "first_step"]
  assert all(seconds >= 0 for seconds in found.startup_s.values())
  in_child = sum(found.startup_s.values())
  assert found.startup_s["imports"] > 0.5 * in_child  # torch's, against a model of a few thousand
  assert 0 < found.first_step_s - found.data_s - in_child < found.first_step_s - in_child


def test_the_age_of_a_process():
  """Against the time at which another process started it."""
  code = (
    "import time; from nmoe.train.startup import process_age; time.sleep(0.2);"
    "print(process_age(), time.monotonic())"
  )
  begun = time.monotonic()
  said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  age, now = map(float, said.stdout.split())
  assert 0.2 <= age < now - begun + 0.02
  assert age == pytest.approx(now - begun, abs=0.3)


def test_an_interrupted_measurement_does_not_claim_to_be_continued(lab, launches):
  launches.before = {0: lambda _: (_ for _ in ()).throw(KeyboardInterrupt)}
  with pytest.raises(RunError, match="before its end, the same command starts all runs anew: it"):
    call(lab)
  launches.before = {}
  call(lab)
  assert len(set(launches.ids)) == 2


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]"])
def test_against_what_is_no_measurement(lab, launches, text):
  file = lab.root / "before.json"
  file.write_text(text)
  with pytest.raises(ConfigError, match="before.json is not a measurement of `nmoe bench step"):
    call(lab, against=[file])
  assert launches.ids == []


def test_the_loader_alone(lab):
  c = lab.config
  assert loader_rate(lab.data, c.data.seq_len, c.train.seed, seconds=0.1) > 1e6
  assert bench.loader_rate(c, lab.data) > 1e6  # from a process of its own
