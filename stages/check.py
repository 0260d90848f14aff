"""`nmoe check resume`: whether killing a configuration's run changes one bit of what comes out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from nmoe import checkpoint
from nmoe import config as configs
from nmoe.config import Config
from nmoe.errors import RunError
from nmoe.experiments import Experiment, Run
from nmoe.metrics import Series, read
from stages import launch
from stages.runs import Arm, Workbench, progress_display

LOGGED = ("train/loss", "train/bpb", "val/loss", "grad_norm/", "lr/", "moe/")  # prefixes of tags
STATE = {  # what a checkpoint holds, by the last part of a tensor's name; weights are the rest
  "moments": ("exp_avg", "exp_avg_sq", "momentum"),
  "masters": ("master",),
  "router biases": ("bias",),
  "optimizer steps": ("steps",),
}


@dataclass(frozen=True)
class Row:
  """One kind of what is compared bit by bit: how many, how many are equal, the first that isn't."""

  what: str
  compared: int
  equal: int
  first: str  # "" if all are equal


def resume(path: Path, steps: int, console: Console) -> list[Row]:
  """Train `steps` steps of a configuration once through, once more with two SIGKILLs; compare both.

  Prints a table and stores it as an experiment of stage "check". RunError if anything differs.
  """
  config = shortened(configs.load(path), path.stem, steps)
  bench = Workbench.open(config.run.root, console, anew=True)
  arm = bench.arm("uninterrupted", config)
  experiment = bench.experiment("check", config, [arm])
  with progress_display(console) as progress:
    whole = bench.repeat(experiment, arm, config.train.seed, progress)
    bench.check(experiment, [whole])
    kills = (steps // 2, 3 * steps // 4)
    killed = _killed(bench, experiment, Arm("killed", config, arm.data), kills, progress)
  rows = compare(bench.root, whole, killed, steps)
  equal = all(row.equal == row.compared for row in rows)
  outcome = {
    "reason": f"killed at steps {kills[0]} and {kills[1]} of {steps}, "
    + ("the run is bit-identical." if equal else "the run is another one."),
    "rows": [vars(row) for row in rows],
  }
  bench.experiments.conclude(experiment.id, "confirmed" if equal else "refuted", outcome)
  _show(rows, console)
  if not equal:
    raise RunError(
      f"{path}: a resumed run is not the uninterrupted one; the table names the first difference "
      f"(runs {whole.id} and {killed.id} under {bench.root}/checkpoints)"
    )
  return rows


def shortened(config: Config, name: str, steps: int) -> Config:
  """The configuration with `steps` steps: warm-up and decay a quarter each, a checkpoint at every
  fourth part less one step, so that a kill costs some steps.
  """
  batch = config.schedule.batch_tokens
  return config.with_values(
    **{
      "schedule.total_tokens": steps * batch,
      "schedule.warmup_tokens": steps // 4 * batch,
      "schedule.decay_tokens": steps // 4 * batch,
      "train.log_every": 1,
      "train.eval_every": 0,
      "train.checkpoint_every": max(1, steps // 4 - 1),
      "train.keep_checkpoints": 2,
      "experiment.name": f"check-resume-{name}-{time.strftime('%H%M%S')}",
      "experiment.statement": "A run that is killed and resumed is bit-equal to one that is not.",
      "experiment.direction": "none",
      "experiment.min_effect": 0.0,
      "experiment.seeds": 1,
    }
  )


def compare(root: Path, a: Run, b: Run, steps: int) -> list[Row]:
  """What the checkpoints of step `steps` hold and what was logged, of two runs."""
  states = [
    checkpoint.read(checkpoint.directory(root, run.id) / f"step_{steps:08d}") for run in (a, b)
  ]
  rows = [
    _row(what, {n: t for n, t in states[0].items() if kind(n) == what}, states[1])
    for what in ("weights", *STATE)
  ]
  logs = [_logged(read(root, run.id)) for run in (a, b)]
  return [row for row in (*rows, _row("logged values", *logs)) if row.compared]


def kind(name: str) -> str:
  """What a tensor of a checkpoint is: a key of STATE, or "weights"."""
  last = name.rpartition(".")[2]
  return next((what for what, names in STATE.items() if last in names), "weights")


def _logged(series: Mapping[str, Series]) -> dict[str, Tensor]:
  """Steps and values of every tag that a run repeats exactly."""
  return {
    tag: torch.from_numpy(np.stack([steps.astype(np.float64), values]))
    for tag, (steps, _, values) in series.items()
    if tag.startswith(LOGGED)
  }


def _row(what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Row:
  differ = [name for name, x in ours.items() if not _same_bits(x, theirs.get(name))]
  return Row(what, len(ours), len(ours) - len(differ), min(differ, default=""))


def _same_bits(a: Tensor, b: Tensor | None) -> bool:
  if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
    return False
  a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
  return torch.equal(a, b)


def _killed(
  bench: Workbench,
  experiment: Experiment,
  arm: Arm,
  kills: tuple[int, int],
  progress: Progress,
) -> Run:
  """A run that loses its processes at two steps; RunError if it ends before that."""
  seed = arm.config.train.seed
  run = bench.start(experiment, arm, seed)
  for at in kills:
    progress.console.print(f"killed: SIGKILL at step {at}")
    launch.run(bench.root, run.id, arm.config, lambda _: None, kill_at=at)
    bench.experiments.mark_interrupted()
    status = bench.experiments.run(run.id).status
    if status != "interrupted":
      raise RunError(
        f"run {run.id} was to be killed at step {at} but is {status}; raise --steps\n"
        + launch.tail(bench.root, run.id)
      )
  done = bench.execute(experiment, run, arm.config, "killed", progress)
  bench.check(experiment, [done])
  return done


def _show(rows: list[Row], console: Console) -> None:
  table = Table()
  for column in ("what", "compared", "equal", "first difference"):
    table.add_column(column, justify="right" if column in ("compared", "equal") else "left")
  for row in rows:
    colour = "green" if row.equal == row.compared else "red"
    table.add_row(row.what, str(row.compared), f"[{colour}]{row.equal}[/{colour}]", row.first)
  console.print(table)
