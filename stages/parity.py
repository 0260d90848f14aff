"""`nmoe check ep`: the certificate that N ranks train the same model as one.

Every claim is read from what the runs recorded: losses and norms from the metrics, gradients from
the first step's moments (an average that starts at zero holds the gradient times a constant),
updates from the checkpoints, collective calls from a profile.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nmoe import checkpoint
from nmoe import config as configs
from nmoe.config import Config
from nmoe.errors import ConfigError, RunError
from nmoe.experiments import Run
from nmoe.metrics import read
from stages.runs import Arm, Workbench, progress_display

# Largest relative deviation from one rank. At the first step the weights are the same bits, and
# what differs is the order of sums over tokens. Later steps start from weights that differ by that
# much, and Adam divides a gradient by its own size: where that is near zero, a rounding becomes a
# full step. In bf16 the routers then choose other experts for a few tokens.
TOLERANCE = {
  "fp32": {"first step": 1e-6, "later losses": 1e-5, "update": 1e-3, "later loads": 0.0},
  "bf16": {"first step": 1e-2, "later losses": 1e-2, "update": 2e-1, "later loads": 1e-1},
}
MOE_EVENTS = re.compile(r"_(Send|Receive)(Backward)?$")
COLLECTIVES = re.compile(r"nccl|gloo|c10d", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
  ranks: int
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
  config = configs.load(path)
  arms = {r: at_ranks(config, r, steps, path.stem) for r in ranks}
  bench = Workbench.open(config.run.root, console, anew=True)
  data = bench.arm("data", arms[ranks[0]]).data
  most = max(ranks)
  experiment = bench.experiment("check", arms[most], [Arm("ranks", arms[most], data)])
  traces = bench.root / "traces" / experiment.id
  runs: dict[int, Run] = {}
  with progress_display(console) as progress:
    for r, arm_config in arms.items():
      arm = Arm(f"{r} ranks", arm_config, data)
      trace = traces if r == most else None
      runs[r] = bench.repeat(experiment, arm, config.train.seed, progress, trace)
    arm = Arm(f"{most} ranks again", arms[most], data)
    again = bench.repeat(experiment, arm, config.train.seed, progress)
  bench.check(experiment, [*runs.values(), again])
  claims = list(_claims(bench.root, runs, again, config, steps, traces))
  broken = [claim for claim in claims if not claim.holds]
  verdict = "refuted" if broken else "confirmed"
  reason = f"{len(claims) - len(broken)} of {len(claims)} claims hold at {ranks} ranks."
  rows = [vars(claim) for claim in claims]
  bench.experiments.conclude(experiment.id, verdict, {"reason": reason, "rows": rows})
  _show(claims, console)
  if broken:
    raise RunError(f"{path}: {len(broken)} claims do not hold; the first: {broken[0]}")
  return claims


def at_ranks(config: Config, ranks: int, steps: int, name: str) -> Config:
  """The configuration over `ranks` ranks: the same global batches, a checkpoint at every step.

  Where rdep.group is set, experts lie over the largest divisor of it that divides the ranks.
  """
  sequences, experts = config.schedule.batch_tokens // config.data.seq_len, config.moe.num_experts
  group = {r: math.gcd(config.rdep.group, r) for r in (ranks, *range(1, sequences + 1))}
  if experts % group[ranks] or sequences % ranks:
    fitting = [r for r in range(1, sequences + 1) if not (experts % group[r] or sequences % r)]
    raise ConfigError(
      f"{ranks} ranks, or {group[ranks]} with one set of experts, do not divide {sequences} "
      f"sequences and num_experts {experts}; choose from {', '.join(map(str, fitting))}"
    )
  micro = math.gcd(config.train.micro_batch * config.launch.ranks, sequences) // ranks
  return config.with_values(
    **{
      "launch.ranks": ranks,
      "rdep.group": group[ranks],
      "train.micro_batch": max(1, micro),
      "schedule.total_tokens": steps * config.schedule.batch_tokens,
      "schedule.warmup_tokens": 0,
      "schedule.decay_tokens": 0,
      "train.log_every": 1,
      "train.eval_every": 0,
      "train.checkpoint_every": 1,
      "train.keep_checkpoints": steps,
      "experiment.name": f"check-ep-{name}-{time.strftime('%H%M%S')}",
      "experiment.statement": "Any number of ranks trains the same model.",
      "experiment.direction": "none",
      "experiment.min_effect": 0.0,
      "experiment.seeds": 1,
    }
  )


def _claims(
  root: Path, runs: Mapping[int, Run], again: Run, config: Config, steps: int, traces: Path
) -> Iterator[Claim]:
  bound = TOLERANCE["fp32" if config.target.dtype == "fp32" else "bf16"]
  ranks = list(runs)
  one, most = runs[ranks[0]], max(ranks)
  for r in ranks[1:]:
    for tag in ("train/loss", "grad_norm/all"):
      yield _series(root, r, one, runs[r], tag, slice(0, 1), bound["first step"])
    a, b = (_state(root, run, 1) for run in (one, runs[r]))
    yield _largest(r, "gradient", _gradients(a), _gradients(b), bound["first step"])
    yield _series(root, r, one, runs[r], "train/loss", slice(1, None), bound["later losses"])
    last = [_state(root, run, steps) for run in (one, runs[r])]
    updates = [_updates(first, end) for first, end in zip((a, b), last, strict=True)]
    yield _largest(r, "update", *updates, bound["update"])
    yield from _loads(root, r, one, runs[r], bound["later loads"])
  x, y = _state(root, runs[most], steps), _state(root, again, steps)
  differ = [name for name in x if not torch.equal(x[name], y[name])]
  yield Claim(
    most, "tensors that differ in a second run", len(differ), 0.0, min(differ, default="")
  )
  if math.gcd(config.rdep.group, most) > 1:
    calls = collective_calls(json.loads((traces / "trace.json").read_text())["traceEvents"])
    yield Claim(
      most, "collective calls inside the MoE layers", len(calls), 0.0, " ".join(calls[:3])
    )


def _state(root: Path, run: Run, step: int) -> dict[str, Tensor]:
  return checkpoint.read(checkpoint.directory(root, run.id) / f"step_{step:08d}")


def _gradients(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The first step's gradients, up to a constant factor per parameter."""
  kinds = (".exp_avg", ".momentum")
  return {name.rpartition(".")[0]: t for name, t in state.items() if name.endswith(kinds)}


def _updates(first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """What steps 2 to the last did to every fp32 weight."""
  return {
    name: last[master].double() - first[master].double()
    for name in _gradients(first)
    for master in (f"{name}.master" if f"{name}.master" in first else name,)
  }


def _largest(
  ranks: int, what: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], bound: float
) -> Claim:
  """The largest ‖a - b‖ / ‖a‖ over parameters; a zero in both deviates by nothing."""
  found = {}
  for name, x in a.items():
    distance = (x.double() - b[name].double()).norm()
    found[name] = float(distance / x.double().norm()) if distance else 0.0
  where = max(found, key=found.get)
  return Claim(ranks, f"{what}, largest over {len(found)} parameters", found[where], bound, where)


def _series(root: Path, ranks: int, a: Run, b: Run, tag: str, rows: slice, bound: float) -> Claim:
  """The largest relative deviation of some of a tag's logged values."""
  x, y = (read(root, run.id, [tag])[tag] for run in (a, b))
  deviation = (abs(y[2] - x[2]) / abs(x[2]))[rows]
  where = f"step {int(x[0][rows][deviation.argmax()])}"
  return Claim(ranks, tag, float(deviation.max()), bound, where)


def _loads(root: Path, ranks: int, a: Run, b: Run, later: float) -> Iterator[Claim]:
  """The largest difference of anything logged of the experts' loads at the first step, where equal
  routings have none; then of the loads over their mean.
  """
  x, y = (read(root, run.id) for run in (a, b))
  apart = {tag: abs(y[tag][2] - x[tag][2]) for tag in x if tag.startswith("moe/")}
  first = {tag: float(steps[0]) for tag, steps in apart.items()}
  rest = {tag: float(steps[1:].max()) for tag, steps in apart.items() if "/load_" in tag}
  for found, when, bound in ((first, "first step", 0.0), (rest, "later steps", later)):
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


def _show(claims: list[Claim], console: Console) -> None:
  table = Table(title="against one rank" if claims else None)
  for column in ("ranks", "what", "found", "bound", "", "where"):
    table.add_column(column, justify="right" if column in ("ranks", "found", "bound") else "left")
  for c in claims:
    mark = "[green]holds[/green]" if c.holds else "[red]does not hold[/red]"
    table.add_row(str(c.ranks), c.what, f"{c.found:.3g}", f"{c.bound:.3g}", mark, c.where)
  console.print(table)
