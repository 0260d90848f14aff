"""Start a recorded run as child processes, one a rank, and follow it.

The parent never imports torch. Rank 0 prints one JSON line of progress at every log; everything
else a child says goes to {root}/logs/{run_id}/rank_{rank}.txt, and its outcome to the experiment
database.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kernels.arch import environment
from kernels.shapes import Shapes
from kernels.tools import build
from nmoe.config.file import Config
from nmoe.records.root import Root

GRACE_S = 30.0  # a rank may live this long after another one failed, and then after SIGTERM
SAVE_S = 900.0  # a run that is told to stop may take this long to save its state


def run(
  root: Path,
  run_id: str,
  config: Config,
  progress: Callable[[dict], None],
  kill_at: int | None = None,
  trace: Path | None = None,
  first: Path | None = None,
) -> int:
  """Execute the run and return its exit status (0: completed); progress receives each line.

  kill_at: SIGKILL every rank once a line of that step or a later one came (a test of resuming).
  trace: a folder for a profile of rank 0 (nmoe.train.profiler).
  first: a folder into which the ranks save their state before and after their first step.

  An interrupt (Ctrl-C, SIGTERM) is passed on as SIGTERM: the run saves a checkpoint and leaves,
  resumable.
  """
  logs = Root(root).logs(run_id)
  logs.mkdir(parents=True, exist_ok=True)
  rendezvous = logs / f"rendezvous-{os.getpid()}"
  profiled = [] if trace is None else ["--trace", str(trace)]
  every = [] if first is None else ["--first", str(first)]
  builder = compile_beside(root, config, logs)
  children = [
    _spawn(root, run_id, config, rank, rendezvous, logs, every if rank else every + profiled)
    for rank in range(config.launch.ranks)
  ]
  previous = signal.signal(signal.SIGTERM, _raise_interrupt)
  try:
    for entry in _entries(children[0].stdout, logs / "rank_0.txt"):
      progress(entry)
      if kill_at is not None and entry["step"] >= kill_at:
        for child in children:
          child.kill()
    return _join(children)
  finally:
    _terminate(children, SAVE_S)
    _terminate(builder, GRACE_S)
    signal.signal(signal.SIGTERM, previous)
    rendezvous.unlink(missing_ok=True)


def compile_beside(root: Path, config: Config, logs: Path) -> list[subprocess.Popen]:
  """The process, if one is needed, that compiles on all cores what the run would compile on one."""
  if config.target.arch == "cpu":
    return []
  shapes, arch, env = Shapes.of(config), config.target.arch, parent_environment()
  started = build.start(shapes, arch, Root(root).kernel_cache, env, logs / "kernels.txt")
  return [] if started is None else [started]


def parent_environment() -> dict[str, str]:
  """A copy of this process's environment, for a child's."""
  return dict(os.environ)


def tail(root: Path, run_id: str, lines: int = 15) -> str:
  """The last lines that the ranks of a run left in their logs, for an error message."""
  parts = []
  for log in sorted(Root(root).logs(run_id).glob("rank_*.txt")):
    with log.open(errors="replace") as stream:
      last = "".join(deque(stream, maxlen=lines))
    if last.strip():
      parts.append(f"{log}:\n{last}")
  return "\n".join(parts)


def _raise_interrupt(*_: object) -> None:
  raise KeyboardInterrupt


def _spawn(
  root: Path,
  run_id: str,
  config: Config,
  rank: int,
  rendezvous: Path,
  logs: Path,
  more: list[str],
) -> subprocess.Popen:
  command = [sys.executable, "-m", "nmoe.train.loop", "--root", str(root), "--run", run_id]
  command += ["--rank", str(rank), "--rendezvous", str(rendezvous), *more]
  env = parent_environment()
  if config.target.arch != "cpu":
    env |= environment(config.target.arch, Root(root).kernel_cache)
  with (logs / f"rank_{rank}.txt").open("a") as log:
    return subprocess.Popen(
      command,
      env=env,
      stdout=subprocess.PIPE if rank == 0 else log,
      stderr=log,
      text=True,
      start_new_session=True,
    )


def _entries(lines: Iterable[str], log: Path) -> Iterator[dict]:
  """The lines of progress; what a library prints between them goes to the log."""
  for line in lines:
    if line.startswith("{"):
      yield json.loads(line)
    else:
      with log.open("a") as stream:
        stream.write(line)


def _join(children: list[subprocess.Popen]) -> int:
  """The first non-zero exit status, or 0; ranks that outlive a failed one by GRACE_S are
  terminated.
  """
  deadline = None
  while True:
    states = [child.poll() for child in children]
    failed = [s for s in states if s]
    if all(s is not None for s in states):
      return failed[0] if failed else 0
    if failed and deadline is None:
      deadline = time.monotonic() + GRACE_S
    if deadline is not None and time.monotonic() > deadline:
      _terminate(children, GRACE_S)
    time.sleep(0.02)


def _terminate(children: list[subprocess.Popen], grace_s: float) -> None:
  """SIGTERM to all that live, then SIGKILL to those that outlive it by grace_s."""
  for child in children:
    if child.poll() is None:
      child.send_signal(signal.SIGTERM)
  deadline = time.monotonic() + grace_s
  for child in children:
    try:
      child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      child.kill()
      child.wait()
