"""A production run on hosts that Slurm or a JobSet starts: generated, submitted; a host's agent."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing
from pathlib import Path

from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.records.attempts import Attempts, History
from nmoe.records.root import Root
from stages.launch import jobset, local, slurm


def generate(config: Config, run_id: str, root: Path, preflight: bool = False) -> Path:
  """Write what the run's engine takes into the run's folder, and its hash into the records.

  preflight: its ranks say whether their hosts are fit, and that is all.
  """
  folder = Root(root).prod(run_id)
  folder.mkdir(parents=True, exist_ok=True)
  Root(root).logs(run_id).mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its output
  with closing(Attempts(root)) as records:
    if config.launch.engine == "slurm":
      path, text = folder / "job.sbatch", slurm.script(config, run_id, root, preflight=preflight)
    else:
      first = records.following(run_id)
      path, text = folder / "jobset.json", jobset.text(config, run_id, root, first, preflight)
    path.write_text(text)
    records.artifact(run_id, path)
  return path


def job_of(config: Config, run_id: str) -> str:
  """The job that the engine has of a run, in words; "": none, or one that has ended. RunError."""
  if config.launch.engine == "jobset":
    return jobset.living(config, run_id)
  job = slurm.queued(run_id)
  return f"Slurm's job {job}" if job else ""


def withdrawn(config: Config, run_id: str) -> str:
  """How a job of a run that has not begun yet is taken back, in words; "": no engine has jobs."""
  commands = {
    "slurm": f"scancel --name={slurm.name(run_id)}",
    "jobset": f"kubectl --namespace {config.jobset.namespace} delete jobset {jobset.name(run_id)}",
  }
  command = commands.get(config.launch.engine, "")
  return f"; `{command}` takes a job back that waits" if command else ""


def submit(config: Config, run_id: str, path: Path, console: Console) -> None:
  """Hand what was generated to the engine's own client."""
  if config.launch.engine == "slurm":
    console.print(f"job {slurm.submit(path)}: {path}", markup=False, soft_wrap=True)
  else:
    jobset.create(config, run_id, path)
    console.print(f"created: {path}", markup=False, soft_wrap=True)


def node(run_id: str, root: Path, attempt: int, head: str, number: int) -> None:
  """Become the agent of this host. Does not return."""
  with closing(History(root)) as records:
    config = configs.loads(records.run(run_id).toml, f"run {run_id}", env={})
  place = ["--root", str(root), "--run", run_id, "--attempt", str(attempt)]
  place += ["--nodes", str(config.nodes), "--node", str(number), "--head", head]
  command = [sys.executable, "-P", "-m", "stages.launch.agent", *place]
  if number == 0:
    compile_first(config, root, Root(root).logs(run_id))
  os.execve(sys.executable, [*command, "--address", address(head)], environment(config, root))


def address(head: str) -> str:
  """By which the others reach this host: its own end of the way to the head, HOST:PORT."""
  if not head:
    return "127.0.0.1"
  host, _, port = head.rpartition(":")
  with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as way:
    try:
      way.connect((host, int(port)))  # sends nothing
    except OSError as error:
      raise RunError(
        f"{head}: the first host cannot be reached ({error}); see the network"
      ) from error
    return way.getsockname()[0]


def compile_first(config: Config, root: Path, logs: Path) -> None:
  """Fill the kernel cache once for all hosts: the head's agent, without which no rank starts on any
  host, comes after it. A failure stops nothing: ranks compile what they lack.
  """
  for compiler in local.compile_beside(root, config, logs):
    compiler.wait()


def environment(config: Config, root: Path) -> dict[str, str]:
  """Of a host's agent and ranks; between hosts they speak over launch.interface, if it is set."""
  env = local.child_environment(root, config) | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
  if config.nodes > 1:
    if env["GLOO_SOCKET_IFNAME"] == "lo":
      del env["GLOO_SOCKET_IFNAME"]
    if config.launch.interface:
      names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME")
      env |= dict.fromkeys(names, config.launch.interface)
  return env
