"""The grid of a sweep: which arms there are, which follow from results, and the judgement.

It needs no torch, so that what a file gets wrong is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import ConfigError
from nmoe.wording import counted
from stages.judge import transfer
from stages.judge.table import Judgement, Result, Table
from stages.judge.transfer import Scale, finite_at
from stages.proxy.file import (
  CONTROLS,
  GROUPS,
  ScalePlan,
  SweepFile,
  load_sweep,
  without_rule,
)
from stages.proxy.recommend import check_target, transferred
from stages.workbench import Arm, Workbench

METRIC = "val/loss"
HEALTH = ("load/max_over_mean", "load/dead", "optim/clipped")
MAX_CLIPPED = 0.1  # share of steps


def loaded(path: Path) -> SweepFile:
  """A sweep whose target its rule reaches, and whose budget has room for what is registered."""
  file = load_sweep(path)
  check_target(file)
  Sweep.planned(file).check_budget()
  return file


@dataclass(frozen=True)
class Place:
  """A point of the grid: group of rates, scale, log2 of the factor on the base's rates."""

  group: str
  scale: str
  x: float

  @property
  def name(self) -> str:
    return f"{self.group} {self.scale} {self.x:+g}"


@dataclass
class Sweep:
  """The grid of a file: which arms there are, and which follow from results."""

  file: SweepFile
  scales: Mapping[str, ScalePlan]
  data: Path
  arms: dict[Place, Arm]
  coords: Mapping[str, Any] = field(default_factory=dict)  # what the check found before the first

  @classmethod
  def of(cls, file: SweepFile, bench: Workbench) -> Sweep:
    return cls.planned(file, bench.arm("base", file.base).data)

  @classmethod
  def planned(cls, file: SweepFile, data: Path = Path()) -> Sweep:
    """The grid, whose arms cannot run without `data`."""
    return cls(file, {scale.name: scale for scale in file.scales}, data, {})

  @property
  def ends(self) -> tuple[str, str]:
    return self.file.scales[0].name, self.file.scales[-1].name

  @property
  def seeds(self) -> range:
    first = self.file.base.train.seed
    return range(first, first + self.file.sweep.seeds)

  def lines(self) -> list[tuple[str, str]]:
    """Every (group, scale) that has a grid: joint at all scales, the others at both ends."""
    s = self.file.sweep
    found = [("joint", name) for name in self.scales]
    found += [(group, end) for group in s.vary if group != "joint" for end in self.ends]
    return found + [(control, self.ends[1]) for control in s.control]

  def octaves(self, group: str) -> float:
    s = self.file.sweep
    return math.log2(s.router_step if group == "router_lr" and s.router_step else s.step)

  def first(self) -> list[tuple[Arm, int]]:
    """The first seed's grids, as registered before the first run."""
    points = self.file.sweep.points
    return [
      (self.arm(Place(group, scale, (j - points // 2) * self.octaves(group))), self.seeds[0])
      for group, scale in self.lines()
      for j in range(points)
    ]

  def within_reach(self, group: str, scale: str) -> list[Place]:
    """The points of a line, registered or beyond."""
    s = self.file.sweep
    first = -(s.points // 2) - s.extend
    xs = range(first, first + s.points + 2 * s.extend)
    return [Place(group, scale, x * self.octaves(group)) for x in xs]

  def check_budget(self) -> None:
    """ConfigError if the budget is less than what is registered: the grids and the repeats."""
    s, lines = self.file.sweep, self.lines()
    repeated = sum(scale in self.ends for _, scale in lines) * 3 * (s.seeds - 1)
    registered = len(lines) * s.points + repeated
    if registered > self.file.budget.runs:
      raise ConfigError(
        f"{self.file.path}: budget.runs = {self.file.budget.runs}, but the registered points are "
        f"{registered} ({counted(len(lines), 'grid')} of {s.points}, {counted(repeated, 'repeat')} "
        "at other seeds); raise it, or lower points, seeds or the number of scales"
      )

  def arm(self, place: Place) -> Arm:
    if place not in self.arms:
      scale = self.scales[place.scale]
      config, control = scale.config, place.group in CONTROLS
      config = without_rule(config, place.group) if control else config
      point = {
        "group": place.group,
        "scale": place.scale,
        "ratio": scale.ratio,
        "log2_rate": place.x,
      }
      self.arms[place] = Arm(place.name, rated(config, place.group, place.x), self.data, point)
    return self.arms[place]

  def further(self, table: Table) -> Sequence[tuple[Arm, int]]:
    """Points beyond the edge where a best one lies; when all lie inside, the other seeds."""
    budget = self.file.budget
    if budget.device_seconds and _seconds(table) >= budget.device_seconds:
      return ()
    return self._asked(seen(table))[: budget.runs - len(table.results)]

  def _asked(self, grids: Mapping[tuple[str, str], transfer.Seeds]) -> list[tuple[Arm, int]]:
    """What would follow under any budget."""
    more = [p for line in self.lines() if (p := self._beyond(line, grids[line]))]
    return [(self.arm(place), self.seeds[0]) for place in more] or self._repeats(grids)

  def _beyond(self, line: tuple[str, str], seeds: transfer.Seeds) -> Place | None:
    """The next point outward, if the best or every point so far asks for one."""
    s, (group, scale) = self.file.sweep, line
    grid = seeds[self.seeds[0]]
    if len(seeds) > 1 or len(grid) >= s.points + s.extend:
      return None
    finite = [x for x in grid if finite_at(grid, x)]
    best = min(finite, key=grid.get) if finite else min(grid)
    if best == min(grid):
      return Place(group, scale, best - self.octaves(group))
    return Place(group, scale, best + self.octaves(group)) if best == max(grid) else None

  def _repeats(self, grids: Mapping[tuple[str, str], transfer.Seeds]) -> list[tuple[Arm, int]]:
    """The best three points of both ends at the other seeds, those that are missing."""
    found = []
    for seed in self.seeds[1:]:
      for group, scale in self.lines():
        seeds = grids[group, scale]
        if scale not in self.ends or seed in seeds:
          continue
        grid = seeds[self.seeds[0]]
        best = transfer.fit({0: grid}).best
        near = [x for x in grid if abs(x - best) <= self.octaves(group) + 1e-9]
        found += [(self.arm(Place(group, scale, x)), seed) for x in sorted(near)]
    return found

  def judge(self, table: Table) -> Judgement:
    grids = seen(table)

    def scale(group: str, name: str) -> Scale:
      return Scale(name, self.scales[name].ratio, grids[group, name])

    groups = {
      group: [scale(group, name) for g, name in self.lines() if g == group]
      for group in self.file.sweep.vary
    }
    controls = {  # at the base the rule changes nothing
      name: [scale("joint", self.ends[0]), scale(name, self.ends[1])]
      for name in self.file.sweep.control
    }
    found = transfer.judge(groups, controls, self.file.limits)
    health = self._health(table)
    said = found.as_dict()
    numbers = {
      **said,
      "transfer": transferred(self.file, said["groups"]),
      "limits": vars(self.file.limits),
      "points": [_point(result) for result in table.results],
      "health": health,
      "budget": self._budget(table),
      "coords": self.coords,
      "sweep": self.file.text,
    }
    notes = (found.reason, self._cut_short(table, grids), confounded(health))
    return Judgement(found.verdict, " ".join(filter(None, notes)), numbers)

  def _cut_short(self, table: Table, grids: Mapping[tuple[str, str], transfer.Seeds]) -> str:
    """What the budget kept from being run; "" if nothing."""
    if not (missing := self._asked(grids)):
      return ""
    b, seconds = self.file.budget, _seconds(table)
    limit = f"{seconds:,.0f} s of {b.device_seconds:,g} s, " if b.device_seconds else ""
    return (
      f"The budget ended the sweep ({limit}{len(table.results)} of {counted(b.runs, 'run')}) "
      f"before what its points ask for, {len(missing)} more at least; raise it and call again."
    )

  def _health(self, table: Table) -> dict[str, dict[str, float]]:
    """What else may differ between scales, mean over the joint points that completed."""
    found = {}
    for name, scale in self.scales.items():
      of = [
        r.values
        for r in table.results
        if (r.point["group"], r.point["scale"], r.diverged) == ("joint", name, False)
      ]
      s = scale.config.schedule
      found[name] = {"warmup_steps": s.warmup_tokens / s.batch_tokens} | {
        tag: sum(v[tag] for v in of) / len(of) for tag in HEALTH if of and tag in of[0]
      }
    return found

  def _budget(self, table: Table) -> dict[str, float]:
    return {
      "runs_asked": self.file.budget.runs,
      "runs": len(table.results),
      "diverged": sum(r.diverged for r in table.results),
      "device_seconds_asked": self.file.budget.device_seconds,
      "device_seconds": _seconds(table),
      "tokens": sum(r.values.get("tokens", 0) for r in table.results),
    }


def _seconds(table: Table) -> float:
  return sum(r.values.get("wall_s", 0.0) for r in table.results)


def confounded(health: Mapping[str, Mapping[str, float]]) -> str:
  """What may stand behind a shift beside the rates; "" if nothing. Clipping weighs folded tensors
  differently at each scale.
  """
  notes = [
    f"{100 * of['optim/clipped']:.0f} % of the steps at {name} were clipped, which weighs tensors "
    "differently at each scale: repeat with a larger optim.clip_norm."
    for name, of in health.items()
    if of.get("optim/clipped", 0.0) > MAX_CLIPPED
  ]
  notes += [
    f"dead experts of a run at {name}: {of['load/dead']:.3g}."
    for name, of in health.items()
    if of.get("load/dead", 0.0) > 0
  ]
  return " ".join(notes)


def rated(config: Config, group: str, x: float) -> Config:
  """The configuration with a group's rate, or all, times 2^x."""
  chosen = GROUPS if group in ("joint", *CONTROLS) else (group,)
  return configs.changed(
    config, {f"optim.{key}": getattr(config.optim, key) * 2.0**x for key in chosen}
  )


def seen(table: Table) -> dict[tuple[str, str], dict[int, dict[float, float]]]:
  """(group, scale) -> seed -> x -> loss, NaN where the run diverged."""
  found: dict[tuple[str, str], dict[int, dict[float, float]]] = {}
  for r in table.results:
    line = found.setdefault((str(r.point["group"]), str(r.point["scale"])), {})
    loss = math.nan if r.diverged else r.values[METRIC]
    line.setdefault(r.seed, {})[float(r.point["log2_rate"])] = loss
  return found


def _point(r: Result) -> dict[str, Any]:
  loss = None if r.diverged else r.values[METRIC]
  return {**r.point, "seed": r.seed, "loss": loss}
