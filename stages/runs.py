"""What every stage does with a run: prepare its data, find it in the records or execute it, show progress."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nmoe import config as configs
from nmoe.config import Config
from nmoe.errors import RunError
from nmoe.experiments import Experiment, Experiments, Run, provenance
from nmoe.prepare import load_mixture, prepare
from nmoe.tokenizer import get as get_tokenizer
from stages import launch

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "datasets", "tiktoken", "duckdb", "quack-kernels", "nvidia-cutlass-dsl")


@dataclass(frozen=True)
class Arm:
  """One configuration of an experiment with its prepared data."""

  name: str
  config: Config
  data: Path

  def at_seed(self, seed: int) -> Config:
    return self.config.with_values(**{"train.seed": seed})


@dataclass
class Workbench:
  """The open records of one command, and where it writes."""

  root: Path
  experiments: Experiments
  console: Console
  commit: str
  patch: str
  code_version: str

  @classmethod
  def open(cls, root: str, console: Console) -> Workbench:
    folder = Path(root).resolve()
    commit, patch, code_version = provenance(REPO)
    return cls(folder, Experiments(folder), console, commit, patch, code_version)

  def experiment(self, stage: str, config: Config, arms: list[Arm]) -> Experiment:
    """Write the hypothesis down, or find it: the newest experiment that asks the same of the same runs."""
    e = config.experiment
    asked = (stage, e.name, e.statement, e.metric, e.direction, e.min_effect)
    wanted = {
      (configs.fingerprint(arm.at_seed(seed), arm.data.name), self.code_version)
      for arm in arms
      for seed in seeds_of(config)
    }
    for found in self.experiments.list():
      same = (found.stage, found.name, found.statement, found.metric, found.direction, found.min_effect)
      members = {(r.fingerprint, r.code_version) for r in self.experiments.runs(found.id)}
      if same == asked and members <= wanted:
        return found
    return self.experiments.create(
      e.name, stage, e.statement, e.metric, e.direction, e.min_effect
    )

  def arm(self, name: str, config: Config) -> Arm:
    """Prepare the arm's data (or find it prepared)."""
    mixture = load_mixture(Path(config.data.mixture))
    with self.console.status(f"preparing data {Path(config.data.mixture).name}"):
      data = prepare(mixture, get_tokenizer(config.data.tokenizer), self.root)
    return Arm(name, config, data)

  def run(self, experiment: Experiment, arm: Arm, seed: int, progress: Progress) -> tuple[Run, bool]:
    """The completed run of an arm at a seed, and whether it was found in the records.

    A completed run of the same fingerprint, data and code is reused; an interrupted one is continued.
    Raises RunError if it fails, with what it left in its log.
    """
    config = arm.at_seed(seed)
    key = (configs.fingerprint(config, arm.data.name), arm.data.name, seed, self.code_version)
    done = self.experiments.find_completed(*key)
    if done is not None:
      self.experiments.attach(experiment.id, done.id, arm.name)
      return done, True
    run = self.experiments.find_unfinished(*key)
    if run is None:
      run = self._start(experiment, arm, seed, config)
    else:
      self.experiments.attach(experiment.id, run.id, arm.name)
    self._execute(run, config, f"{arm.name} seed {seed}", progress)
    return self.experiments.run(run.id), False

  def _start(self, experiment: Experiment, arm: Arm, seed: int, config: Config) -> Run:
    return self.experiments.start_run(
      experiment.id,
      arm.name,
      seed,
      toml=configs.to_toml(config),
      fingerprint=configs.fingerprint(config, arm.data.name),
      data_digest=arm.data.name,
      code_version=self.code_version,
      commit=self.commit,
      diff=self.patch,
      environment=environment(),
      target=config.target.arch,
    )

  def _execute(self, run: Run, config: Config, label: str, progress: Progress) -> None:
    total = config.schedule.total_tokens // config.schedule.batch_tokens
    task = progress.add_task(label, total=total, note=f"starting {run.id}")

    def show(line: dict) -> None:
      note = f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s"
      progress.update(task, completed=line["step"], note=note)

    self.experiments.release(run.id)
    status = launch.run(self.root, run.id, config, show)
    found = self.experiments.run(run.id)
    if status != 0 or found.status != "completed":
      progress.update(task, note=f"[red]{found.status}")
      raise RunError(
        f"run {run.id} ({label}) ended with status {status}, recorded as {found.status}: "
        f"{found.error or 'no error was recorded'}\n{launch.tail(self.root, run.id)}"
      )


def seeds_of(config: Config) -> range:
  """The seeds of an experiment: they count up from the configuration's own."""
  return range(config.train.seed, config.train.seed + config.experiment.seeds)


def progress_display(console: Console) -> Progress:
  return Progress(
    TextColumn("{task.description:<18}"),
    BarColumn(bar_width=30),
    TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
    TextColumn("{task.fields[note]}"),
    TimeRemainingColumn(),
    console=console,
  )


def environment() -> dict[str, str]:
  """The versions and the machine that a record keeps."""
  found = {"python": sys.version.split()[0], "platform": platform.platform()}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found
