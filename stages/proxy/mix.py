"""Stage 3: a swarm of mixtures, a law of their losses, a proposal, and its proof against others.

[mix]
name = "mix-cpu"
statement = "A mixture fitted on a swarm beats the natural and the uniform one at this size."
base = "cpu-32.toml"
objective = [0.5, 0.5]       # weights of the sources' held-out bits per byte, in order
target_tokens = 4000000000   # of the run that the mixture is for: caps are epochs of it
[budget]
runs = 60
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data.prepared import open_data, shares
from nmoe.errors import ConfigError
from nmoe.records.reader import Hypothesis
from nmoe.tables import parsed, ranged, typed
from stages.judge import mixture, paired
from stages.judge.table import Judgement, Result, Table
from stages.proxy.file import BudgetKeys
from stages.study import Study, carry_out
from stages.workbench import Arm, Workbench

ANCHORS = ("natural", "uniform", "centroid")
PROPOSED = "proposed"


@dataclass(frozen=True, kw_only=True)
class MixKeys:
  name: str
  statement: str
  base: str
  objective: tuple[float, ...]
  target_tokens: int = ranged(gt=0)
  epochs: float = ranged(4.0, gt=0)  # of a source at most, in the target's run
  mixtures: int = ranged(0, ge=0)  # 0: the larger of 24 and 8 · (sources + 1)
  anchor_seeds: int = ranged(3, gt=1)
  verify_seeds: int = ranged(5, gt=1)


@dataclass
class Mix:
  """The arms of a file: names -> shares, and what follows from results."""

  keys: MixKeys
  budget: BudgetKeys
  base: Config
  data: Path
  sources: tuple[str, ...]
  natural: np.ndarray
  caps: np.ndarray

  @property
  def objective(self) -> np.ndarray:
    weights = np.array(self.keys.objective)
    return weights / weights.sum()

  @property
  def seed(self) -> int:
    return self.base.train.seed

  def swarm(self) -> dict[str, np.ndarray]:
    count = self.keys.mixtures or max(24, 8 * (len(self.sources) + 1))
    found = mixture.swarm(self.natural, self.caps, count, self.seed)
    names = [*ANCHORS, *(f"mixture {n}" for n in range(len(ANCHORS), count))]
    return dict(zip(names, found, strict=True))

  def arm(self, name: str, of: np.ndarray) -> Arm:
    weights = [round(float(x), 6) for x in of]
    config = configs.changed(self.base, {"data.weights": tuple(weights)})
    return Arm(name, config, self.data, dict(zip(self.sources, weights, strict=True)))

  def first(self) -> tuple[Arm, ...]:
    return tuple(self.arm(name, of) for name, of in self.swarm().items())

  def further(self, table: Table) -> Sequence[tuple[Arm, int]]:
    """The anchors at other seeds; then, if there is a proposal, it and two of them, in pairs."""
    swarm = self.swarm()
    wanted = [(n, s) for s in range(self.keys.anchor_seeds) for n in ANCHORS]
    missing = self._missing(table, wanted)
    if not missing and (proposal := self.proposal(table)).shares is not None:
      swarm[PROPOSED] = np.array(proposal.shares)
      names = (PROPOSED, *ANCHORS[:2])
      missing = self._missing(table, [(n, s) for s in range(self.keys.verify_seeds) for n in names])
    room = self.budget.runs - len(table.results)
    return [(self.arm(name, swarm[name]), seed) for name, seed in missing][:room]

  def _missing(self, table: Table, wanted: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    have = {(r.arm, r.seed) for r in table.results}
    return [(n, self.seed + s) for n, s in wanted if (n, self.seed + s) not in have]

  def losses(self, result: Result) -> np.ndarray:
    """Bits per byte of each source's held-out text; NaN where the run diverged."""
    if result.diverged:
      return np.full(len(self.sources), math.nan)
    return np.array([result.values[f"val/bpb/{name}"] for name in self.sources])

  def scores(self, table: Table, arm: str) -> dict[int, float]:
    """seed -> the objective."""
    return {r.seed: float(self.losses(r) @ self.objective) for r in table.of(arm)}

  def proposal(self, table: Table) -> mixture.Proposal:
    """From the first seed's swarm and the anchors' noise over seeds."""
    swarm = [r for r in table.results if r.seed == self.seed and r.arm != PROPOSED]
    used = [(r, self.losses(r)) for r in swarm if not r.diverged]
    noise = self.noise(table)
    pooled = math.sqrt(np.mean([sd**2 for sd in noise.values()]))
    points = np.array([[r.point[name] for name in self.sources] for r, _ in used])
    seen = np.array([losses for _, losses in used])
    return mixture.propose(points, seen, self.objective, self.caps, pooled, self.natural)

  def noise(self, table: Table) -> dict[str, float]:
    """sd of the objective over the anchors' seeds: it depends on the mixture."""
    seeds = range(self.seed, self.seed + self.keys.anchor_seeds)
    return {
      name: float(np.std([v for s, v in self.scores(table, name).items() if s in seeds], ddof=1))
      for name in ANCHORS
    }

  def judge(self, table: Table) -> Judgement:
    proposal = self.proposal(table)
    numbers = {
      "proposal": proposal.as_dict(),
      "sources": self.sources,
      "caps": self.caps.tolist(),
      "natural": self.natural.tolist(),
      "noise": self.noise(table),
      "mixtures": [
        {**r.point, "seed": r.seed, "bpb": self.losses(r).tolist()} for r in table.results
      ],
    }
    own = self.scores(table, PROPOSED)
    if proposal.shares is None or not own:
      return Judgement("inconclusive", f"No mixture is proposed. {proposal.reason}", numbers)
    against = {name: self._against(table, name, own) for name in ANCHORS[:2]}
    numbers["against"] = {name: one.as_dict() for name, one in against.items()}
    verdicts = {one.verdict for one in against.values()}
    verdict = "confirmed" if verdicts == {"confirmed"} else "inconclusive"
    verdict = "refuted" if "refuted" in verdicts else verdict
    shown = ", ".join(f"{n} {x:.2f}" for n, x in zip(self.sources, proposal.shares, strict=True))
    reasons = " ".join(f"Against {name}: {one.reason}" for name, one in against.items())
    return Judgement(verdict, f"Proposed: {shown}. {proposal.reason} {reasons}", numbers)

  def _against(self, table: Table, name: str, own: dict[int, float]) -> paired.Paired:
    other = self.scores(table, name)
    seeds = sorted(own.keys() & other.keys())
    a, b = [other[s] for s in seeds], [own[s] for s in seeds]
    return paired.compare(a, b, direction="lower", min_effect=0.0)


def run(path: Path, console: Console) -> Path:
  """Run the swarm, propose, verify over paired seeds at the same size; returns its report."""
  table = parsed(_text(path), str(path))
  keys = typed(table.get("mix", {}), MixKeys, str(path), "mix")
  budget = typed(table.get("budget", {}), BudgetKeys, str(path), "budget")
  base = configs.load(path.parent / keys.base)
  with Workbench.open(base.run.root, console) as bench:
    mix = prepared(path, keys, budget, base, bench.arm("base", base).data)
    asked = Hypothesis(keys.statement, "val/bpb", "lower", 0.0)
    study = Study(
      keys.name, "proxy", (asked,), mix.first(), (mix.seed,), mix.judge, mix.further, False
    )
    return carry_out(study, bench).report


def _text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path}: cannot be read: {error}") from error


def prepared(path: Path, keys: MixKeys, budget: BudgetKeys, base: Config, data: Path) -> Mix:
  """The problem over prepared data. ConfigError where it has none to solve."""
  opened = open_data(data)
  names = tuple(source.name for source in opened.sources)
  if len(names) < 2 or len(keys.objective) != len(names) or min(keys.objective, default=0) < 0:
    raise ConfigError(
      f"{path}: mix.objective = {list(keys.objective)} must have a weight of 0 or more for each of "
      f"at least two sources; the mixture has {list(names)}"
    )
  tokens = np.array([opened.train_tokens[name] for name in names])
  caps = np.minimum(1.0, keys.epochs * tokens / keys.target_tokens)
  if caps.sum() < 1 or sum(keys.objective) <= 0:
    raise ConfigError(
      f"{path}: {keys.epochs:g} epochs of {tokens.sum():,} tokens are less than "
      f"mix.target_tokens = {keys.target_tokens:,}, or mix.objective is all 0; "
      "lower target_tokens or add text"
    )
  natural = np.array([shares(opened, opened.train_tokens)[name] for name in names])
  mix = Mix(keys, budget, base, data, names, natural, caps)
  registered = len(mix.swarm()) + len(ANCHORS) * (keys.anchor_seeds - 1)
  registered += 3 * keys.verify_seeds - 2 * keys.anchor_seeds
  if registered > budget.runs:
    raise ConfigError(f"{path}: budget.runs = {budget.runs}, but {registered} are needed; raise it")
  return mix
