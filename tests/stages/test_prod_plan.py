"""`nmoe prod plan`: Young's interval, sizes against a written checkpoint, where a speed is from."""

import io
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from roots import start_run

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.config.parameters import checkpoint_bytes
from nmoe.errors import ConfigError
from nmoe.records import checkpoint
from nmoe.records.attempts import Attempts
from nmoe.records.experiments import Experiments
from nmoe.records.goodput import production
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Hypothesis
from nmoe.records.root import Root
from stages.prod import launching, status
from stages.prod.attempt import begin
from stages.prod.plan import plan, show

REPO = Path(__file__).parents[2]
PROD = sorted((REPO / "configs/prod").glob("*.toml"))


def on_gpus(nodes: int, root: Path):
  """A production configuration of eight GPUs a host, its batch grown with them."""
  config = configs.load(REPO / "configs/prod/moonlight-64xh100.toml", env={})
  values = {"launch.ranks": 8 * nodes, "rdep.group": 8, "run.root": str(root)}
  return changed(config, values | {"schedule.batch_tokens": 524288 * nodes})


@pytest.mark.parametrize(
  ("nodes", "hours", "minutes"), [(8, 462, 68), (64, 58, 24), (256, 14.4, 12)]
)
def test_youngs_interval(tmp_path, nodes, hours, minutes):
  """sqrt(2 · 5 s · MTTF) at 6.5 failures in 1,000 days of a host, worked out by hand."""
  found = plan(on_gpus(nodes, tmp_path), tmp_path / "c.toml")
  assert found.mttf.value / 3600 == pytest.approx(hours, rel=0.01)
  assert found.interval_s / 60 == pytest.approx(minutes, rel=0.02)
  assert found.interval_steps == round(found.interval_s / found.step_s)
  best = found.share(found.interval_s)  # the optimum of what it costs
  assert best > found.share(1.3 * found.interval_s) and best > found.share(found.interval_s / 1.3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_is_that_of_a_written_checkpoint(lab, optimizer):
  run = lab.record(optim__matrices=optimizer, optim__experts=optimizer)
  assert lab.attempt(run) == 0
  folder = Root(lab.root).checkpoints(run)
  stored = checkpoint.read(folder / f"step_{checkpoint.steps(folder)[-1]:08d}")
  small = ("optimizer.steps", ".bias")
  size = sum(
    one.numel() * one.dtype.itemsize for name, one in stored.items() if not name.endswith(small)
  )
  config = changed(lab.config, {"optim.matrices": optimizer, "optim.experts": optimizer})
  assert checkpoint_bytes(config) == size


def test_speed_and_stall_are_measured_ones(lab):
  """Of a run of the same model and ranks; with none, a CPU's is not known, a GPU's is assumed."""
  unknown = plan(lab.config, lab.file)
  assert unknown.rate is None and unknown.interval_steps == 0
  run = lab.record(experiment__name="other")
  lab.record(launch__threads=3)
  records = Experiments(lab.root)
  records.update_run(run, status="completed", results={"train/tokens_per_s": 1000.0})
  records.close()
  metrics = Metrics(lab.root, run)
  for step, seconds in ((3, 0.1), (6, 0.4), (9, 0.2)):
    metrics.add(step, step, {"checkpoint/stall_s": seconds})
  metrics.flush()
  found = plan(lab.config, lab.file)
  assert found.rate.value == 1000.0 and run in found.rate.source
  assert found.stall.value == 0.2 and found.step_s == 0.512
  assert plan(lab.config, lab.file, 500.0).step_s == 1.024
  other = changed(lab.config, {"model.dim": 64})
  assert plan(other, lab.file).rate is None


def test_failures_are_those_of_an_earlier_launch(lab):
  """On half as many hosts half as often; `status` says what interval they ask for."""
  values = {"launch.ranks": 2, "schedule.batch_tokens": 1024, "schedule.warmup_tokens": 0}
  values |= {"schedule.decay_tokens": 0, "rdep.group": 1, "train.checkpoint_every": 2}
  one_host = changed(lab.config, values)
  two_hosts = changed(one_host, {"launch.ranks_per_node": 1, "launch.engine": "slurm"})
  assert "6.5 failures in 1,000 days of a host" in plan(one_host, lab.file).mttf.source
  with closing(Attempts(lab.root)) as records:
    experiment = records.create("prod", "prod", (Hypothesis("It trains.", "val/bpb", "none", 0.0),))
    run = start_run(records, experiment.id, "production", 0, toml=configs.to_toml(two_hosts))
    number = begin(lab.root, run.id, "slurm", nodes=["a", "b"])
    for step in (0, 0, 4):
      records.started(run.id, number, step, "a")
    rows = Metrics(lab.root, run.id)
    rows.add(4, 4096, {"train/loss": 1.0, "checkpoint/stall_s": 0.2})
    rows.flush()
    records.update_run(run.id, status="interrupted", results={"train/tokens_per_s": 1000.0})
    records.end(run.id, number, outcome="crashed", exit_status=75, step=4)
  mttf_s = production(lab.root, run.id).mttf_s
  found = plan(one_host, lab.file)
  assert found.mttf.value == pytest.approx(2 * mttf_s) and mttf_s > 0
  assert found.mttf.source == f"3 failures of run {run.id}"
  assert found.interval_s == pytest.approx((2 * 0.2 * 2 * mttf_s) ** 0.5)
  out = io.StringIO()
  status.status(run.id, lab.root, Console(file=out, width=200))
  assert "3 failures, one in 0:00:0" in out.getvalue()
  assert "by Young's formula train.checkpoint_every = " in out.getvalue()


@pytest.mark.parametrize("path", PROD, ids=lambda path: path.stem)
def test_every_configuration_plans(path, monkeypatch, tmp_path):
  monkeypatch.setenv("NMOE_ROOT", str(tmp_path / "root"))
  out = io.StringIO()
  found = show(path, Console(file=out, width=160))
  assert [one.what for one in found.evidence if one.lack][-1] == "prod-check"
  assert "storage rate" in out.getvalue() and not (tmp_path / "root").exists()
  assert "6.5 failures in 1,000 days of a host" in out.getvalue()  # also where no rate is known


def test_a_plan_needs_no_torch(tmp_path):
  code = (
    "import sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
    "from stages.prod.plan import show\n"
    f"show(Path({str(PROD[0])!r}), Console())\nassert 'torch' not in sys.modules"
  )
  env = {"NMOE_ROOT": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)}
  subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=REPO, timeout=60)


def test_a_launch_that_saves_nothing_is_told_the_interval(tmp_path, monkeypatch):
  monkeypatch.setenv("NMOE_ROOT", str(tmp_path / "root"))
  file = tmp_path / "never.toml"
  file.write_text(f'extends = "{PROD[1]}"\n[train]\ncheckpoint_every = 0\n')
  with pytest.raises(ConfigError, match=r"set train.checkpoint_every = 955, 67.9 min by Young"):
    launching.launch(file, Console(file=io.StringIO()))
