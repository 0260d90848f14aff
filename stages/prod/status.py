"""`nmoe prod status`: what a production run is doing, and whether a monitor is to wake somebody."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.records import condition
from nmoe.records.attempts import History
from nmoe.records.goodput import Account, Production, production
from nmoe.records.reader import Run
from nmoe.wording import counted
from stages.prod.plan import stall_of, young
from stages.report.events import words


def status(run_id: str | None, root: Path, console: Console) -> int:
  """Print what a production run is doing, by default the newest; one of nmoe.records.condition."""
  with closing(History(root)) as records:
    run = records.run(run_id) if run_id else _newest(records)
  found = production(root, run.id)
  config = configs.loads(found.run.toml, f"run {run.id}", env={})
  lines = [f"run {run.id}: {doing(found)}", _goodput(found), _failures(found, config)]
  console.print(lines[0], markup=False, highlight=False, soft_wrap=True)
  table = Table()
  for column in ("attempt", "engine", "hosts", "from step", "to step", "outcome"):
    table.add_column(column)
  for a in found.attempts:
    steps = str(a.first_step), str(a.last_step) if a.ended else ""
    table.add_row(str(a.number), a.engine, str(len(a.nodes)), *steps, a.outcome or "under way")
  console.print(table)
  lines = lines[1:] + [words(event) for event in found.events[-10:]]
  for line in filter(None, lines):
    console.print(line, markup=False, highlight=False, soft_wrap=True)
  return condition.health(found, config.prod.stale_s)


def doing(found: Account) -> str:
  """The run's state, since when, and how far it is."""
  run, beat = found.run, found.heartbeat
  parts = [", ".join(filter(None, (condition.status(found), condition.state(found))))]
  if run.status == "failed":
    parts.append(run.error)
  if beat is None:
    parts.append("no sign of life yet")
  else:
    sign = f", {condition.ago(beat.time)} on {beat.host}" if run.live else ""
    parts.append(f"{beat.entry}{sign}")
  return "; ".join(parts)


def _goodput(found: Production) -> str:
  if found.wall_s == 0:
    return ""
  parts = ", ".join(f"{name} {s:,.1f} s" for name, s in found.seconds.items() if s)
  text = f"goodput {found.goodput:.1%}, ETTR {found.ettr:.1%} of {found.wall_s:,.1f} s: {parts}"
  if found.left_s is not None:
    text += f"; {timedelta(seconds=round(found.left_s))} left at this pace"
  return text


def _failures(found: Production, config: Config) -> str:
  """How often it failed, and the interval of checkpoints that this asks for; "": never."""
  if found.mttf_s is None or found.step == 0:
    return ""
  interval_s = young(stall_of(config, found.run).value, found.mttf_s)
  steps = max(1, round(interval_s * found.step / max(found.seconds["stepping"], 1e-9)))
  each = timedelta(seconds=round(found.mttf_s))
  told = f"{counted(found.failures, 'failure')}, one in {each}; by Young's formula "
  return f"{told}train.checkpoint_every = {steps}, it is {config.train.checkpoint_every}"


def _newest(records: History) -> Run:
  for experiment in records.list():
    if experiment.stage == "prod" and (runs := records.runs(experiment.id)):
      return runs[-1]
  raise RunError(f"{records.path}: no production run; `nmoe prod launch CONFIG` starts one")
