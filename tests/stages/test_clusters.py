"""What Slurm and a JobSet are given, and what their clients answer."""

import hashlib
import io
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from labs import write_variant
from rich.console import Console

from nmoe.config.file import changed
from nmoe.errors import ConfigError, RunError
from nmoe.records.attempts import History
from nmoe.records.root import Root
from stages.launch import jobset, slurm
from stages.prod import hosts, launching

DATA = Path(__file__).parents[1] / "data"


def two_hosts(lab, engine: str, **values):
  """A configuration over two hosts of eight GPUs."""
  gpus = {"target.arch": "sm_90a", "target.dtype": "bf16", "launch.ranks": 16, "rdep.group": 4}
  gpus |= {"launch.ranks_per_node": 8, "schedule.batch_tokens": 16 * 512, "launch.engine": engine}
  gpus |= {"schedule.warmup_tokens": 0, "schedule.decay_tokens": 0}  # labs' are of smaller batches
  gpus |= {"schedule.total_tokens": 160 * 512}
  return changed(lab.config, gpus | {key.replace("__", "."): v for key, v in values.items()})


def test_the_batch_script_is_the_golden_one(lab, monkeypatch):
  monkeypatch.setattr(slurm, "REPO", Path("/opt/nmoe"))
  config = two_hosts(lab, "slurm", slurm__partition="gpu", slurm__time_limit_s=3600)
  text = slurm.script(config, "RUN", Path("/data"), "/opt/nmoe/bin/python")
  assert text == (DATA / "job.sbatch").read_text()
  assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
  cpu = changed(lab.config, {"launch.engine": "slurm"})
  check = slurm.script(config, "RUN", Path("/data"), "/opt/nmoe/bin/python", preflight=True)
  assert "ATTEMPT=0" in check and "prod begin" not in check and 'requeue "' not in check
  assert subprocess.run(["bash", "-n"], input=check, text=True).returncode == 0
  assert "gpus-per-node" not in slurm.script(cpu, "RUN", Path("/data"))


@pytest.mark.faults
def test_a_job_whose_attempt_cannot_begin_starts_no_host(lab, tmp_path, monkeypatch):
  """Such as one that Slurm queues again, for a lost node, when its run is completed: what `begin`
  says is the last word, and the job is not queued once more.
  """
  said = "error: run RUN is completed"
  stubs = {
    "python": f"echo {said} >&2; exit 1",
    "scontrol": "echo a",
    "srun": f"touch {tmp_path}/ran",
  }
  for name, body in stubs.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
  config = changed(lab.config, {"launch.engine": "slurm"})
  text = slurm.script(config, "RUN", lab.root, str(tmp_path / "python"))
  told = {"env": {"PATH": f"{tmp_path}:/bin:/usr/bin", "SLURM_JOB_ID": "7"}, "capture_output": True}
  done = subprocess.run(["bash", "-c", text], text=True, **told)
  assert (done.returncode, done.stderr.strip()) == (76, said)
  assert not (tmp_path / "ran").exists()


def test_the_jobset_is_the_golden_one(lab):
  image = "registry.example/nmoe@sha256:" + "0" * 64
  config = two_hosts(lab, "jobset", jobset__image=image)
  assert jobset.text(config, "RUN", Path("/data"), 3) == (DATA / "jobset.json").read_text()
  for tag in ("", "nmoe:latest"):
    with pytest.raises(ConfigError, match="must name an image by its digest"):
      jobset.document(two_hosts(lab, "jobset", jobset__image=tag), "RUN", Path("/data"), 1)


def test_experts_do_not_lie_over_hosts(lab):
  with pytest.raises(ConfigError, match=r"rdep.group = 0 of ranks on several hosts"):
    two_hosts(lab, "slurm", rdep__group=0, moe__num_experts=16)
  with pytest.raises(ConfigError, match="does not divide launch.ranks 16"):
    two_hosts(lab, "slurm", launch__ranks_per_node=6)


@pytest.mark.parametrize(
  ("said", "status"), [("echo 17", 0), ("echo no such partition >&2; exit 1", 1)]
)
def test_what_sbatch_says(tmp_path, monkeypatch, said, status):
  (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{said}\n")
  (tmp_path / "sbatch").chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
  if status == 0:
    assert slurm.submit(tmp_path / "job.sbatch") == "17"
  else:
    with pytest.raises(RunError, match="sbatch refused .*: no such partition"):
      slurm.submit(tmp_path / "job.sbatch")


def test_a_launch_for_slurm_is_generated_and_recorded(lab):
  file = write_variant(lab.file, "slurm", '[launch]\nengine = "slurm"\n')
  out = io.StringIO()
  assert launching.launch(file, Console(file=out), "a test", dry_run=True) == 0
  (path,) = (lab.root / "runs").glob("*/job.sbatch")
  assert "srun --kill-on-bad-exit=1" in out.getvalue()
  assert f"run {path.parent.name}; its logs: {Root(lab.root).logs(path.parent.name)}" in " ".join(
    out.getvalue().split()
  )
  assert Root(lab.root).logs(path.parent.name).is_dir()  # without it sbatch's job ends at once
  with closing(History(lab.root)) as reader:
    assert reader.artifacts(path.parent.name) == {
      str(path): hashlib.sha256(path.read_bytes()).hexdigest()
    }


@pytest.mark.faults
@pytest.mark.parametrize("engine", ["slurm", "jobset"])
def test_a_client_that_does_not_answer_is_an_error(lab, monkeypatch, engine):
  """A scheduler that hangs: one clear error, and no traceback."""

  def late(command, **_):
    raise subprocess.TimeoutExpired(command, 60)

  monkeypatch.setattr(subprocess, "run", late)
  with pytest.raises(RunError, match="did not answer within 60 s"):
    hosts.job_of(changed(lab.config, {"launch.engine": engine}), "run")
