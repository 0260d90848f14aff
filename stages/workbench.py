"""The open records of one command, and the arms that it prepares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config, fingerprint
from nmoe.data.mixture import load_mixture
from nmoe.data.prepare import clear_unfinished, prepare
from nmoe.data.sources import check_there
from nmoe.data.tokenizer import get as get_tokenizer
from nmoe.files import resolved
from nmoe.records.experiments import Experiments
from nmoe.records.provenance import REPO, provenance
from nmoe.records.reader import ArmRecord, Branch, Hypothesis, Point
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.admission import admit, admit_with_data
from stages.text import plain


@dataclass(frozen=True)
class Arm:
  """One configuration of an experiment with its prepared data.

  point: its place on the axes of a sweep, such as {"width": 128, "lr": 0.003}. branches: by seed,
  the checkpoints of other runs with which its runs begin; {}: all begin with their first step.
  """

  name: str
  config: Config
  data: Path
  point: Point = field(default_factory=dict)
  branches: Mapping[int, Branch] = field(default_factory=dict)

  def at_seed(self, seed: int) -> Config:
    return configs.changed(self.config, {"train.seed": seed})

  def fingerprint(self, seed: int) -> str:
    """Of what its run at a seed computes, with its data and the checkpoint that it begins with."""
    branch = str(self.branches[seed]) if seed in self.branches else ""
    return fingerprint(self.at_seed(seed), self.data.name, branch)


@dataclass
class Workbench:
  """The open records of one command, which the end of its `with` closes, and the code of its runs.

  anew: the command has an experiment of its own, executes its runs by `repeat` and takes up none
  of an earlier call: what it reads, checkpoints of every step or a profile, depends on keys that
  no fingerprint holds.
  """

  root: Path
  experiments: Experiments
  console: Console
  commit: str
  patch: str
  code_version: str
  anew: bool

  def __enter__(self) -> Workbench:
    return self

  def __exit__(self, *error: object) -> None:
    self.experiments.close()

  @classmethod
  def open(cls, root: str, console: Console, anew: bool = False) -> Workbench:
    folder = resolved(root)
    commit, patch, code_version = provenance(REPO)
    records = Experiments(folder)
    records.wait_longer()
    return cls(folder, records, console, commit, patch, code_version, anew)

  def arms(self, configs: Mapping[str, Config]) -> tuple[Arm, ...]:
    """Prepare the arms' data, by name, once none of them can be seen to fail.

    What arm raises, and for any arm before the first one's data are prepared.
    """
    for config in configs.values():
      admit(config, Root(self.root))
      check_there(load_mixture(config.data.mixture).sources)
    return tuple(self.arm(name, config) for name, config in configs.items())

  def arm(self, name: str, config: Config) -> Arm:
    """Prepare the arm's data (or find it prepared).

    ConfigError, DataError, TargetError, CheckpointError if its run can be seen to fail, before the
    data are prepared if these have no part in it.
    """
    admit(config, Root(self.root))
    mixture = Path(config.data.mixture)
    folder = prepared(mixture, config.data.tokenizer, self.root, self.console)
    admit_with_data(config, Root(self.root), folder)
    return Arm(name, config, folder)

  def plan(self, arm: Arm) -> ArmRecord:
    """An arm as the records plan it: what it computes, whatever its seed, with which code."""
    begins = ", ".join(str(branch) for _, branch in sorted(arm.branches.items()))
    computation = fingerprint(arm.at_seed(0), arm.data.name, begins)
    return ArmRecord(arm.name, arm.point, f"{computation}-{self.code_version}")


def check(config: Config, console: Console) -> None:
  """Raise what keeps a configuration's run from its first step; its data are prepared.

  For a command that needs torch, before it imports that.
  """
  with Workbench.open(config.run.root, console) as bench:
    bench.arm("checked", config)


def prepared(
  mixture: Path, tokenizer: str, root: Path, console: Console, verify: bool = False
) -> Path:
  """The folder of a mixture's prepared data, made now if it is not there, with a progress line.

  verify: read and compare every file of it, also those of unchanged size and time.
  """
  for left in clear_unfinished(root):
    console.print(plain(f"removed {left}: a killed prep-mixture had left it"), soft_wrap=True)
  with console.status(plain(f"preparing {mixture.name}")) as status:

    def show(source: str, documents: int, num_bytes: int) -> None:
      done = f"{source}, {counted(documents, 'document')}, {num_bytes / 1e6:,.0f} MB"
      status.update(plain(f"preparing {mixture.name}: {done}"))

    return prepare(load_mixture(mixture), get_tokenizer(tokenizer), root, show, verify)


def hypothesis_of(config: Config) -> Hypothesis:
  """What a configuration's [experiment] claims."""
  e = config.experiment
  return Hypothesis(e.statement, e.metric, e.direction, e.min_effect)


def seeds_of(config: Config) -> range:
  """The seeds of an experiment: they count up from the configuration's own."""
  return range(config.train.seed, config.train.seed + config.experiment.seeds)
