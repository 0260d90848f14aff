"""Stage 3: a swarm of mixtures, a law of their losses, a proposal, and its proof against others.

Every run reads the share of each source's text that its tokens are of the target's, so that a
source is read through as often as in the target's run: what is scarce there is scarce here.

[mix]
name = "mix-cpu"
statement = "A mixture fitted on a swarm beats the natural and the uniform one at two sizes."
base = "cpu-32.toml"
objective = [0.5, 0.5]       # weights of the sources' held-out bits per byte, in order
target_tokens = 4000000000   # of the run that the mixture is for: caps are epochs of it
width = 2                    # of the larger size of the proof, over the base's, under the rule
[budget]
runs = 70
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data.prepared import open_data
from nmoe.errors import ConfigError
from nmoe.records.reader import Hypothesis
from nmoe.tables import nearest, parsed, ranged, read, typed
from nmoe.wording import counted
from stages.judge import mixture, paired
from stages.judge.table import Judgement, Result, Table
from stages.proxy.file import BudgetKeys, check_told, scaled
from stages.study import Study, carry_out
from stages.workbench import Arm, Workbench

ANCHORS = ("natural", "uniform", "centroid")
PROPOSED = "proposed"
EDGE = 0.01  # of a share, outside the swarm's, that is not worth a word


@dataclass(frozen=True, kw_only=True)
class MixKeys:
  name: str
  statement: str
  base: str
  objective: tuple[float, ...]
  target_tokens: int = ranged(gt=0)
  epochs: float = ranged(4.0, gt=0, le=1_000_000)  # of a source at most, in the target's run
  mixtures: int = ranged(0, ge=0)  # 0: the larger of 24 and 8 · (sources + 1)
  anchor_seeds: int = ranged(3, gt=1)
  verify_seeds: int = ranged(5, gt=1)
  width: int = ranged(2, gt=1)


@dataclass
class Mix:
  """The arms of a file: names -> shares, and what follows from results."""

  keys: MixKeys
  budget: BudgetKeys
  base: Config
  data: Path
  sources: tuple[str, ...]
  tokens: np.ndarray  # for training
  caps: np.ndarray
  sizes: dict[str, Config]  # of the proof: name -> configuration, the base's first

  @property
  def natural(self) -> np.ndarray:
    return self.tokens / self.tokens.sum()

  @property
  def objective(self) -> np.ndarray:
    weights = np.array(self.keys.objective)
    return weights / weights.sum()

  @property
  def asked(self) -> str:
    """The statement with the objective that decides on it: another one is another question."""
    weights = zip(self.sources, self.objective.tolist(), strict=True)
    shown = " + ".join(f"{weight:.3g} {name}" for name, weight in weights)
    return f"{self.keys.statement} Objective: {shown} (held-out bits per byte)."

  @property
  def seed(self) -> int:
    return self.base.train.seed

  @property
  def size(self) -> int:
    """How many mixtures the swarm has."""
    return self.keys.mixtures or max(24, 8 * (len(self.sources) + 1))

  def swarm(self) -> dict[str, np.ndarray]:
    found = mixture.swarm(self.natural, self.caps, self.size, self.seed)
    names = [*ANCHORS, *(f"mixture {n}" for n in range(len(ANCHORS), self.size))]
    return dict(zip(names, found, strict=True))

  def arm(self, name: str, of: np.ndarray, size: str = "") -> Arm:
    weights = [round(float(x), 6) for x in of]
    config = configs.changed(self.sizes[size], {"data.weights": tuple(weights)})
    point = dict(zip(self.sources, weights, strict=True)) | {"size": size}
    return Arm(f"{name} {size}".strip(), config, self.data, point)

  def first(self) -> tuple[Arm, ...]:
    return tuple(self.arm(name, of) for name, of in self.swarm().items())

  def further(self, table: Table) -> Sequence[tuple[Arm, int]]:
    """The anchors at other seeds; then, if there is a proposal, it and two of them, in pairs, at
    both sizes.
    """
    swarm = self.swarm()
    missing = self._missing(table, [self.arm(n, swarm[n]) for n in ANCHORS], self.keys.anchor_seeds)
    if not missing and (proposal := self.proposal(table)).shares is not None:
      swarm[PROPOSED] = np.array(proposal.shares)
      arms = [self.arm(n, swarm[n], size) for size in self.sizes for n in (PROPOSED, *ANCHORS[:2])]
      missing = self._missing(table, arms, self.keys.verify_seeds)
    return missing[: self.budget.runs - len(table.results)]

  def _missing(self, table: Table, arms: Sequence[Arm], seeds: int) -> list[tuple[Arm, int]]:
    have = {(r.arm, r.seed) for r in table.results}
    wanted = [(arm, self.seed + s) for s in range(seeds) for arm in arms]
    return [(arm, seed) for arm, seed in wanted if (arm.name, seed) not in have]

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
    drawn = self.swarm()
    swarm = [r for r in table.results if r.seed == self.seed and r.arm in drawn]
    used = [(r, self.losses(r)) for r in swarm if not r.diverged]
    known = [sd for sd in self.noise(table).values() if math.isfinite(sd)]
    if len(used) < len(self.sources) + 2 or not known:
      reason = (
        f"{len(swarm) - len(used)} of {len(swarm)} runs diverged: too few are left for a fit."
      )
      return mixture.Proposal(None, reason, math.nan, math.nan)
    pooled = math.sqrt(np.mean([sd**2 for sd in known]))
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
      "objective": self.objective.tolist(),
      "caps": self.caps.tolist(),
      "natural": self.natural.tolist(),
      "fraction": self.base.data.fraction,
      "noise": self.noise(table),
      "mixtures": [
        {**r.point, "arm": r.arm, "seed": r.seed, "bpb": self.losses(r).tolist()}
        for r in table.results
      ],
    }
    if proposal.shares is None or not self.scores(table, PROPOSED):
      return Judgement("inconclusive", f"No mixture is proposed. {proposal.reason}", numbers)
    numbers["epochs"] = self.epochs(proposal.shares)
    against = {
      f"{name} {size}".strip(): self._against(table, name, size)
      for size in self.sizes
      for name in ANCHORS[:2]
    }
    numbers["against"] = {name: one.as_dict() for name, one in against.items()}
    verdicts = {one.verdict for one in against.values()}
    verdict = "confirmed" if verdicts == {"confirmed"} else "inconclusive"
    verdict = "refuted" if "refuted" in verdicts else verdict
    shown = ", ".join(f"{n} {x:.2f}" for n, x in zip(self.sources, proposal.shares, strict=True))
    reasons = [f"Against {name}: {one.reason}" for name, one in against.items()]
    drawn = np.array(list(self.swarm().values()))
    beyond = extrapolated(self.sources, np.array(proposal.shares), drawn)
    said = (f"Proposed: {shown}.", proposal.reason, beyond, *reasons)
    return Judgement(verdict, " ".join(filter(None, said)), numbers)

  def epochs(self, shares: Sequence[float]) -> dict[str, float]:
    """How often the target's run reads each source through."""
    each = np.array(shares) * self.keys.target_tokens / self.tokens
    return dict(zip(self.sources, each.tolist(), strict=True))

  def _against(self, table: Table, name: str, size: str) -> paired.Paired:
    """The proposal's objective less another mixture's at a size, over the seeds of both."""
    own, other = (self.scores(table, f"{n} {size}".strip()) for n in (PROPOSED, name))
    seeds = sorted(own.keys() & other.keys())
    a, b = [other[s] for s in seeds], [own[s] for s in seeds]
    return paired.compare(a, b, direction="lower", min_effect=0.0)


def extrapolated(sources: Sequence[str], shares: np.ndarray, swarm: np.ndarray) -> str:
  """Which of the shares [S] lie outside what the mixtures [n, S] had, where no run says what the
  law does; "" if none.
  """
  lows, highs = swarm.min(0), swarm.max(0)
  beyond = [
    f"{name} {x:.2f}, in the swarm {low:.2f} to {high:.2f}"
    for name, x, low, high in zip(sources, shares, lows, highs, strict=True)
    if not low - EDGE <= x <= high + EDGE
  ]
  return f"It extrapolates: {'; '.join(beyond)}." if beyond else ""


def run(path: Path, console: Console) -> Path:
  """Run the swarm, propose, verify over paired seeds at two sizes; returns its report."""
  table = parsed(read(path, "mix"), str(path))
  for key in table.keys() - {"mix", "budget"}:
    raise ConfigError(f"{path}: unknown section [{key}]{nearest(key, ('mix', 'budget'))}")
  keys = typed(table.get("mix", {}), MixKeys, str(path), "mix")
  check_told(path, "mix", keys)
  budget = typed(table.get("budget", {}), BudgetKeys, str(path), "budget")
  base = configs.load(path.parent / keys.base)
  with Workbench.open(base.run.root, console) as bench:
    mix = prepared(path, keys, budget, base, bench.arm("base", base).data)
    asked = Hypothesis(mix.asked, "val/bpb", "lower", 0.0)
    study = Study(
      keys.name, "proxy", (asked,), mix.first(), (mix.seed,), mix.judge, mix.further, False
    )
    return carry_out(study, bench).report


def prepared(path: Path, keys: MixKeys, budget: BudgetKeys, base: Config, data: Path) -> Mix:
  """The problem over prepared data. ConfigError where it has none to solve."""
  opened = open_data(data)
  names = tuple(source.name for source in opened.sources)
  weights = keys.objective
  fits = len(weights) == len(names) >= 2
  if not fits or min(weights) < 0 or not 0 < sum(weights) < math.inf:
    raise ConfigError(
      f"{path}: mix.objective = {list(weights)} must have a weight of 0 or more, and finite, for "
      f"each of at least two sources, not 0 for all; the mixture has {list(names)}"
    )
  tokens = np.array([opened.train_tokens[name] for name in names])
  caps = np.minimum(1.0, keys.epochs * tokens / keys.target_tokens)
  if caps.sum() < 1:
    raise ConfigError(
      f"{path}: {keys.epochs:g} epochs of {tokens.sum():,} tokens are less than "
      f"mix.target_tokens = {keys.target_tokens:,}; lower target_tokens or add text"
    )
  base = repeating(path, keys, base, dict(zip(names, tokens.tolist(), strict=True)))
  large = scaled(f"{path}: mix", {"width": keys.width}, base).config
  mix = Mix(keys, budget, base, data, names, tokens, caps, {"": base, f"width{keys.width}": large})
  if mix.size < (least := len(names) + 2):
    raise ConfigError(
      f"{path}: mix.mixtures = {mix.size} is less than {least}, which a fit over "
      f"{counted(len(names), 'source')} needs; raise it, or leave it out"
    )
  registered = mix.size + len(ANCHORS) * (keys.anchor_seeds - 1)
  registered += 3 * keys.verify_seeds * len(mix.sizes) - 2 * min(
    keys.anchor_seeds, keys.verify_seeds
  )
  if registered > budget.runs:
    raise ConfigError(f"{path}: budget.runs = {budget.runs}, but {registered} are needed; raise it")
  return mix


def repeating(path: Path, keys: MixKeys, base: Config, tokens: Mapping[str, int]) -> Config:
  """The base on so little of each source that it repeats as in the target's run.

  ConfigError where a source would not fill one sample.
  """
  fraction = min(1.0, base.schedule.trained_tokens / keys.target_tokens)
  least = min(tokens, key=tokens.get)
  if math.ceil(fraction * tokens[least]) <= base.data.seq_len:
    raise ConfigError(
      f"{path}: the base trains {base.schedule.trained_tokens:,} tokens of the "
      f"{keys.target_tokens:,} of mix.target_tokens, and so much of {least!r}, with "
      f"{tokens[least]:,} tokens, is less than a sample of {base.data.seq_len + 1}; lengthen the "
      "base's run, shorten its data.seq_len or drop the source"
    )
  return configs.changed(base, {"data.fraction": fraction})
