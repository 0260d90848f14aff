"""`nmoe prod status`: what a production run is doing, and whether a monitor is to wake somebody."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.records import condition
from nmoe.records.attempts import Event, History
from nmoe.records.goodput import Account, Production, production
from nmoe.records.reader import Run
from nmoe.wording import counted
from stages.prod.plan import stall_of, young

SENTENCES = ("why", "reason", "error")  # details of an event that need no name
# bits of a bad step, and what `_words` sums up
LEFT_OUT = ("values", "startup", "at_tokens", "key", "value", "who", "time")


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


def words(event: Event) -> str:
  """An event as a line: when, where, what, and its details without the marks of Python."""
  when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
  where = f"attempt {event.attempt}, step {event.step}"
  rank = f" of rank {event.rank}" if event.kind in ("straggler", "hardware") else ""
  detail = _words(event.detail)
  return f"{when} UTC, {where}: {event.kind}{rank}" + (f": {detail}" if detail else "")


def _words(detail: Mapping[str, Any]) -> str:
  parts = []
  if startup := detail.get("startup"):
    long = {name.replace("_", " "): s for name, s in startup.items() if s >= 0.05}
    phases = ", ".join(f"{name} {s:.1f} s" for name, s in long.items())
    parts.append(f"trains after {sum(startup.values()):.1f} s ({phases})")
  if "reached_at" in detail:
    when = time.strftime("%H:%M:%S", time.gmtime(detail["reached_at"]))
    parts.append(f"those before reached step {detail['reached']} and were last seen at {when}")
  if detail.get("suspect", -1) >= 0:
    parts.append(f"suspect: rank {detail['suspect']}")
  if "at_tokens" in detail:
    parts.append(f"{detail['key']} = {detail['value']} from {detail['at_tokens']:,} tokens on")
  done = ("reached", "reached_at", "suspect", *LEFT_OUT)
  for key, value in detail.items():
    text = "" if key in done else _value(value)
    if text:
      parts.append(text if key in SENTENCES else f"{key.replace('_', ' ')} {text}")
  return "; ".join(parts)


def _value(value: Any) -> str:
  if isinstance(value, Mapping):
    return _words(value)
  if isinstance(value, list):
    return ", ".join(map(_value, value))
  if isinstance(value, float):
    return f"{value:.4g}" if math.isfinite(value) else str(value)
  return "" if value is None else str(value)


def _newest(records: History) -> Run:
  for experiment in records.list():
    if experiment.stage == "prod" and (runs := records.runs(experiment.id)):
      return runs[-1]
  raise RunError(f"{records.path}: no production run; `nmoe prod launch CONFIG` starts one")
