"""`nmoe check resume`: whether killing a configuration's run changes one bit of what comes out.

A run that goes on at another number of ranks sums in another order, so it cannot repeat the bits of
one that does not. There the kill is judged in three parts: up to it the runs are bit-equal; the new
ranks load bit for bit what the old ones saved; the steps from there on agree within the bounds of
`nmoe check ep`. What was loaded is read from what the new ranks save before their first step: of
what several of them hold, such as weights, it has one rank's copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nmoe.errors import RunError
from nmoe.records import checkpoint
from nmoe.records.metrics import Series, read
from nmoe.records.reader import Run
from stages.judge.table import Judgement
from stages.launch import local as launch
from stages.launch.display import Display
from stages.launch.local import Job, Launcher
from stages.proofs import check_ep as parity
from stages.proofs.shortened import claim, named, resumable
from stages.runs import Work, carrying
from stages.workbench import Arm, Workbench

LOGGED = ("train/loss", "train/bpb", "val/loss", "grad_norm/", "lr/", "moe/")  # prefixes of tags
KILLED = "A run that is killed and resumed is bit-equal to one that is not."
CHANGED = "A killed run goes on at another number of ranks: it loads the same, trains alike."
AFTER = parity.BF16  # steps after a change of ranks within which the bounds must hold


@dataclass(frozen=True)
class Row:
  """One kind of what is compared bit by bit: how many, how many are equal, the first that isn't."""

  what: str
  compared: int
  equal: int
  first: str  # "" if all are equal

  @property
  def holds(self) -> bool:
    return self.equal == self.compared


@dataclass(frozen=True)
class Restart:
  """Where a killed run went on: `before` ranks wrote `saved`, `after` ranks took it up."""

  before: int
  after: int
  saved: Path  # the newest checkpoint at the kill
  loaded: Path  # a folder with what `after` ranks held before and after their first step

  @property
  def step(self) -> int:
    return checkpoint.manifest(self.saved)["step"]


def resume(
  path: Path, steps: int, console: Console, ranks: Sequence[int] = ()
) -> list[Row | parity.Claim]:
  """Train `steps` steps of a configuration once through, once more with two SIGKILLs; compare both.

  ranks: both runs start at the first number, and each kill hands the second run to the next one, if
  there is one; none: those of a host. Prints tables and stores them as an experiment of stage
  "check". RunError if anything differs; ConfigError, before anything runs, if the ranks don't fit.
  """
  first, *others = resumable(path, steps, ranks)
  kills = (steps // 2, 3 * steps // 4)
  with Workbench.open(first.run.root, console, anew=True) as bench:
    arm = bench.arm("uninterrupted", first)
    arms = [Arm("killed", config, arm.data) for config in (first, *others)]
    stated = claim(CHANGED if len(set(ranks)) > 1 else KILLED, first)
    asked = (named("check-resume", path), stated, [arm, arms[0]], [first.train.seed])
    with carrying(bench, "check", *asked) as work:
      with Display(console) as display:
        whole = work.repeat(arm, first.train.seed, display)
        work.check([whole])
        killed, restarts = _killed(work, arms, kills, display)
      if restarts:
        rows, claims = _changed(bench.root, whole, killed, restarts, steps)
      else:
        rows, claims = compare(bench.root, whole, killed, steps), []
      _show(rows, console)
      if claims:
        parity.show(claims, f"against launch.ranks = {first.launch.ranks}", console)
      judgement = _judge(rows, claims, ranks, kills, steps)
      work.conclude(judgement, [])
  if judgement.verdict == "refuted":
    raise RunError(
      f"{path}: a resumed run is not the uninterrupted one; the table names the first difference "
      f"(runs {whole.id} and {killed.id} under {bench.root}/checkpoints)"
    )
  return [*rows, *claims]


def _judge(
  rows: Sequence[Row],
  claims: Sequence[parity.Claim],
  ranks: Sequence[int],
  kills: Sequence[int],
  steps: int,
) -> Judgement:
  equal = all(row.holds for row in (*rows, *claims))
  same = f"the same within the bounds at {list(ranks)} ranks" if claims else "bit-identical"
  reason = f"killed at steps {kills[0]} and {kills[1]} of {steps}, "
  reason += f"the run is {same if equal else 'another one'}."
  numbers = {"rows": [vars(row) for row in (*rows, *claims)]}
  return Judgement("confirmed" if equal else "refuted", reason, numbers)


def compare(root: Path, a: Run, b: Run, step: int) -> list[Row]:
  """What the checkpoints of `step` hold and what was logged up to it, of two runs."""
  paths = [checkpoint.directory(root, run.id) / f"step_{step:08d}" for run in (a, b)]
  logs = [_logged(read(root, run.id), step) for run in (a, b)]
  return [*_states(*paths), _row("logged values", *logs)]


def handed_over(restart: Restart) -> list[Row]:
  """What the checkpoint held that the new ranks were to load, and what they did load."""
  step = checkpoint.steps(restart.loaded)[0]
  place = [{"step": torch.tensor(s)} for s in (restart.step, step)]
  rows = _states(restart.saved, restart.loaded / f"step_{step:08d}")
  return [*rows, _row("data position", *place)]


def _changed(
  root: Path, whole: Run, killed: Run, restarts: Sequence[Restart], steps: int
) -> tuple[list[Row], list[parity.Claim]]:
  """Of a run that changed its ranks: what must be the same bits, what may be another rounding."""
  since = next(r.step for r in restarts if r.before != r.after)
  if since + AFTER.loads > steps:
    raise RunError(f"run {killed.id} changed ranks at step {since} of {steps}; raise --steps")
  rows = _named(f"step {since} in both runs", compare(root, whole, killed, since))
  for r in restarts:
    rows += _named(f"step {r.step}, saved by {r.before}, loaded by {r.after}", handed_over(r))
  ranks = ", ".join(dict.fromkeys(str(r.after) for r in restarts if r.step >= since))
  until = parity.Until(*(min(steps, since + step) for step in AFTER))
  return rows, list(parity.deviations(root, ranks, whole, killed, since, until))


def _named(where: str, rows: Iterable[Row]) -> list[Row]:
  return [replace(row, what=f"{where}: {row.what}") for row in rows]


def _states(a: Path, b: Path) -> list[Row]:
  """All that two checkpoints hold, by kind."""
  states = [checkpoint.read(path) for path in (a, b)]
  rows = [
    _row(
      what, *({n: t for n, t in state.items() if checkpoint.kind(n) == what} for state in states)
    )
    for what in ("weights", *checkpoint.STATE)
  ]
  return [row for row in rows if row.compared]


def _logged(series: Mapping[str, Series], last: int) -> dict[str, Tensor]:
  """Steps, up to the last one, and values of every tag that a run repeats exactly."""
  return {
    tag: torch.from_numpy(np.stack([steps.astype(np.float64), values])[:, steps <= last])
    for tag, (steps, _, values) in series.items()
    if tag.startswith(LOGGED) and steps[0] <= last
  }


def _row(what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Row:
  """Names that only one side has are compared too, and differ."""
  names = ours.keys() | theirs.keys()
  differ = [name for name in names if not _same_bits(ours.get(name), theirs.get(name))]
  return Row(what, len(names), len(names) - len(differ), min(differ, default=""))


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
  if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
    return False
  a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
  return torch.equal(a, b)


def _killed(
  work: Work, arms: Sequence[Arm], kills: Sequence[int], display: Display
) -> tuple[Run, list[Restart]]:
  """A run that loses its processes at each of `kills` and goes on as the next of the arms.

  The restarts, if any changes the ranks: then the run also saves what it loads. RunError if it ends
  before a kill.
  """
  bench = work.bench
  run, restarts, loaded = work.start(arms[0], arms[0].config.train.seed), [], None
  folder, ranks = checkpoint.directory(bench.root, run.id), [a.config.launch.ranks for a in arms]
  for number, at in enumerate(kills):
    display.say(f"killed: SIGKILL at step {at}, launch.ranks = {ranks[number]}")
    job = Job(run.id, arms[number].config, first=loaded, kill_at=at)
    ended = launch.run(Launcher(bench.root), job)
    bench.experiments.mark_interrupted()
    status = bench.experiments.run(run.id).status
    if status != "interrupted":
      raise RunError(
        f"run {run.id} was to be killed at step {at} but is {status}; raise --steps\n"
        + ended.tail()
      )
    work.hand_over(run, arms[number + 1].config)
    if len(set(ranks)) > 1:
      saved = folder / f"step_{checkpoint.steps(folder)[-1]:08d}"
      loaded = folder / f"loaded_{at:08d}"
      restarts.append(Restart(*ranks[number : number + 2], saved, loaded))
  job = Job(run.id, arms[-1].config, first=loaded)
  done = work.execute(job, display)
  work.check([done])
  return done, restarts


def _show(rows: list[Row], console: Console) -> None:
  table = Table()
  for column in ("what", "compared", "equal", "first difference"):
    table.add_column(column, justify="right" if column in ("compared", "equal") else "left")
  for row in rows:
    colour = "green" if row.holds else "red"
    table.add_row(row.what, str(row.compared), f"[{colour}]{row.equal}[/{colour}]", row.first)
  console.print(table)
