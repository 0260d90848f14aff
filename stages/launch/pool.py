"""Slots of this machine: the runs of a study side by side, one a slot.

On GPUs a slot is as many of them as a run has ranks; on the cpu there is one, unless launch.slots
says more. Runs of one rank are executed by a worker that stays up between them (nmoe.train.worker).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from nmoe.config.sections import Config
from nmoe.errors import ConfigError
from nmoe.records.root import Root
from nmoe.train.progress import Entry
from nmoe.wording import counted
from stages.launch import local as launch
from stages.launch.local import Handle, Job, Launcher

WORKER = "nmoe.train.worker"


class Worker:
  """A process that executes one-rank runs, one after the other, all of one architecture."""

  def __init__(self, launcher: Launcher, job: Job, devices: str):
    self.root, self.arch = launcher.root, job.config.target.arch
    self.cleanup = ExitStack()
    self.last: Handle | None = None
    self.pipe, write = launch.pipe(self.cleanup)
    env = launch.child_environment(self.root, job.config, devices)
    command = launch.child_command(WORKER, ["--progress", str(write)])
    self.process = launch.spawn(command, env, self._log(job), (write,), subprocess.PIPE)
    launch.close(write)

  def fits(self, job: Job) -> bool:
    """Whether it can execute the job: it lives, and no run failed in it."""
    failed = self.last is not None and self.last.poll() != 0
    return not failed and self.process.poll() is None and job.config.target.arch == self.arch

  def start(self, job: Job, follow: Callable[[Entry], None]) -> Handle:
    """Begin a job; the one before must have ended."""
    log = self._log(job)
    self.last = handle = Handle(job, log.parent, follow)
    handle.ranks, handle.pipe = [self.process], self.pipe
    builders = launch.compile_beside(self.root, job.config, log.parent)
    handle.cleanup.callback(launch.terminate, builders)
    arguments = ["--root", str(self.root), "--run", job.run]
    told = json.dumps({"log": str(log), "arguments": arguments}).encode() + b"\n"
    with suppress(BrokenPipeError):  # it is dead, as the handle says
      self.process.stdin.write(told)
      self.process.stdin.flush()
    return handle

  def close(self) -> None:
    """End the process: it leaves at the end of its input, at once if it is between two runs."""
    with suppress(BrokenPipeError):  # it died before it read its last job
      self.process.stdin.close()
    launch.terminate([self.process])
    self.cleanup.close()

  def _log(self, job: Job) -> Path:
    logs = Root(self.root).logs(job.run)
    logs.mkdir(parents=True, exist_ok=True)
    return logs / "rank_0.txt"


class Slot:
  """Where one run at a time is executed. devices: its GPUs, as CUDA_VISIBLE_DEVICES names them."""

  def __init__(self, launcher: Launcher, devices: str, afresh: bool):
    self.launcher, self.devices, self.afresh = launcher, devices, afresh
    self.worker: Worker | None = None
    self.handle: Handle | None = None  # of the job under way

  def begin(self, job: Job, follow: Callable[[Entry], None]) -> Handle:
    """Start a job here: by the slot's worker, or by processes of its own if it has several ranks
    or the slot starts every run afresh.
    """
    if self.afresh or job.config.launch.ranks > 1:
      return self.launcher.start(job, follow, self.devices)
    if self.worker is not None and not self.worker.fits(job):
      self.worker.close()
      self.worker = None
    if self.worker is None:
      self.worker = Worker(self.launcher, job, self.devices)
    return self.worker.start(job, follow)

  def close(self) -> None:
    if self.handle is not None:
      self.handle.close()
    if self.worker is not None:
      self.worker.close()


class Pool:
  """A context: slots, and the jobs in them. Nothing of the jobs outlives it.

  devices: of each slot; see `slots`. afresh: start every run in a new process, for a study of what
  an earlier run in the same process would change: its speed and its memory.
  """

  def __init__(self, launcher: Launcher, devices: Sequence[str], afresh: bool = False):
    self.slots = [Slot(launcher, one, afresh) for one in devices]

  def __enter__(self) -> Pool:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    with ExitStack() as closing:
      for slot in self.slots:
        closing.callback(slot.close)

  @property
  def running(self) -> list[Handle]:
    return [slot.handle for slot in self.slots if slot.handle is not None]

  def free(self) -> Slot | None:
    """A slot without a job, or None."""
    return next((slot for slot in self.slots if slot.handle is None), None)

  def ended(self) -> list[Handle]:
    """Wait launch.POLL_S at most; the jobs that ended. Their slots are free."""
    if not any(handle.poll() is not None for handle in self.running):
      launch.wait(self.running, launch.POLL_S)
    done = []
    for slot in self.slots:
      if slot.handle is not None and slot.handle.poll() is not None:
        slot.handle.close()
        done.append(slot.handle)
        slot.handle = None
    return done


def slots(config: Config) -> list[str]:
  """The GPUs of each slot for runs like `config`, as CUDA_VISIBLE_DEVICES takes them; "" where
  there is one slot, and on the cpu: what is visible here.

  ConfigError if launch.slots asks for more than the machine has.
  """
  ranks, wanted = config.launch.ranks, config.launch.slots
  if config.target.arch == "cpu":
    if wanted > 1 and config.launch.threads == 0:
      raise ConfigError(
        f"launch.slots = {wanted} on the cpu: how many threads each run takes decides its sums; "
        "set launch.threads too"
      )
    return [""] * max(1, wanted)
  gpus = visible_gpus()
  most = len(gpus) // ranks
  if wanted > max(1, most):
    raise ConfigError(
      f"launch.slots = {counted(wanted, 'run')} of {counted(ranks, 'rank')} need "
      f"{counted(wanted * ranks, 'GPU')}; found {len(gpus)} "
      f"({', '.join(gpus) or 'none'}); set launch.slots to at most {max(1, most)}, or 0"
    )
  number = wanted or max(1, most)
  if number == 1:
    return [""]
  return [",".join(gpus[n * ranks : (n + 1) * ranks]) for n in range(number)]


def visible_gpus() -> list[str]:
  """What CUDA_VISIBLE_DEVICES lists, else the numbers of the GPUs that nvidia-smi lists."""
  told = launch.parent_environment().get("CUDA_VISIBLE_DEVICES")
  if told is not None:
    return [gpu for gpu in told.split(",") if gpu]
  if shutil.which("nvidia-smi") is None:
    return []
  listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
  lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
  return [str(number) for number in range(len(lines))]
