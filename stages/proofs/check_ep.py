"""`nmoe check ep`: the certificate that N ranks train the same model as one.

Every claim is read from what the runs recorded: losses and norms from the metrics, gradients from
the first step's moments (an average that starts at zero holds the gradient times a constant),
updates from states that the run saved, the initial one among them, collective calls from a profile.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.records import checkpoint
from nmoe.records.metrics import read
from nmoe.records.reader import Run
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.judge.table import Judgement
from stages.launch.display import Display
from stages.launch.local import Job
from stages.proofs.shortened import claim, comparable, named
from stages.runs import Work, carrying
from stages.workbench import Arm, Workbench

# Largest relative deviation from one rank. At the first step the weights are the same bits, and
# what differs is the order of sums over tokens. Adam divides a gradient by its own size, which
# makes a full step of a rounding where the gradient is near zero: of Gaussian ones that err by ε of
# their norm ε/π change their sign, so that the first update deviates by 2·sqrt(ε/π), 0.06 for ε =
# 0.003. Later steps start from weights that differ by that much. In bf16 the routers then choose
# other experts for a few tokens, which may be all of an expert's.
TOLERANCE = {
  "fp32": {"first step": 1e-6, "later losses": 1e-5, "update": 1e-3, "later loads": 0.0},
  "bf16": {"first step": 1e-2, "later losses": 1e-2, "update": 2e-1, "later loads": 1e-1},
}
STATEMENT = "Any number of ranks trains the same model."
MOE_EVENTS = re.compile(r"_(Send|Receive)(Backward)?$")
FIRST = "first"  # where a run's states before and after its first step are, beside its checkpoints
AVERAGES = (".exp_avg", ".momentum")  # of gradients, by the ends of their names
COLLECTIVES = re.compile(r"nccl|gloo|c10d", re.IGNORECASE)
Pair = tuple[str, Tensor, Tensor]


class Until(NamedTuple):
  """The last steps that are compared."""

  losses: int
  updates: int
  loads: int


# In bf16, because the balance of experts multiplies a rounding: over five seeds of cpu-bf16.toml
# loads differ by at most 0.02 of their mean at the second step and by more than the mean within
# eight, where losses agree to 0.002. On an H200 small.toml's losses leap at full rates; on one and
# two ranks they were 0.0007 apart at step 4 and 0.011 at step 6, and one expert's three updates
# since the first 0.4.
BF16 = Until(losses=4, updates=1, loads=2)


@dataclass(frozen=True)
class Claim:
  ranks: str
  what: str
  found: float
  bound: float
  where: str  # of the largest deviation

  @property
  def holds(self) -> bool:
    return self.found <= self.bound


def ep(path: Path, ranks: list[int], steps: int, console: Console) -> list[Claim]:
  """Train a few steps of the configuration at every number of ranks and compare each with the
  first.

  The largest number runs twice and must repeat bit for bit. Prints the table and stores it as an
  experiment of stage "check". RunError if a claim does not hold, ConfigError if ranks don't fit.
  """
  arms, most = comparable(path, ranks, steps), max(ranks)
  config = arms[most]
  with Workbench.open(config.run.root, console, anew=True) as bench:
    data = bench.arm("data", arms[ranks[0]]).data
    planned = {r: Arm(counted(r, "rank"), arms[r], data) for r in ranks}
    asked = (named("check-ep", path), claim(STATEMENT, config), [*planned.values()], [0])
    with carrying(bench, "check", *asked) as work:
      traces = Root(bench.root).traces(work.experiment.id)
      with Display(console) as display:
        runs = {
          r: _train(work, arm, display, traces if r == most else None) for r, arm in planned.items()
        }
        again = _train(work, replace(planned[most], name=f"{counted(most, 'rank')} again"), display)
      work.check([*runs.values(), again])
      claims = list(_claims(bench.root, runs, again, config, steps, traces))
      broken = [claim for claim in claims if not claim.holds]
      reason = (
        f"{len(claims) - len(broken)} of {counted(len(claims), 'claim')} hold at ranks {ranks}."
      )
      numbers = {"rows": [vars(claim) for claim in claims]}
      show(claims, f"against launch.ranks = {ranks[0]}", console)
      work.conclude(Judgement("refuted" if broken else "confirmed", reason, numbers), [])
  if broken:
    many = f"{len(broken)} of {counted(len(claims), 'claim')}"
    raise RunError(f"{path}: {many} do not hold; the first: {broken[0]}")
  return claims


def _train(work: Work, arm: Arm, display: Display, trace: Path | None = None) -> Run:
  """A run that keeps its states before and after its first step."""
  run = work.start(arm, arm.config.train.seed)
  first = checkpoint.directory(work.bench.root, run.id) / FIRST
  return work.execute(Job(run.id, arm.config, trace=trace, first=first), display)


def _claims(
  root: Path, runs: Mapping[int, Run], again: Run, config: Config, steps: int, traces: Path
) -> Iterator[Claim]:
  ranks = list(runs)
  one, most = runs[ranks[0]], max(ranks)
  last = (steps,) * 3 if config.target.dtype == "fp32" else BF16
  until = Until(*(min(steps, step) for step in last))
  for r in ranks[1:]:
    yield from deviations(root, str(r), one, runs[r], 0, until)
  x, y = _state(root, runs[most], steps), _state(root, again, steps)
  differ = [name for name in x if not torch.equal(x[name], y[name])]
  what = "tensors that differ in a second run"
  yield Claim(str(most), what, len(differ), 0.0, min(differ, default=""))
  if math.gcd(config.rdep.group, most) > 1:
    calls = collective_calls(json.loads((traces / "trace.json").read_text())["traceEvents"])
    what = "collective calls inside the MoE layers"
    yield Claim(str(most), what, len(calls), 0.0, " ".join(calls[:3]))


def deviations(root: Path, ranks: str, a: Run, b: Run, since: int, until: Until) -> Iterator[Claim]:
  """What two runs that hold the same bits after step `since` make of the steps from there on.

  Both logged every step and kept the states of `since` and `until.updates`; if since is 0, of step
  1 too. ranks: those of b, as the claims name them.
  """
  dtype = configs.loads(a.toml).target.dtype
  bound = TOLERANCE["fp32" if dtype == "fp32" else "bf16"]
  first, later = slice(since, since + 1), slice(since + 1, until.losses)
  for tag in ("train/loss", "grad_norm/all"):
    yield _series(root, ranks, a, b, tag, first, bound["first step"])
  if since == 0:
    x, y = (_gradients(root, run) for run in (a, b))
    pairs = ((name, x[name], y[name]) for name in x)
    yield _largest(ranks, "gradient", pairs, bound["first step"])
  yield _series(root, ranks, a, b, "train/loss", later, bound["later losses"])
  what = f"update, {_steps(since + 1, until.updates)}"
  yield _largest(ranks, what, _updates(root, (a, b), since, until.updates), bound["update"])
  yield from _loads(root, ranks, a, b, since, until.loads, bound["later loads"])


def _state(
  root: Path, run: Run, step: int, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
  folder = checkpoint.directory(root, run.id)
  return checkpoint.read((folder / FIRST if step < 2 else folder) / f"step_{step:08d}", wanted)


def _gradients(root: Path, run: Run) -> dict[str, Tensor]:
  """The first step's gradients, up to a constant factor per parameter."""
  averages = _state(root, run, 1, lambda name: name.endswith(AVERAGES))
  return {name.rpartition(".")[0]: t for name, t in averages.items()}


def _weights(root: Path, run: Run, step: int) -> dict[str, Tensor]:
  """The fp32 weights after a step, by the names of their masters, or their own without one."""
  state = _state(root, run, step, lambda name: checkpoint.kind(name) in ("weights", "masters"))
  return {name: t for name, t in state.items() if f"{name}.master" not in state}


def _updates(root: Path, runs: tuple[Run, Run], since: int, until: int) -> Iterator[Pair]:
  """What the steps between two states did to every fp32 weight in both runs."""
  first, last = ([_weights(root, run, step) for run in runs] for step in (since, until))
  for name in first[0]:
    x, y = (
      after[name].double() - before[name].double()
      for before, after in zip(first, last, strict=True)
    )
    yield name.removesuffix(".master"), x, y


def _largest(ranks: str, what: str, pairs: Iterable[Pair], bound: float) -> Claim:
  """The largest ‖a - b‖ / ‖a‖ over parameters (name, a, b); a zero in both deviates by nothing."""
  found = {}
  for name, x, y in pairs:
    distance = (x.double() - y.double()).norm()
    found[name] = float(distance / x.double().norm()) if distance else 0.0
  where = max(found, key=found.get)
  return Claim(
    ranks, f"{what}, largest over {counted(len(found), 'parameter')}", found[where], bound, where
  )


def _series(root: Path, ranks: str, a: Run, b: Run, tag: str, rows: slice, bound: float) -> Claim:
  """The largest relative deviation of some of a tag's logged values."""
  x, y = (read(root, run.id, [tag])[tag] for run in (a, b))
  deviation = (abs(y[2] - x[2]) / abs(x[2]))[rows]
  steps = x[0][rows].tolist()
  where = f"step {steps[deviation.argmax()]}"
  what = f"{tag}, {_steps(steps[0], steps[-1])}"
  return Claim(ranks, what, float(deviation.max()), bound, where)


def _steps(first: int, last: int) -> str:
  return f"step {first}" if first == last else f"steps {first} to {last}"


def _loads(
  root: Path, ranks: str, a: Run, b: Run, since: int, until: int, later: float
) -> Iterator[Claim]:
  """The largest difference of anything logged of the experts' loads at the step after `since`,
  where equal routings have none; then, to step `until`, of the loads over their mean.
  """
  x, y = (read(root, run.id) for run in (a, b))
  apart = {tag: abs(y[tag][2] - x[tag][2]) for tag in x if tag.startswith("moe/")}
  first = {tag: float(steps[since]) for tag, steps in apart.items()}
  rest = {
    tag: float(steps[since + 1 : until].max()) for tag, steps in apart.items() if "/load_" in tag
  }
  times = (_steps(since + 1, since + 1), _steps(since + 2, until))
  for found, when, bound in zip((first, rest), times, (0.0, later), strict=True):
    where = max(found, key=found.get)
    yield Claim(ranks, f"expert loads, {len(found)} series, {when}", found[where], bound, where)


def collective_calls(events: list[dict]) -> list[str]:
  """The names of NCCL, gloo or c10d events that lie inside RDEP's forward or backward functions."""
  timed = [event for event in events if "dur" in event]
  moe = [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in timed if MOE_EVENTS.search(e["name"])]
  if not moe:
    raise RunError(
      "the profile holds no RDEP call: nothing was checked; profile a step that has one"
    )
  return [
    e["name"]
    for e in timed
    if COLLECTIVES.search(e["name"])
    and any(tid == e["tid"] and begin <= e["ts"] <= end for tid, begin, end in moe)
  ]


def show(claims: list[Claim], title: str, console: Console) -> None:
  """Print the claims as a table, found beside bound."""
  table = Table(title=title if claims else None)
  for column in ("ranks", "what", "found", "bound", "", "where"):
    table.add_column(column, justify="right" if column in ("ranks", "found", "bound") else "left")
  for c in claims:
    mark = "[green]holds[/green]" if c.holds else "[red]does not hold[/red]"
    table.add_row(c.ranks, c.what, f"{c.found:.3g}", f"{c.bound:.3g}", mark, c.where)
  console.print(table)
