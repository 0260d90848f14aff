"""Start recorded runs as child processes, one a rank, and follow them. The only launcher.

This process never imports torch, and never blocks on a rank: `Handle.poll` reads what came and
looks at every rank. Ranks tell their progress through a pipe of their own; whatever they print goes
to {root}/logs/{run_id}/rank_{rank}.txt, and their outcome to the experiment database. They die with
the thread that started them (stages.launch.child), so a Launcher belongs to a thread that stays.
"""

from __future__ import annotations

import glob
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kernels.arch import environment
from kernels.tools import build
from nmoe.config.sections import Config
from nmoe.config.shapes import kernel_shapes
from nmoe.records.provenance import REPO
from nmoe.records.root import Root
from nmoe.train.progress import Entry

GRACE_S = 30.0  # a rank may live this long after another one failed
SAVE_S = 900.0  # a run that is told to stop may take this long to save its state
POLL_S = 0.2  # every rank is looked at this often
SPINS = "5000"  # of a thread of libgomp that waits; its own default is 300,000


@dataclass(frozen=True)
class Job:
  """A recorded run, to be executed by `config.launch.ranks` processes.

  module   what they run; it takes --root, --run, --rank, --ranks, --rendezvous and --progress
  trace    a folder for a profile of rank 0 (nmoe.train.profiler)
  first    a folder into which the ranks save their state before and after their first step
  kill_at  SIGKILL every rank once it told of that step or a later one (a test of resuming)
  options  further arguments of the module
  """

  run: str
  config: Config
  module: str = "nmoe.train.loop"
  trace: Path | None = None
  first: Path | None = None
  kill_at: int | None = None
  options: tuple[str, ...] = ()

  def arguments(self, rank: int) -> list[str]:
    """Those of one rank that say what it does, but for its place among the others."""
    more = list(self.options)
    if self.first is not None:
      more += ["--first", str(self.first)]
    if self.trace is not None and rank == 0:
      more += ["--trace", str(self.trace)]
    return more


class Handle:
  """A job under way. `failure` names the rank that failed first and how, "" while none has.

  Entries of its progress go to `follow`. Call `close` at the end, whatever happened.
  """

  def __init__(self, job: Job, logs: Path, follow: Callable[[Entry], None]):
    self.job, self.logs, self.failure = job, logs, ""
    self.state = ""  # of nmoe.records.heartbeat.STATES, as rank 0 told it
    self.drained = False  # nobody will tell anything more
    self.ranks: list[subprocess.Popen] = []
    self.pipe = -1  # what the ranks tell
    self.cleanup = ExitStack()  # what `close` does once no rank lives
    self._follow = follow
    self._status: int | None = None
    self._said: int | None = None  # the exit status of the job, as a worker tells it
    self._first: int | None = None  # the exit status of the rank that failed first
    self._buffer = b""
    self._deadline = float("inf")  # of the ranks that live

  def poll(self) -> int | None:
    """Read what came, look at every rank; the exit status (0: completed) once all have ended.

    Ranks that outlive a failed one by GRACE_S, or `stop` by SAVE_S, are killed.
    """
    if self._status is not None:
      return self._status
    states = [rank.poll() for rank in self.ranks]
    self._read()
    if self._said is not None:
      self._status = self._said
    elif None not in states:
      self._fail(states)
      self._status = self._first or 0
    else:
      if not self.failure and any(states):
        self._fail(states)
        self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
      if time.monotonic() > self._deadline:
        self.kill()
    return self._status

  def stop(self) -> None:
    """Ask the ranks to save a checkpoint and leave; `poll` says when they have. Ends following."""
    self._follow = lambda _: None
    for rank in self.ranks:
      if rank.poll() is None:
        rank.send_signal(signal.SIGTERM)
    self._deadline = min(self._deadline, time.monotonic() + SAVE_S)

  def kill(self) -> None:
    """End the ranks at once."""
    for rank in self.ranks:
      if rank.poll() is None:
        rank.kill()

  def close(self) -> None:
    """End what still lives; nothing of the job outlives this, but a worker that ended it."""
    if self._said is None:
      self.kill()
      for rank in self.ranks:
        rank.wait()
    self.cleanup.close()

  def tail(self, lines: int = 15) -> str:
    """The failure and the last lines that the ranks left in their logs, for an error message."""
    parts = [self.failure] if self.failure else []
    for log in sorted(self.logs.glob("rank_*.txt")):
      with log.open(errors="replace") as stream:
        last = "".join(deque(stream, maxlen=lines))
      if last.strip():
        parts.append(f"{log}:\n{last}")
    return "\n".join(parts)

  def _fail(self, states: Sequence[int | None]) -> None:
    """Note who failed, if one did and none had: of several at once, one that a signal killed."""
    failed = sorted((s > 0, rank, s) for rank, s in enumerate(states) if s)
    if self.failure or not failed:
      return
    _, rank, self._first = failed[0]
    how = f"ended with exit status {self._first}"
    if self._first < 0:
      how = f"was killed by {_signal_name(-self._first)}"
    self.failure = f"rank {rank} of {len(states)} {how}"

  def _read(self) -> None:
    while chunk := _available(self.pipe):
      self._buffer += chunk
    self.drained = chunk == b""
    *lines, self._buffer = self._buffer.split(b"\n")
    for line in lines:
      message = json.loads(line)
      if "end" in message:
        self._said = message["end"]
        continue
      if "state" in message:
        self.state = message["state"]
        continue
      entry = Entry(**message)
      self._follow(entry)
      if self.job.kill_at is not None and entry.step >= self.job.kill_at:
        self.kill()


@dataclass(frozen=True)
class Launcher:
  """Starts jobs on this machine, whose runs are recorded in `root`."""

  root: Path

  def start(
    self, job: Job, follow: Callable[[Entry], None] = lambda _: None, devices: str = ""
  ) -> Handle:
    """Start the ranks of a job. devices: what CUDA_VISIBLE_DEVICES says to them; "": as it is.

    They meet in a file of a folder that is made for this start alone: what an earlier start left
    would send them to processes that are dead.
    """
    logs = Root(self.root).logs(job.run)
    logs.mkdir(parents=True, exist_ok=True)
    handle = Handle(job, logs, follow)
    try:
      handle.pipe, write = pipe(handle.cleanup)
      folder = handle.cleanup.enter_context(_meeting_place(job.run))
      handle.cleanup.callback(terminate, compile_beside(self.root, job.config, logs))
      for rank in range(job.config.launch.ranks):
        place = ["--root", str(self.root), "--run", job.run, "--rank", str(rank)]
        place += ["--ranks", str(job.config.launch.ranks), "--progress", str(write)]
        place += ["--rendezvous", f"file://{folder}/rendezvous"]
        place += ["--deadline", str(job.config.rdep.deadline_s)]
        command = child_command(job.module, [*place, *job.arguments(rank)])
        env = child_environment(self.root, job.config, devices)
        handle.ranks.append(spawn(command, env, logs / f"rank_{rank}.txt", (write,)))
      os.close(write)
    except BaseException:
      handle.close()
      raise
    return handle


def run(
  launcher: Launcher,
  job: Job,
  follow: Callable[[Entry], None] = lambda _: None,
  idle: Callable[[Handle], None] = lambda _: None,
) -> Handle:
  """Execute a job to its end; the ended handle. `idle` is called with it every POLL_S.

  An interrupt is passed on as SIGTERM: the run saves a checkpoint and leaves, resumable.
  """
  handle = launcher.start(job, follow)
  try:
    while handle.poll() is None:
      idle(handle)
      wait([handle], POLL_S)
  except KeyboardInterrupt:
    finish([handle])
    raise
  finally:
    handle.close()
  return handle


def finish(handles: Sequence[Handle]) -> None:
  """Tell the jobs to save and leave, and wait until they have, for SAVE_S at most."""
  for handle in handles:
    handle.stop()
  while any(handle.poll() is None for handle in handles):
    wait(handles, POLL_S)


def wait(handles: Sequence[Handle], timeout_s: float) -> None:
  """Return when a rank of the jobs told something, or after timeout_s."""
  pipes = [handle.pipe for handle in handles if not handle.drained]
  select.select(pipes, [], [], timeout_s)


@contextmanager
def _meeting_place(run_id: str) -> Iterator[Path]:
  """A new folder on this host; those of earlier starts of the run, which were killed, go."""
  prefix = f"nmoe-{run_id}-"
  for left in Path(tempfile.gettempdir()).glob(f"{glob.escape(prefix)}*"):
    shutil.rmtree(left, ignore_errors=True)
  with tempfile.TemporaryDirectory(prefix=prefix) as folder:
    yield Path(folder)


def pipe(cleanup: ExitStack) -> tuple[int, int]:
  """(read end that never blocks, closed by `cleanup`; write end, which the caller closes)."""
  read, write = os.pipe()
  os.set_blocking(read, False)
  cleanup.callback(os.close, read)
  return read, write


def close(fd: int) -> None:
  """Close a descriptor of `pipe`."""
  os.close(fd)


def child_command(module: str, arguments: Sequence[str]) -> list[str]:
  """The command of a child that runs `module` and ends with this thread."""
  return [
    sys.executable,
    "-P",  # nothing of the current folder is imported
    "-m",
    "stages.launch.child",
    "--parent",
    str(os.getpid()),
    module,
    *arguments,
  ]


def child_environment(root: Path, config: Config, devices: str = "") -> dict[str, str]:
  """This process's environment with what a rank needs: our code, its kernels' settings, its GPUs.

  gloo listens on the loopback interface alone: all ranks share this host. OpenMP's threads spin
  for microseconds and sleep then: as soon as another process wants their cores, those that spin on
  take them from whom they wait for.
  """
  env = parent_environment()
  env.setdefault("GOMP_SPINCOUNT", SPINS)
  env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPO), env.get("PYTHONPATH"))))
  env.setdefault("GLOO_SOCKET_IFNAME", "lo")
  if config.target.arch != "cpu":
    env |= environment(config.target.arch, Root(root).kernel_cache)
  if devices:
    env["CUDA_VISIBLE_DEVICES"] = devices
  return env


def parent_environment() -> dict[str, str]:
  """A copy of this process's environment, for a child's."""
  return dict(os.environ)


def spawn(
  command: Sequence[str],
  env: dict[str, str],
  log: Path,
  inherited: Sequence[int] = (),
  stdin: int | None = subprocess.DEVNULL,
) -> subprocess.Popen:
  """Start a child in a session of its own, whose output is appended to `log`."""
  with log.open("a") as out:
    return subprocess.Popen(
      command,
      env=env,
      stdin=stdin,
      stdout=out,
      stderr=out,
      pass_fds=inherited,
      start_new_session=True,
    )


def compile_beside(root: Path, config: Config, logs: Path) -> list[subprocess.Popen]:
  """The process, if one is needed, that compiles on all cores what the run would compile on one."""
  if config.target.arch == "cpu":
    return []
  shapes, arch, env = kernel_shapes(config), config.target.arch, parent_environment()
  started = build.start(shapes, arch, Root(root).kernel_cache, env, logs / "kernels.txt")
  return [] if started is None else [started]


def terminate(children: Sequence[subprocess.Popen]) -> None:
  """SIGTERM to all that live, then SIGKILL to those that outlive it by GRACE_S."""
  for child in children:
    if child.poll() is None:
      child.send_signal(signal.SIGTERM)
  deadline = time.monotonic() + GRACE_S
  for child in children:
    try:
      child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      child.kill()
      child.wait()


def _available(pipe: int) -> bytes | None:
  """What can be read without waiting; b"" at the end of the pipe, None if there is nothing yet."""
  try:
    return os.read(pipe, 1 << 16)
  except BlockingIOError:
    return None


def _signal_name(number: int) -> str:
  """SIGSEGV and the like; a real-time signal has no name of its own."""
  known = {s.value: s.name for s in signal.Signals}
  return known.get(number, f"signal {number}")
