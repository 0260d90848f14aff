"""What every stage does with a run: prepare its data, find it in the records or execute it, show
progress.
"""

from __future__ import annotations

import platform
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path

from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config, fingerprint
from nmoe.data.prepare import load_mixture, prepare
from nmoe.data.tokenizer import get as get_tokenizer
from nmoe.errors import RunError
from nmoe.records.experiments import Experiments
from nmoe.records.measures import MEASURES
from nmoe.records.provenance import provenance
from nmoe.records.reader import ArmRecord, Experiment, Hypothesis, Run
from nmoe.records.root import Root
from nmoe.train.progress import Entry
from stages.judge.table import Point
from stages.launch import local as launch
from stages.launch.display import Display, Line
from stages.launch.local import Handle, Job, Launcher
from stages.launch.pool import Pool, Slot, slots
from stages.report.html import write_report
from stages.report.terminal import terminal_summary
from stages.text import plain

REPO = Path(__file__).resolve().parent.parent
PACKAGES = (
  "torch",
  "numpy",
  "datasets",
  "tiktoken",
  "duckdb",
  "quack-kernels",
  "nvidia-cutlass-dsl",
)


@dataclass(frozen=True)
class Arm:
  """One configuration of an experiment with its prepared data.

  point: its place on the axes of a sweep, such as {"width": 128, "lr": 0.003}.
  """

  name: str
  config: Config
  data: Path
  point: Point = field(default_factory=dict)

  def at_seed(self, seed: int) -> Config:
    return configs.changed(self.config, {"train.seed": seed})


@dataclass
class Workbench:
  """The open records of one command, and where it writes.

  anew: the command executes its runs by `repeat` and takes up none of an earlier call: what it
  reads, checkpoints of every step or a profile, depends on keys that no fingerprint holds.
  """

  root: Path
  experiments: Experiments
  console: Console
  commit: str
  patch: str
  code_version: str
  anew: bool

  @classmethod
  def open(cls, root: str, console: Console, anew: bool = False) -> Workbench:
    folder = Path(root).resolve()
    commit, patch, code_version = provenance(REPO)
    return cls(folder, Experiments(folder), console, commit, patch, code_version, anew)

  def experiment(self, stage: str, config: Config, arms: list[Arm]) -> Experiment:
    """The experiment of one hypothesis, a configuration's own, over the configuration's seeds."""
    e = config.experiment
    return self.planned(stage, e.name, (hypothesis_of(config),), arms, seeds_of(config))

  def planned(
    self,
    stage: str,
    name: str,
    hypotheses: Sequence[Hypothesis],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    grows: bool = False,
  ) -> Experiment:
    """Write the hypotheses down, or find them: the newest experiment that asks the same of the same
    runs, and of no others, unless it `grows`.
    """
    planned = [self.arm_record(arm) for arm in arms]
    return self.experiments.find_or_create(name, stage, hypotheses, planned, seeds, grows)

  @contextmanager
  def carrying(self, experiment: Experiment) -> Iterator[None]:
    """While its runs are executed and judged: whatever ends that before a conclusion, the record
    says so.
    """
    self.experiments.set_status(experiment.id, "running")
    try:
      yield
    finally:
      if self.experiments.find(experiment.id).status == "running":
        self.experiments.mark_interrupted()
        self.experiments.set_status(experiment.id, "failed")

  def arm_record(self, arm: Arm) -> ArmRecord:
    """An arm as the records plan it: what it computes, whatever its seed, with which code."""
    computation = fingerprint(arm.at_seed(0), arm.data.name)
    return ArmRecord(arm.name, arm.point, f"{computation}-{self.code_version}")

  def arm(self, name: str, config: Config) -> Arm:
    """Prepare the arm's data (or find it prepared)."""
    mixture = Path(config.data.mixture)
    return Arm(name, config, prepared(mixture, config.data.tokenizer, self.root, self.console))

  def run_all(self, experiment: Experiment, pairs: Sequence[tuple[Arm, int]]) -> list[Run]:
    """The run of every arm and seed, in their order: found finished, continued, or executed from
    its start, side by side in the slots of this machine.

    Only a run of the same fingerprint, data and code is found; a continued one takes over what the
    configuration now says of free keys. Those returned are completed or failed. RunError if one was
    stopped before either, after the others have ended; RecordError if another process is at one.
    """
    devices = slots(max((arm.config for arm, _ in pairs), key=lambda c: c.launch.ranks))
    afresh = any(MEASURES[h.metric].device_dependent for h in experiment.hypotheses)
    with (
      Display(self.console) as display,
      launch.interruptible(),
      Pool(Launcher(self.root), devices, afresh) as pool,
    ):
      return SideBySide(self, experiment, display, pool).runs(pairs)

  def take_up(self, experiment: Experiment, arm: Arm, seed: int, display: Display) -> Run:
    """The run of an arm at a seed: finished, or recorded and to be executed."""
    config, label = arm.at_seed(seed), f"{arm.name} seed {seed}"
    key = (fingerprint(config, arm.data.name), arm.data.name, seed, self.code_version)
    done = self.experiments.find_finished(*key)
    if done is not None:
      self.experiments.attach(experiment.id, done.id, arm.name)
      outcome = "completed" if done.status == "completed" else "diverged"
      display.say(f"{label}: {outcome} before as run {done.id}, reused")
      return done
    run = self.experiments.find_unfinished(*key)
    if run is None:
      return self.start(experiment, arm, seed)
    self.hand_over(run, config)
    self.experiments.attach(experiment.id, run.id, arm.name)
    display.say(f"{label}: {run.status} before as run {run.id}, continued")
    return run

  def repeat(
    self,
    experiment: Experiment,
    arm: Arm,
    seed: int,
    display: Display,
    trace: Path | None = None,
    follow: Callable[[Entry], None] = lambda _: None,
  ) -> Run:
    """Execute a new run of an arm at a seed, whatever the records hold.

    trace: profile it into this folder. follow receives each line of its progress as it comes.
    """
    run = self.start(experiment, arm, seed)
    job = Job(run.id, arm.at_seed(seed), trace=trace)
    return self.execute(experiment, job, f"{arm.name} seed {seed}", display, follow)

  def check(self, experiment: Experiment, runs: list[Run]) -> None:
    """RunError if a run failed for another reason than divergence: there is nothing to judge."""
    failed = [run for run in runs if not run.finished]
    if failed:
      self.experiments.set_status(experiment.id, "failed")
      again = "starts all runs anew" if self.anew else "continues them"
      raise RunError(
        f"{len(failed)} of {len(runs)} runs failed, no verdict; the same command {again}:\n"
        + self._listed(failed)
      )

  def close(self, experiment: Experiment, verdict: str, outcome: dict, runs: list[Run]) -> Path:
    """Store the outcome, write the report and say both; a diverged run is a RunError at the end."""
    self.experiments.conclude(experiment.id, verdict, outcome)
    path = write_report(self.root, experiment.id)
    self.console.print(terminal_summary(self.root, experiment.id))
    self.console.print(plain(f"report: {path}"), soft_wrap=True)
    diverged = [run for run in runs if run.status == "failed"]
    if diverged:
      raise RunError(f"{len(diverged)} of {len(runs)} runs diverged:\n" + self._listed(diverged))
    return path

  def start(self, experiment: Experiment, arm: Arm, seed: int) -> Run:
    """Record a new run of an arm at a seed, to be executed by a Job."""
    config = arm.at_seed(seed)
    run = self.experiments.start_run(
      experiment.id,
      arm.name,
      seed,
      toml=configs.to_toml(config),
      fingerprint=fingerprint(config, arm.data.name),
      data_digest=arm.data.name,
      code_version=self.code_version,
      commit=self.commit,
      diff=self.patch,
      environment=environment(),
      target=config.target.arch,
    )
    self.experiments.release(run.id)
    return run

  def hand_over(self, run: Run, config: Config) -> None:
    """Let an unfinished run go on under this configuration, which may change no identity key.

    RecordError if another process is at it.
    """
    self.experiments.claim(run.id)
    self.experiments.update_run(run.id, toml=configs.to_toml(config))
    self.experiments.release(run.id)

  def _listed(self, runs: list[Run]) -> str:
    """A line a run: what it is, its error, its log."""
    return "\n".join(
      f"{r.id} ({r.arm} seed {r.seed}): {r.error}; log: {Root(self.root).logs(r.id)}" for r in runs
    )

  def execute(
    self,
    experiment: Experiment,
    job: Job,
    label: str,
    display: Display,
    follow: Callable[[Entry], None] = lambda _: None,
  ) -> Run:
    """Execute a recorded run and return it, completed or failed; RunError if it stopped before."""
    line = display.line(label, job.config.steps, f"starting {job.run}")

    def show(entry: Entry) -> None:
      line.follow(entry)
      follow(entry)

    self.experiments.set_status(experiment.id, "running")
    try:
      ended = launch.run(Launcher(self.root), job, show, lambda handle: line.idle(handle.failure))
    except KeyboardInterrupt:
      raise self.stopped(experiment, job.run, label, "it was told to") from None
    return self.outcome(experiment, label, line, ended)

  def outcome(self, experiment: Experiment, label: str, line: Line, ended: Handle) -> Run:
    """What became of a run whose ranks have ended; RunError if that is nothing to go by."""
    found = self.experiments.run(ended.job.run)
    if found.status not in ("completed", "failed"):
      line.end("stopped")
      how = f"exit status {ended.poll()}\n{ended.tail()}"
      raise self.stopped(experiment, found.id, label, how)
    line.end(found.status)
    return found

  def stopped(self, experiment: Experiment, run_id: str, label: str, how: str) -> RunError:
    """The error of a run that ended without an outcome, which the records now say."""
    self.experiments.mark_interrupted()
    self.experiments.set_status(experiment.id, "interrupted")
    again = "starts all runs anew" if self.anew else "continues it"
    return RunError(
      f"run {run_id} ({label}) stopped before its end, the same command {again}: {how}"
    )


class SideBySide:
  """Runs of an experiment that a pool executes."""

  def __init__(self, bench: Workbench, experiment: Experiment, display: Display, pool: Pool):
    self.bench, self.experiment, self.display, self.pool = bench, experiment, display, pool
    self.lines: dict[str, tuple[str, Line]] = {}  # run -> its label and its line
    self.errors: list[RunError] = []

  def runs(self, pairs: Sequence[tuple[Arm, int]]) -> list[Run]:
    """The run of each pair, in their order. A run that crashes does not stop the others."""
    found: dict[tuple[str, int], Run] = {}
    places: dict[str, tuple[str, int]] = {}  # a run under way -> the pair it is of
    waiting = deque(turns(pairs, len(self.pool.slots)))
    self.bench.experiments.set_status(self.experiment.id, "running")
    try:
      while waiting or self.pool.running:
        while (slot := self.pool.free()) and (pair := self.next(waiting)):
          arm, seed = pair
          run = self.bench.take_up(self.experiment, arm, seed, self.display)
          if run.finished:
            found[arm.name, seed] = run
            continue
          places[run.id] = arm.name, seed
          self.start(slot, Job(run.id, arm.at_seed(seed)), f"{arm.name} seed {seed}")
        for handle in self.pool.running:
          self.lines[handle.job.run][1].idle(handle.failure)
        for handle in self.pool.ended():
          run = self.end(handle)
          if run is not None:
            found[places[run.id]] = run
    except KeyboardInterrupt:
      launch.finish(self.pool.running)
      raise self.interrupted() from None
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

  def start(self, slot: Slot, job: Job, label: str) -> None:
    line = self.display.line(label, job.config.steps, f"starting {job.run}")
    self.lines[job.run] = label, line
    slot.handle = slot.begin(job, line.follow)

  def end(self, handle: Handle) -> Run | None:
    """The run of a job that ended; None, and its error is kept, if it has no outcome."""
    label, line = self.lines.pop(handle.job.run)
    try:
      return self.bench.outcome(self.experiment, label, line, handle)
    except RunError as error:
      self.errors.append(error)
      return None

  def interrupted(self) -> RunError:
    """What an interrupt left: every run under way has saved its state."""
    how = "it was told to"
    errors = [
      self.bench.stopped(self.experiment, run, label, how) for run, (label, _) in self.lines.items()
    ]
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


def prepared(mixture: Path, tokenizer: str, root: Path, console: Console) -> Path:
  """The folder of a mixture's prepared data, made now if it is not there, with a progress line."""
  with console.status(plain(f"preparing {mixture.name}")) as status:

    def show(source: str, documents: int, num_bytes: int) -> None:
      done = f"{source}, {documents:,} documents, {num_bytes / 1e6:,.0f} MB"
      status.update(plain(f"preparing {mixture.name}: {done}"))

    return prepare(load_mixture(mixture), get_tokenizer(tokenizer), root, show)


def hypothesis_of(config: Config) -> Hypothesis:
  """What a configuration's [experiment] claims."""
  e = config.experiment
  return Hypothesis(e.statement, e.metric, e.direction, e.min_effect)


def seeds_of(config: Config) -> range:
  """The seeds of an experiment: they count up from the configuration's own."""
  return range(config.train.seed, config.train.seed + config.experiment.seeds)


def environment() -> dict[str, str]:
  """The versions and the machine that a record keeps."""
  found = {"python": sys.version.split()[0], "platform": platform.platform()}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found
