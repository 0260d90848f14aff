"""The runs of an experiment: found finished, continued, or executed from their start.

One file: one run and several side by side go through the same steps of one `Work`.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from nmoe.config import file as configs
from nmoe.config.sections import Config, fingerprint
from nmoe.errors import RecordError, RunError
from nmoe.evals.suites import ITEMS, items_digest, suite_of
from nmoe.machine import driver
from nmoe.records.measures import of_metric
from nmoe.records.provenance import differences, environment
from nmoe.records.reader import Experiment, Hypothesis, Run, places
from nmoe.records.root import Root
from nmoe.train.progress import FAILED_FOR_GOOD, Entry
from nmoe.wording import counted
from stages.judge.table import Judgement
from stages.launch import local as launch
from stages.launch.display import Display, Line
from stages.launch.local import Handle, Job, Launcher
from stages.launch.pool import Pool, Slot, slots
from stages.report.html import write_report
from stages.report.terminal import terminal_summary
from stages.text import plain
from stages.workbench import Arm, Workbench

ELSEWHERE_S = 2.0  # between looks at runs of other processes


@contextmanager
def carrying(
  bench: Workbench,
  stage: str,
  name: str,
  hypotheses: Sequence[Hypothesis],
  arms: Sequence[Arm],
  seeds: Sequence[int],
  grows: bool = False,
) -> Iterator[Work]:
  """Take up an experiment and carry it out in the block."""
  work = taken_up(bench, stage, name, hypotheses, arms, seeds, grows)
  with under_way(work):
    yield work


def taken_up(
  bench: Workbench,
  stage: str,
  name: str,
  hypotheses: Sequence[Hypothesis],
  arms: Sequence[Arm],
  seeds: Sequence[int],
  grows: bool = False,
) -> Work:
  """Write the hypotheses down, or find the newest experiment that asks the same of the same arms
  and seeds (and of no others, unless it `grows`).
  """
  records = bench.experiments
  planned = [bench.plan(arm) for arm in arms]
  if bench.anew:
    experiment = records.create(name, stage, hypotheses, planned)
  else:
    experiment = records.find_or_create(name, stage, hypotheses, planned, seeds, grows)
  return Work(bench, experiment)


@contextmanager
def under_way(work: Work) -> Iterator[None]:
  """Whatever ends the block before `Work.conclude`, the record says so."""
  records = work.bench.experiments
  records.set_status(work.experiment.id, "running")
  try:
    yield
  except KeyboardInterrupt:
    records.set_status(work.experiment.id, "interrupted")
    raise
  finally:
    if records.find(work.experiment.id).status == "running":
      records.mark_interrupted()
      records.set_status(work.experiment.id, "failed")


@dataclass
class Work:
  """An experiment that is being carried out."""

  bench: Workbench
  experiment: Experiment
  refused: set[str] = field(default_factory=set)  # runs that another try would not help

  @property
  def measures_the_machine(self) -> bool:
    """Whether a hypothesis is about speed or memory."""
    return any(of_metric(h.metric).device_dependent for h in self.experiment.hypotheses)

  def plan(self, arms: Sequence[Arm]) -> None:
    """Record more arms, as a sweep does that extends its grid; those that are there stay."""
    self.bench.experiments.add_arms(self.experiment.id, [self.bench.plan(arm) for arm in arms])

  def run_all(self, pairs: Sequence[tuple[Arm, int]]) -> list[Run]:
    """The run of every arm and seed, in their order: found finished, continued, or executed from
    its start, side by side in the slots of this machine.

    Only a run of the same fingerprint, data and code is found, where speed or memory is asked for
    of this host and its versions too, where a suite is of the same items too; a continued one takes
    over what the configuration now says of free keys. One that another process is at comes last,
    and is waited for. Those returned are completed or failed. RunError if one was stopped before
    either, after the others have ended.
    """
    devices = slots(max((arm.config for arm, _ in pairs), key=lambda c: c.launch.ranks))
    with (
      Display(self.bench.console) as display,
      Pool(Launcher(self.bench.root), devices, self.measures_the_machine) as pool,
    ):
      return SideBySide(self, display, pool).runs(pairs)

  def take_up(self, arm: Arm, seed: int, display: Display) -> Run | None:
    """The run of an arm at a seed: finished, or recorded and to be executed; None while another
    process is at it.
    """
    records, config = self.bench.experiments, arm.at_seed(seed)
    run = records.find_or_start(
      self.experiment.id,
      arm.name,
      seed,
      usable=lambda run: self.usable(run) and self.answers(run, config),
      **self.record(arm, config),
    )
    if run.finished:
      outcome = "completed" if run.status == "completed" else "diverged"
      note = _since(run)
      display.say(f"{label(arm, seed)}: {outcome} before as run {run.id}, reused{note}")
    elif records.owns(run.id):
      records.release(run.id)
      self._say_what_was_left(run, label(arm, seed), display)
    else:
      try:
        self.hand_over(run, config)
      except RecordError:  # of one that another process is at, or ended since
        if not (records.held_elsewhere(run.id) or records.run(run.id).finished):
          raise
        return None
      others = changes(run)
      note = f" ({'; '.join(others)})" if others else ""
      display.say(f"{label(arm, seed)}: {run.status} before as run {run.id}, continued{note}")
    return run

  def _say_what_was_left(self, run: Run, name: str, display: Display) -> None:
    """A new run stands in for one that other code began."""
    key = (run.fingerprint, run.data_digest, run.seed, run.code_version)
    left = self.bench.experiments.left_under_other_code(*key)
    if left is not None:
      display.say(
        f"{name}: run {left.id} was {left.status} under code {left.code_version}, this is "
        f"{run.code_version}: it starts anew as run {run.id}"
      )

  def usable(self, run: Run) -> bool:
    """Whether a run of the same computation also measured this machine alone, where that matters,
    and can go on: one that never began does so with the versions of its record only.
    """
    starts, now = self.bench.experiments.starts(run.id), environment()
    begun = starts or Root(self.bench.root).checkpoint_steps(run.id)
    if not run.finished and not begun and differences(run.environment, now):
      return False
    if not self.measures_the_machine:
      return True
    here = (run.host, run.environment) == (socket.gethostname(), now)
    known = [*(start.device for start in starts), run.results.get("device")]
    there = driver.devices(run.target)
    return here and len(places(starts)) <= 1 and all(d in there for d in known if d)

  def answers(self, run: Run, config: Config) -> bool:
    """Whether a completed run was asked the items that a hypothesis is about, if one is."""
    if run.status != "completed" or suite_metric(self.experiment.hypotheses) is None:
      return True
    suite = suite_of(config.eval.suite, config.eval.limit)
    return run.results.get(ITEMS) == items_digest(suite, Root(self.bench.root).evals)

  def repeat(
    self,
    arm: Arm,
    seed: int,
    display: Display,
    trace: Path | None = None,
    follow: Callable[[Entry], None] = lambda _: None,
  ) -> Run:
    """Execute a new run of an arm at a seed, whatever the records hold.

    trace: profile it into this folder. follow receives each line of its progress as it comes.
    """
    run = self.start(arm, seed)
    return self.execute(Job(run.id, arm.at_seed(seed), trace=trace), display, follow)

  def start(self, arm: Arm, seed: int) -> Run:
    """Record a new run of an arm at a seed, to be executed by a Job."""
    record = self.record(arm, arm.at_seed(seed))
    run = self.bench.experiments.start_run(self.experiment.id, arm.name, seed, **record)
    self.bench.experiments.release(run.id)
    return run

  def record(self, arm: Arm, config: Config) -> dict[str, object]:
    """What is written of a run before its first step."""
    return {
      "toml": configs.to_toml(config),
      "fingerprint": arm.fingerprint(config.train.seed),
      "data_digest": arm.data.name,
      "code_version": self.bench.code_version,
      "commit": self.bench.commit,
      "diff": self.bench.patch,
      "environment": environment(),
      "target": config.target.arch,
      "branch": arm.branches.get(config.train.seed),
    }

  def hand_over(self, run: Run, config: Config) -> None:
    """Let an unfinished run go on under this configuration, which may change no identity key.

    RecordError if another process is at it.
    """
    self.bench.experiments.claim(run.id)
    self.bench.experiments.update_run(run.id, toml=configs.to_toml(config))
    self.bench.experiments.release(run.id)

  def execute(
    self, job: Job, display: Display, follow: Callable[[Entry], None] = lambda _: None
  ) -> Run:
    """Execute a recorded run and return it, completed or failed; RunError if it stopped before."""
    line = display.line(self.label(job.run), job.config.steps, f"starting {job.run}")

    def show(entry: Entry) -> None:
      line.follow(entry)
      follow(entry)

    try:
      ended = launch.run(
        Launcher(self.bench.root), job, show, lambda handle: line.idle(handle.failure, handle.state)
      )
    except KeyboardInterrupt as interrupt:
      raise self.stopped(job.run, "it was told to") from interrupt
    return self.outcome(line, ended)

  def outcome(self, line: Line, ended: Handle) -> Run:
    """What became of a run whose ranks have ended; RunError if that is nothing to go by."""
    found = self.bench.experiments.run(ended.job.run)
    if found.status not in ("completed", "failed"):
      line.end("stopped")
      raise self.stopped(found.id, f"exit status {ended.poll()}\n{ended.tail()}")
    line.end(found.status)
    if ended.poll() == FAILED_FOR_GOOD:
      self.refused.add(found.id)
    return found

  def stopped(self, run_id: str, how: str) -> RunError:
    """The error of a run that ended without an outcome, which the records now say."""
    self.bench.experiments.mark_interrupted()
    self.bench.experiments.set_status(self.experiment.id, "interrupted")
    again = "starts all runs anew" if self.bench.anew else "continues it"
    return RunError(
      f"run {run_id} ({self.label(run_id)}) stopped before its end, the same command {again}: {how}"
    )

  def label(self, run_id: str) -> str:
    """A run as this experiment calls it."""
    members = self.bench.experiments.runs(self.experiment.id)
    return next(f"{run.arm} seed {run.seed}" for run in members if run.id == run_id)

  def check(self, runs: Sequence[Run]) -> None:
    """RunError if a run failed for another reason than divergence: there is nothing to judge."""
    failed = [run for run in runs if not run.finished]
    if failed:
      again = "starts all runs anew" if self.bench.anew else "continues them"
      if any(run.id in self.refused for run in failed):
        again = "fails alike as long as the cause stands"
      raise RunError(
        f"{len(failed)} of {counted(len(runs), 'run')} failed, no verdict; the same command "
        f"{again}:\n" + self._listed(failed)
      )

  def conclude(self, judgement: Judgement, runs: Sequence[Run], summary: bool = False) -> Path:
    """Store the judgement, write the report and say where; then a diverged run is a RunError.

    summary: print the report's head and results too.
    """
    conclusion = {"reason": judgement.reason, **judgement.numbers}
    self.bench.experiments.conclude(self.experiment.id, judgement.verdict, conclusion)
    path = write_report(self.bench.root, self.experiment.id)
    if summary:
      self.bench.console.print(terminal_summary(self.bench.root, self.experiment.id))
    self.bench.console.print(plain(f"report: {path}"), soft_wrap=True)
    diverged = [run for run in runs if run.status == "failed"]
    if diverged:
      told = f"{len(diverged)} of {counted(len(runs), 'run')} diverged:\n"
      raise RunError(told + self._listed(diverged))
    return path

  def _listed(self, runs: Sequence[Run]) -> str:
    """A line a run: what it is, its error, its log."""
    return "\n".join(
      f"{r.id} ({r.arm} seed {r.seed}): {r.error}; log: {Root(self.bench.root).logs(r.id)}"
      for r in runs
    )


def label(arm: Arm, seed: int) -> str:
  return f"{arm.name} seed {seed}"


def _since(run: Run) -> str:
  """From when a run is, and what of its versions and host is another one now."""
  return f" ({'; '.join([f'of {run.updated[:10]}', *changes(run)])})"


def suite_metric(hypotheses: Sequence[Hypothesis]) -> str | None:
  """The metric of a hypothesis about a suite, if one is."""
  return next((h.metric for h in hypotheses if h.metric.startswith("eval/")), None)


def changes(run: Run) -> list[str]:
  """Versions and host that are others now than a run was recorded with."""
  now = environment() | {"host": socket.gethostname()}
  then = run.environment | {"host": run.host}
  return [f"{k} {then.get(k, '—')}, now {now[k]}" for k in now if then.get(k) != now[k]]


class SideBySide:
  """Runs of an experiment that a pool executes."""

  def __init__(self, work: Work, display: Display, pool: Pool):
    self.work, self.display, self.pool = work, display, pool
    self.lines: dict[str, Line] = {}  # of each run under way
    self.errors: list[RunError] = []
    self.said: set[str] = set()  # runs of other processes

  def runs(self, pairs: Sequence[tuple[Arm, int]]) -> list[Run]:
    """The run of each pair, in their order. A run that crashes does not stop the others."""
    found: dict[tuple[str, int], Run] = {}
    pair_of: dict[str, tuple[Arm, int]] = {}  # of a run under way
    waiting = deque(turns(pairs, len(self.pool.slots)))
    elsewhere: deque[tuple[Arm, int]] = deque()
    try:
      while waiting or elsewhere or self.pool.running:
        while (slot := self.pool.free()) and (pair := self.next(waiting)):
          arm, seed = pair
          run = self.work.take_up(arm, seed, self.display)
          if run is None:
            self.wait_for(arm, seed)
            elsewhere.append(pair)
            continue
          if run.finished:
            found[arm.name, seed] = run
            continue
          pair_of[run.id] = pair
          self.start(slot, Job(run.id, arm.at_seed(seed)), label(arm, seed))
        for handle in self.pool.running:
          self.lines[handle.job.run].idle(handle.failure, handle.state)
        for handle in self.pool.ended():
          arm, seed = pair_of[handle.job.run]
          if self.taken(handle, arm, seed):
            elsewhere.append((arm, seed))
          elif run := self.end(handle):
            found[arm.name, seed] = run
        if elsewhere and not waiting:
          time.sleep(0 if self.pool.running else ELSEWHERE_S)
          waiting, elsewhere = elsewhere, deque()
    except KeyboardInterrupt as interrupt:
      launch.finish(self.pool.running)
      raise self.interrupted() from interrupt
    if self.errors:
      raise RunError("\n".join(map(str, self.errors)))
    return [found[arm.name, seed] for arm, seed in pairs]

  def next(self, waiting: deque[tuple[Arm, int]]) -> tuple[Arm, int] | None:
    """Take the first pair whose computation is not under way, or None."""
    under_way = {fingerprint(handle.job.config) for handle in self.pool.running}
    for pair in waiting:
      if fingerprint(pair[0].at_seed(pair[1])) not in under_way:
        waiting.remove(pair)
        return pair
    return None

  def taken(self, handle: Handle, arm: Arm, seed: int) -> bool:
    """Whether another process, which also found the run left, took it up before our ranks did."""
    if not self.work.bench.experiments.held_elsewhere(handle.job.run):
      return False
    self.lines.pop(handle.job.run).end("taken up elsewhere")
    self.wait_for(arm, seed)
    return True

  def wait_for(self, arm: Arm, seed: int) -> None:
    """Say once that another process is at a run."""
    name = label(arm, seed)
    if name not in self.said:
      self.said.add(name)
      self.display.say(f"{name}: another process is at it; waiting for its end")

  def start(self, slot: Slot, job: Job, name: str) -> None:
    line = self.display.line(name, job.config.steps, f"starting {job.run}")
    self.lines[job.run] = line
    slot.handle = slot.begin(job, line.follow)

  def end(self, handle: Handle) -> Run | None:
    """The run of a job that ended; None, and its error is kept, if it has no outcome."""
    line = self.lines.pop(handle.job.run)
    try:
      return self.work.outcome(line, handle)
    except RunError as error:
      self.errors.append(error)
      return None

  def interrupted(self) -> RunError:
    """What an interrupt left: every run under way has saved its state."""
    how = "it was told to"
    errors = [self.work.stopped(run, how) for run in self.lines]
    if not errors:
      self.work.bench.experiments.set_status(self.work.experiment.id, "interrupted")
    return RunError("\n".join(map(str, errors)) or f"stopped before its first run: {how}")


def turns(pairs: Sequence[tuple[Arm, int]], num_slots: int) -> list[tuple[Arm, int]]:
  """The order in which pairs start: with several slots the arms of each next seed begin one
  further, so that no slot has always the same arm, whatever a slot's GPU is like.
  """
  groups = [list(group) for _, group in groupby(pairs, key=lambda pair: pair[1])]
  if num_slots == 1:
    return list(pairs)
  return [pair for n, group in enumerate(groups) for pair in rotated(group, n)]


def rotated(group: list[tuple[Arm, int]], by: int) -> list[tuple[Arm, int]]:
  first = by % len(group)
  return group[first:] + group[:first]
