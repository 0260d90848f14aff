"""A production run on hosts that Slurm or a JobSet starts: generated, submitted; a host's agent."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.records.attempts import Attempts, History
from nmoe.records.root import Root
from stages.launch import jobset, local, slurm


def generate(config: Config, run_id: str, root: Path) -> Path:
  """Write what the run's engine takes into the run's folder, and its hash into the records."""
  folder = Root(root).prod(run_id)
  folder.mkdir(parents=True, exist_ok=True)
  Root(root).logs(run_id).mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its output
  records = Attempts(root)
  try:
    if config.launch.engine == "slurm":
      path, text = folder / "job.sbatch", slurm.script(config, run_id, root)
    else:
      first = len(records.attempts(run_id)) + 1
      path, text = folder / "jobset.json", jobset.text(config, run_id, root, first)
    path.write_text(text)
    records.artifact(run_id, path)
  finally:
    records.close()
  return path


def submit(config: Config, path: Path, console: Console) -> None:
  """Hand what was generated to the engine's own client."""
  if config.launch.engine == "slurm":
    console.print(f"job {slurm.submit(path)}: {path}", markup=False, soft_wrap=True)
  else:
    jobset.create(path)
    console.print(f"created: {path}", markup=False, soft_wrap=True)


def node(run_id: str, root: Path, attempt: int, head: str, number: int) -> None:
  """Become the agent of this host. Does not return."""
  reader = History(root)
  config = configs.loads(reader.run(run_id).toml, f"run {run_id}", env={})
  reader.close()
  place = ["--root", str(root), "--run", run_id, "--attempt", str(attempt)]
  place += ["--nodes", str(config.nodes), "--node", str(number), "--head", head]
  command = [sys.executable, "-P", "-m", "stages.launch.agent", *place]
  os.execve(sys.executable, [*command, *_address(config)], environment(config, root))


def _address(config: Config) -> Sequence[str]:
  """By which the others reach this host: torch finds it where there are several."""
  return ["--address", "127.0.0.1"] if config.nodes == 1 else []


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
