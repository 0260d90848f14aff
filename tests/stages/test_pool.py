"""Slots and workers: the same bits as a process a run, crashes that cost one run, fair turns."""

import io
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from labs import same_bits
from rich.console import Console

from nmoe.config.file import changed
from nmoe.errors import ConfigError, RunError
from nmoe.records.metrics import read
from nmoe.records.reader import Hypothesis
from nmoe.train.progress import FAILED_FOR_GOOD
from stages import runs
from stages.launch import local as launch
from stages.launch import pool
from stages.launch.local import Job, Launcher
from stages.launch.pool import Pool, slots
from stages.runs import Work, turns
from stages.workbench import Arm, Workbench


def execute(used: Pool, job: Job, follow=lambda _: None):
  """A job to its end, in the first free slot."""
  slot = used.free()
  handle = slot.handle = slot.begin(job, follow)
  while handle not in used.ended():
    pass
  return handle


def test_a_worker_computes_the_same_bits_as_a_process_of_its_own(lab):
  """Three runs through one worker, the first of other weights; then what each alone computes."""
  config = {1: lab.config, 2: changed(lab.config, {"optim.matrices": "muon"})}
  through = [lab.record(train__seed=7), lab.record(), lab.record(optim__matrices="muon")]
  with Pool(Launcher(lab.root), [""]) as used:
    for run in through:
      assert execute(used, Job(run, lab.config)).poll() == 0
    pids = {lab.run(run).pid for run in through}
  assert len(pids) == 1
  for number, run in enumerate(through):
    if number == 0:
      continue
    alone = lab.record(**({} if number == 1 else {"optim__matrices": "muon"}))
    assert launch.run(Launcher(lab.root), Job(alone, config[number])).poll() == 0
    assert same_bits(lab.state(run), lab.state(alone))
    assert lab.logged(run) == lab.logged(alone)
  assert not Path(f"/proc/{pids.pop()}").exists()


def test_a_worker_starts_a_run_in_no_time(lab):
  """torch is imported once: start-up of the second run is less than half of the first's."""
  runs = [lab.record(), lab.record(train__seed=1)]
  with Pool(Launcher(lab.root), [""]) as used:
    for run in runs:
      execute(used, Job(run, lab.config))
  first, second = (startup_s(lab.root, run) for run in runs)
  assert second < first / 2


def startup_s(root, run) -> float:
  found = read(root, run)
  return sum(
    float(values[0]) for tag, (_, _, values) in found.items() if tag.startswith("startup/")
  )


def test_a_crash_costs_the_worker_and_that_run(lab):
  """The next run has a new worker; what the killed one leaves is resumable."""
  victim, other = lab.record(), lab.record(train__seed=1)
  with Pool(Launcher(lab.root), [""]) as used:
    handle = execute(
      used, Job(victim, lab.config), lambda _: os.kill(lab.run(victim).pid, signal.SIGKILL)
    )
    assert handle.poll() == -signal.SIGKILL
    assert handle.failure == "rank 0 of 1 was killed by SIGKILL"
    assert execute(used, Job(other, lab.config)).poll() == 0
  lab.records.mark_interrupted()
  assert lab.run(victim).status == "interrupted" and lab.run(other).status == "completed"
  assert lab.run(victim).pid != lab.run(other).pid


def test_a_run_that_fails_costs_its_worker_too(lab):
  """It told its error; what it left in the process is gone with it."""
  bad, good = lab.record(optim__dense_lr=1e30), lab.record()
  with Pool(Launcher(lab.root), [""]) as used:
    assert execute(used, Job(bad, lab.config)).poll() == FAILED_FOR_GOOD
    assert execute(used, Job(good, lab.config)).poll() == 0
  assert lab.run(bad).status == "failed" and "not finite" in lab.run(bad).error
  assert lab.run(bad).pid != lab.run(good).pid


def test_a_pool_left_in_the_middle_leaves_nobody(lab):
  run = lab.record(schedule__total_tokens=4000 * 512)
  seen = []
  with pytest.raises(ValueError), Pool(Launcher(lab.root), [""]) as used:
    slot = used.free()
    slot.handle = slot.begin(Job(run, lab.config), seen.append)
    while not seen:
      used.ended()
    raise ValueError
  assert not Path(f"/proc/{lab.run(run).pid}").exists()


def a_study(lab, num_slots: int, metric: str = "val/loss"):
  """An experiment of two arms at work; both arms' runs take less than a second."""
  out = io.StringIO()
  bench = Workbench.open(str(lab.root), Console(file=out, width=200))
  config = changed(lab.config, {"launch.slots": num_slots})
  arms = [
    Arm("baseline", config, lab.data),
    Arm("variant", changed(config, {"optim.matrices": "muon"}), lab.data),
  ]
  claim = Hypothesis("It is better.", metric, "lower", 0.0)
  name, planned = f"pool-{num_slots}-{metric}", [bench.plan(arm) for arm in arms]
  experiment = bench.experiments.find_or_create(name, "ablate", (claim,), planned, range(2))
  return Work(bench, experiment), [(arm, seed) for seed in range(2) for arm in arms], out


def test_runs_side_by_side(lab):
  """Four runs in two slots: two at a time, two processes in all, in the order that was asked."""
  work, pairs, out = a_study(lab, 2)
  found = work.run_all(pairs)
  assert [(run.arm, run.seed) for run in found] == [(arm.name, seed) for arm, seed in pairs]
  assert sorted(Counter(run.pid for run in found).values()) == [2, 2]
  spans = [_span(lab.root, run.id) for run in found]
  assert any(a[0] < b[1] and b[0] < a[1] for i, a in enumerate(spans) for b in spans[:i])
  assert "baseline seed 0: step 1/12  loss" in out.getvalue()
  again, same, said = a_study(lab, 2)
  assert [run.id for run in again.run_all(same)] == [run.id for run in found]
  assert said.getvalue().count("reused") == 4


def _span(root, run: str) -> tuple[float, float]:
  files = sorted((root / "checkpoints" / run).glob("step_*"))
  return files[0].stat().st_mtime - 1.0, files[-1].stat().st_mtime


def test_speed_is_measured_in_processes_of_their_own(lab):
  work, pairs, _ = a_study(lab, 0, "train/tokens_per_s")
  found = work.run_all(pairs[:2])
  assert found[0].pid != found[1].pid


def test_a_crash_in_a_study_lets_the_others_end(lab, monkeypatch):
  work, pairs, _ = a_study(lab, 2)
  killed = []
  follow = runs.Line.follow

  def kill(self, entry):
    follow(self, entry)
    if self.label == "baseline seed 0" and not killed:
      killed.append(entry)
      run = next(r for r in work.bench.experiments.runs(work.experiment.id) if r.arm == "baseline")
      os.kill(run.pid, signal.SIGKILL)

  monkeypatch.setattr(runs.Line, "follow", kill)
  with pytest.raises(RunError, match=r"baseline seed 0\) stopped before its end") as caught:
    work.run_all(pairs)
  assert "rank 0 of 1 was killed by SIGKILL" in str(caught.value)
  states = Counter(run.status for run in work.bench.experiments.runs(work.experiment.id))
  assert states == {"completed": 3, "interrupted": 1}


def test_arms_take_turns_over_slots(lab):
  a, b = Arm("a", lab.config, lab.data), Arm("b", lab.config, lab.data)
  pairs = [(arm, seed) for seed in range(4) for arm in (a, b)]
  assert turns(pairs, 1) == pairs
  for num_slots in (2, 4):
    order = turns(pairs, num_slots)
    assert sorted(order, key=lambda p: (p[1], p[0].name)) == pairs
    at = Counter((n % num_slots, arm.name) for n, (arm, _) in enumerate(order))
    if num_slots == 2:
      assert set(at.values()) == {2} and len(at) == 4  # each arm twice in each slot
    first = [arm.name for n, (arm, _) in enumerate(order) if n % 4 == 0]
    assert first == ["a", "a"] or set(first) == {"a", "b"}


SMI = "GPU 0: NVIDIA H100 (UUID: x)\n  MIG 1g\nGPU 1: NVIDIA H100 (UUID: y)\nGPU 2: a\nGPU 3: b\n"


def test_slots(lab, monkeypatch):
  config, told = lab.config, {}
  monkeypatch.setattr(launch, "parent_environment", lambda: told)
  monkeypatch.setattr(pool.shutil, "which", lambda name: name)
  monkeypatch.setattr(pool.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": SMI}))

  def of(**values):
    return slots(changed(config, {k.replace("__", "."): v for k, v in values.items()}))

  assert of() == [""] and of(launch__slots=3) == [""] * 3
  gpu = {"target__arch": "sm_90a", "target__dtype": "bf16"}
  assert of(**gpu) == ["0", "1", "2", "3"]
  assert of(**gpu, launch__slots=1) == [""]
  assert of(**gpu, launch__ranks=2, schedule__batch_tokens=1024) == ["0,1", "2,3"]
  four = {"launch__ranks": 4, "schedule__batch_tokens": 2048, "schedule__warmup_tokens": 0}
  assert of(**gpu, **four) == [""]
  told["CUDA_VISIBLE_DEVICES"] = "6,7"
  assert of(**gpu) == ["6", "7"]
  told["CUDA_VISIBLE_DEVICES"] = ""
  assert of(**gpu) == [""]
  with pytest.raises(ConfigError, match=r"launch.slots = 3 runs of 1 rank need 3 GPUs; found 0"):
    of(**gpu, launch__slots=3)
  with pytest.raises(ConfigError, match="set launch.threads too"):
    of(launch__slots=2, launch__threads=0)
