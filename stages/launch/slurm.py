"""A production run as a Slurm batch script: text, and its submission by sbatch.

The script records an attempt, starts one agent a node with srun, and asks what the end means: only
an attempt that may be tried again (status 75) is queued again. Its requests: sbatch(1).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.records.provenance import REPO
from nmoe.records.root import Root
from stages.launch.local import SAVE_S

MARGIN_S = 60  # Slurm sends a signal up to this much late
SUBMIT_S = 60


def name(run_id: str) -> str:
  return f"nmoe-{run_id}"


def script(
  config: Config, run_id: str, root: Path, python: str = sys.executable, preflight: bool = False
) -> str:
  """The batch script of a run; python: the interpreter on the nodes. preflight: see
  stages.prod.hosts.generate.
  """
  told = "\n".join(f"#SBATCH --{option}" for option in options(config, run_id, root))
  nmoe = f"{shlex.quote(python)} -P -m stages.cli prod"
  place = f"{run_id} --root {shlex.quote(str(root))}"
  container = f"--container-image={shlex.quote(config.slurm.container)} " * bool(
    config.slurm.container
  )
  node = f'{nmoe} node {place} --attempt $ATTEMPT --head $HEAD --node "$SLURM_NODEID"'
  first = f"""#!/bin/bash
{told}
export PYTHONPATH={shlex.quote(str(REPO))}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ADDRESS=$(scontrol show node -o "$FIRST" | sed 's/.*NodeAddr=\\([^ ]*\\).*/\\1/')
export HEAD=$ADDRESS:{config.launch.port}
"""
  run = f"srun --kill-on-bad-exit=1 --label {container}bash -c {shlex.quote(node)}"
  if preflight:
    return f"{first}export ATTEMPT=0\n{run}\n"
  return f"""{first}JOB="--engine slurm --job $SLURM_JOB_ID --hosts $SLURM_JOB_NODELIST"
ATTEMPT=$({nmoe} begin {place} $JOB) || exit 76
export ATTEMPT
{run}
{nmoe} end {place} --attempt "$ATTEMPT"
STATUS=$?
if [ $STATUS -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $STATUS
"""


def options(config: Config, run_id: str, root: Path) -> list[str]:
  """What sbatch is asked for, without the dashes."""
  s = config.slurm
  found = [
    f"job-name={name(run_id)}",
    "dependency=singleton",
    f"nodes={config.nodes}",
    "ntasks-per-node=1",
  ]
  if config.target.arch != "cpu":
    found += [f"gpus-per-node={config.node_ranks}", "exclusive"]
  found += [
    "requeue",
    "open-mode=append",
    f"signal=TERM@{int(SAVE_S) + MARGIN_S}",
    f"output={Root(root).logs(run_id) / 'slurm.txt'}",
  ]
  limit = f"{-(-s.time_limit_s // 60)}" if s.time_limit_s else ""
  asked = {"partition": s.partition, "account": s.account, "time": limit}
  return found + [f"{name}={value}" for name, value in asked.items() if value]


def queued(run_id: str) -> str:
  """The ids of a run's jobs in Slurm's queue, "" if it has none. RunError without Slurm."""
  done = _asked("squeue", "--noheader", f"--name={name(run_id)}", "--format=%i")
  if done.returncode:
    raise RunError(f"squeue failed: {done.stderr.strip()}; is Slurm's controller up?")
  return " ".join(done.stdout.split())


def submit(path: Path) -> str:
  """Hand a script to sbatch; the job's id. RunError with what sbatch said."""
  done = _asked("sbatch", "--parsable", str(path))
  if done.returncode or not re.match(r"\d+", done.stdout):
    raise RunError(f"sbatch refused {path}: {done.stderr.strip() or done.stdout.strip()}")
  return done.stdout.split(";")[0].strip()


def _asked(client: str, *arguments: str) -> subprocess.CompletedProcess[str]:
  """What a client of Slurm's said. RunError if it is not here, or hangs."""
  try:
    return subprocess.run([client, *arguments], capture_output=True, text=True, timeout=SUBMIT_S)
  except FileNotFoundError as error:
    raise RunError(f"no {client} here; run this on a host of the cluster") from error
  except subprocess.TimeoutExpired as error:
    raise RunError(
      f"{client} did not answer within {SUBMIT_S} s; is Slurm's controller up? See `scontrol ping`"
    ) from error
