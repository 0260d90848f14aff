"""`nmoe watch RUN`: a run's figures in a terminal, live, for those without a browser at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nmoe.errors import RecordError
from nmoe.records.live import Live, Logged, Snapshot
from nmoe.records.measures import MEASURES
from nmoe.records.reader import Run
from stages.text import plain
from stages.viz.answers import leaves

FIGURES = {  # tag -> format
  "train/loss": ".4f",
  "val/loss": ".4f",
  "val/bpb": ".4f",
  "grad_norm/all": ".3g",
  "lr/dense": ".3g",
  "train/tokens_per_s": ",.0f",
  "train/mfu": ".1%",
  "data/wait_s": ".3g",
  "memory/peak_bytes": ",.0f",
  "checkpoint/stall_s": ".3g",
}
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # of a curve, in characters


def watch(live: Live, run_id: str | None, console: Console, every_s: float = 1.0) -> None:
  """Show a run, or the newest, until it ends or the process is interrupted.

  Raises RecordError if the records cannot be read or have no such run.
  """
  run = find(live.snapshot(), run_id)
  with Screen(console=console, auto_refresh=False) as screen:
    while True:
      run = find(live.snapshot(), run.id)
      screen.update(picture(live, run), refresh=True)
      if run.status != "running":
        return
      time.sleep(every_s)


def find(seen: Snapshot, run_id: str | None) -> Run:
  """The run of this id, or the newest one."""
  if not seen.runs:
    raise RecordError(seen.notice or "there is no run yet: `nmoe research run CONFIG` makes one")
  run = seen.runs[-1] if run_id is None else seen.run(run_id)
  if run is None:
    newest = ", ".join(dict.fromkeys(run.id for run in seen.runs[::-1][:8]))
    raise RecordError(f"no run {run_id!r}; the newest are: {newest}")
  return run


def picture(live: Live, run: Run) -> Group:
  """All that the terminal shows."""
  file = live.file(run.id)
  tags = file.tags()
  logged = file.read([*FIGURES, *_tags(tags, "time/"), *_loads(tags)])
  parts = [_head(run, logged.get("train/loss"))]
  if file.trouble or run.error:
    parts.append(plain(run.error or file.trouble, "red"))
  if "train/loss" not in logged:
    return Group(*parts, plain("nothing logged yet", "dim"))
  parts += [_progress(run, logged), _figures(logged)]
  if phases := {tag: logged[tag] for tag in _tags(tags, "time/") if tag in logged}:
    parts.append(_phases(phases))
  if loads := {tag: logged[tag] for tag in _loads(tags) if tag in logged}:
    parts.append(_router(loads))
  return Group(*parts)


def _tags(tags: Sequence[str], prefix: str) -> list[str]:
  return [tag for tag in tags if tag.startswith(prefix)]


def _loads(tags: Sequence[str]) -> list[str]:
  ends = ("/load_max_over_mean", "/dead")
  return [tag for tag in _tags(tags, "moe/") if tag.endswith(ends)]


def _head(run: Run, loss: Logged | None) -> Text:
  age = "" if loss is None else f", {time.time() - loss.time[-1]:,.0f} s since the last line"
  tone = {"completed": "green", "failed": "red", "running": "blue"}.get(run.status, "yellow")
  return Text.assemble(
    (run.id, "bold"),
    f"  {run.experiment_id} · {run.arm} · seed {run.seed}  ",
    (run.status, tone),
    age if run.status == "running" else "",
  )


def _progress(run: Run, logged: dict[str, Logged]) -> Table:
  tokens = int(logged["train/loss"].tokens[-1])
  total = dict(leaves(run.toml)).get("schedule.total_tokens", tokens)
  row = Table.grid(padding=(0, 2))
  done = f"{tokens:,} of {total:,} tokens"
  left = "" if "train/tokens_per_s" not in logged else _left(logged, total - tokens)
  row.add_row(ProgressBar(total=total, completed=tokens, width=WIDTH), done, left)
  return row


def _left(logged: dict[str, Logged], tokens: int) -> str:
  rate = float(np.median(logged["train/tokens_per_s"].value[-20:]))
  return f"{timedelta(seconds=round(tokens / rate))} left" if tokens > 0 and rate > 0 else ""


def _figures(logged: dict[str, Logged]) -> Table:
  table = Table.grid(padding=(0, 2))
  for tag, form in FIGURES.items():
    if tag in logged:
      label = MEASURES[tag].label.split(",")[0] if tag in MEASURES else tag
      value = logged[tag].value
      table.add_row(plain(label), f"{value[-1]:{form}}", plain(curve(value), "blue"))
  return table


def curve(values: np.ndarray, width: int = WIDTH) -> str:
  """The last values as blocks, from least to largest; the first twentieth sets no scale."""
  known = values[np.isfinite(values)]
  if len(known) < 2:
    return ""
  parts = [float(part.mean()) for part in np.array_split(known, min(width, len(known)))]
  scale = parts[len(parts) // 20 :]
  low, span = min(scale), max(scale) - min(scale)
  places = (round(7 * (min(max(v, low), low + span) - low) / span) if span else 0 for v in parts)
  return "".join(BLOCKS[place] for place in places)


def _phases(phases: dict[str, Logged]) -> Text:
  """The last log line's seconds by phase, as shares."""
  step = max(int(rows.step[-1]) for rows in phases.values())
  last = {tag: float(rows.value[-1]) for tag, rows in phases.items() if rows.step[-1] == step}
  total = sum(last.values()) or 1.0
  longest = sorted(last.items(), key=lambda item: -item[1])
  shares = (f"{tag[5:].removesuffix('_s')} {100 * s / total:.0f} %" for tag, s in longest)
  return plain("time: " + ", ".join(shares), "dim")


def _router(loads: dict[str, Logged]) -> Text:
  worst = {tag: float(r.value[-1]) for tag, r in loads.items() if tag.endswith("over_mean")}
  dead = sum(float(rows.value[-1]) for tag, rows in loads.items() if tag.endswith("/dead"))
  layer = max(worst, key=worst.get)
  text = f"router: fullest expert over mean {worst[layer]:.2f} in MoE layer {layer.split('/')[1]}"
  return plain(f"{text}, {dead:.0f} dead experts", "dim")
