"""How an attempt of a production run begins, and what its end means for the next one."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.config import file as configs
from nmoe.errors import CheckpointError, RecordError
from nmoe.records import manifests, postmortem
from nmoe.records.attempts import Attempt, Attempts, History
from nmoe.records.condition import AGAIN
from nmoe.records.goodput import LEFT
from nmoe.records.launches import Launch
from nmoe.records.reader import Run
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.launch import notify

DONE, NEVER = 0, 76  # exit statuses: over; never to be queued again
FINAL = ("diverged", "refused", "disk full")  # events that say how their attempt ended
STATUS = {
  "completed": DONE,
  "stopped": DONE,
  "preempted": AGAIN,
  "amended": AGAIN,
  "crashed": AGAIN,
  "diverged": NEVER,
  "refused": NEVER,
  "no progress": NEVER,
  "superseded": NEVER,
  "disk full": AGAIN,
}


TOLD = ("crashed", "no progress", "preempted")  # outcomes that are events of their own


@dataclass(frozen=True)
class End:
  """Of an attempt: one of nmoe.records.attempts.OUTCOMES, and why."""

  outcome: str
  why: str

  @property
  def status(self) -> int:
    return STATUS[self.outcome]


def request(path: Path) -> None:
  """Ask a live run to leave, by a file that its ranks look for."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.touch()


def answered(root: Path, run_id: str) -> None:
  """Nothing is asked of a run any more."""
  Root(root).stop_request(run_id).unlink(missing_ok=True)
  Root(root).amend_request(run_id).unlink(missing_ok=True)


def begin(
  root: Path,
  run_id: str,
  engine: str,
  job_id: str = "",
  nodes: Sequence[str] = (),
  number: int = 0,
) -> int:
  """Record an attempt of a run; its number, by default the next."""
  with closing(Attempts(root)) as records:
    run = records.run(run_id)
    if run.status == "completed":
      raise RecordError(f"run {run_id} is completed")
    answered(root, run_id)
    hosts = list(nodes) or [socket.gethostname()]
    step = newest_step(root, run_id)
    told = {"engine": engine, "job_id": job_id, "nodes": hosts, "commit": run.commit}
    number = records.begin(run_id, **told, step=step, number=number)
  now, pid = time.time(), os.getpid() if engine == "local" else 0  # a script's begin ends at once
  Launch(number, now, now, socket.gethostname(), pid).write(root, run_id)
  return number


def settle(root: Path, run_id: str, number: int, told: bool = False) -> End:
  """What became of an attempt whose processes have ended, as the records say it; recorded. told:
  this process told them to leave.
  """
  with closing(Attempts(root)) as records:
    run = records.run(run_id)
    if told:
      records.left(run_id, number)
    end = judged(root, records, run, number)
    step = newest_step(root, run_id)
    records.end(run_id, number, outcome=end.outcome, exit_status=end.status, step=step)
    if end.outcome in TOLD:
      detail = {"why": end.why}
      if end.outcome != "preempted":
        detail |= {"dead": postmortem.written(root, run_id, number)}
      records.event(run_id, number, end.outcome, step=step, detail=detail)
    if end.outcome != "superseded":
      answered(root, run_id)
    for path in permanent(root, run_id):
      records.artifact(run_id, path)
    notify.deliver(root, run_id, configs.loads(run.toml, f"run {run_id}", env={}).prod.notify)
    return end


def permanent(root: Path, run_id: str) -> list[Path]:
  """The manifests of the checkpoints that are kept for good."""
  folder = Root(root).checkpoints(run_id)
  paths = [folder / f"step_{step:08d}" for step in manifests.steps(folder)]
  return [path / "manifest.json" for path in paths if _read(path).get("permanent")]


def _read(path: Path) -> dict[str, Any]:
  """A manifest; {} if it cannot be read: the ranks say so."""
  try:
    return manifests.manifest(path)
  except CheckpointError:
    return {}


def status_of(root: Path, run_id: str, number: int, timeout_s: float = 120.0) -> int:
  """The exit status of an attempt that another host settles; AGAIN if it has not in time."""
  deadline = time.monotonic() + timeout_s
  while time.monotonic() < deadline:
    with closing(History(root)) as records:
      ended = [a.exit for a in records.attempts(run_id) if a.number == number and a.outcome]
    if ended:
      return ended[0]
    time.sleep(1.0)
  return AGAIN


def judged(root: Path, records: History, run: Run, number: int) -> End:
  """The end of attempt `number` of a run."""
  attempts = records.attempts(run.id)
  if attempts[-1].number > number:
    return End("superseded", f"attempt {attempts[-1].number} has begun meanwhile")
  if run.status == "completed":
    return End("completed", "")
  events = [event for event in records.events(run.id) if event.attempt == number]
  final = next((event for event in events if event.kind in FINAL), None)
  if final is not None:
    return End(final.kind, final.detail["error"])
  asked = Root(root).stop_request(run.id).exists()
  if events and events[-1].kind in ("stop", "amended"):
    if not asked and (events[-1].kind == "amended" or Root(root).amend_request(run.id).exists()):
      return End("amended", "it saved, and goes on under the amendment")
    why = events[-1].detail.get("why", "it was told to leave, and saved")
    return End("stopped" if asked else "preempted", why)
  config = configs.loads(run.toml, f"run {run.id}", env={})
  why = run.error or "a rank died without a word: see the logs"
  if asked:
    return End("stopped", f"it was told to leave when its ranks had failed: {why}")
  tries = [one for one in attempts if one.outcome not in LEFT]
  if stuck(tries, newest_step(root, run.id), config.prod.no_progress):
    n = config.prod.no_progress
    row = f"{n} attempts in a row" if n > 1 else "an attempt"
    return End("no progress", f"{row} ended without a newer checkpoint: {why}")
  if len(tries) >= config.prod.max_attempts:
    return End("no progress", f"{counted(len(tries), 'attempt')} (prod.max_attempts): {why}")
  return End("crashed", why)


def stuck(attempts: Sequence[Attempt], step: int, limit: int) -> bool:
  """Whether the last `limit` attempts, of which the newest ends now at the checkpoint of `step`,
  all ended where the first of them began.
  """
  last = attempts[-limit:]
  return len(last) == limit and last[0].first_step == step


def newest_step(root: Path, run_id: str) -> int:
  """Of the run's checkpoints; 0: it has none."""
  return max(Root(root).checkpoint_steps(run_id), default=0)
