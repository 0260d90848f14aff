"""`nmoe watch RUN`: a run's figures in a terminal, live, for those without a browser at hand."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import PurePath

import numpy as np
from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nmoe.errors import RecordError
from nmoe.records import condition, goodput
from nmoe.records.condition import ago
from nmoe.records.live import Live, Logged
from nmoe.records.measures import MEASURES
from nmoe.records.reader import Run, no_run
from nmoe.records.snapshot import Snapshot
from nmoe.wording import counted
from stages.text import plain, rounded, visible
from stages.viz.answers import STARTS, leaves, starts
from stages.viz.ranks import latest

# tag -> format of its last value ("s": a duration, "%": a share), factor, label if it is no measure
FIGURES = {
  "train/loss": (".4f", 1.0, ""),
  "val/loss": (".4f", 1.0, ""),
  "val/bpb": (".4f", 1.0, ""),
  "grad_norm/all": (".3g", 1.0, "gradient norm"),
  "lr/dense": (".3g", 1.0, "learning rate"),
  "train/tokens_per_s": (",.0f", 1.0, ""),
  "train/mfu": ("%", 1.0, ""),
  "data/wait_s": ("s", 1.0, "waiting for data"),
  "memory/peak_bytes": (".2f", 2.0**-30, "peak memory, GiB"),
  "checkpoint/stall_s": ("s", 1.0, "checkpoint stall"),
}
TASK = re.compile(r"eval/([^/]+)/(acc|acc_se|bpb|bpb_se)")
TASKS = 12  # shown of an evaluation
MOST_LESS = 3 + len(FIGURES) + TASKS  # lines that a picture can do without
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 72  # of a curve at most, in characters
LONGEST = 32  # of a task's name that is shown, in characters
BESIDE = 42  # what stands before a curve
ROOMY, ENDS = 100, 22  # columns from which on a curve's ends stand beside it, in so many
LATE_S = 30.0  # a last line may always be so old


def watch(live: Live, run_id: str | None, console: Console, every_s: float = 1.0) -> None:
  """Show a run, or the newest, until it ends or the process is interrupted. A pipe or a terminal
  that cannot move its cursor gets two pictures: of now, and of the end.

  Raises RecordError if the records cannot be read or have no such run.
  """
  seen = live.snapshot()
  run = find(seen, run_id)
  if console.is_terminal and not console.is_dumb_terminal:
    with Screen(console=console, auto_refresh=False) as screen:
      while run.live:
        screen.update(fitting(live, seen, run, console), refresh=True)
        time.sleep(every_s)
        seen = live.snapshot()
        run = find(seen, run.id)
      screen.update(fitting(live, seen, run, console), refresh=True)
    return
  console.print(picture(live, seen, run, console.width))
  if run.live:
    while run.live:
      time.sleep(every_s)
      seen = live.snapshot()
      run = find(seen, run.id)
    console.print()
    console.print(picture(live, seen, run, console.width))


def find(seen: Snapshot, run_id: str | None) -> Run:
  """The run of this id, or the newest one."""
  if not seen.runs and (seen.notice or run_id is None):
    raise RecordError(seen.notice or "there is no run yet: `nmoe research run CONFIG` makes one")
  run = seen.runs[-1] if run_id is None else seen.run(run_id)
  if run is None:
    raise RecordError(no_run(run_id, seen.members()))
  return run


def fitting(live: Live, seen: Snapshot, run: Run, console: Console) -> Group:
  """The picture, without what matters least where the terminal is too low for all of it."""
  drawn, less = picture(live, seen, run, console.width), 0
  while less < MOST_LESS and (over := _lines(console, drawn) - (console.height - 1)) > 0:
    less += over
    drawn = picture(live, seen, run, console.width, less)
  return drawn


def _lines(console: Console, drawn: Group) -> int:
  return len(console.render_lines(drawn, pad=False))


def picture(live: Live, seen: Snapshot, run: Run, width: int, less: int = 0) -> Group:
  """All that a terminal of so many columns shows; `less`: lines that are left out of it, if there
  are as many: empty ones, tasks of an evaluation from the fourth, figures from the fifth.
  """
  file = live.file(run.id)
  tags = file.tags()
  tasks = [tag for tag in tags if TASK.fullmatch(tag)]
  wanted = [*FIGURES, *goodput.LOGGED, *STARTS, *_tags(tags, "time/"), *_loads(tags), *tasks]
  logged = file.read(wanted)
  empty = [] if less else [Text()]
  named = len(_tasks(_measured(seen, run, logged)))
  most = max(3, min(named, TASKS) - max(0, less - 2))
  figures = max(4, len(FIGURES.keys() & logged.keys()) - max(0, less - 2 - max(0, named - most)))
  parts = [_head(run, logged.get("train/loss"))]
  if seen.notice:
    parts.append(plain(seen.notice, "yellow"))
  trouble = live.trouble(run)
  parts += [plain(run.error, "red")] if run.error else []
  parts += [plain(trouble, "dim" if run.live else "red")] if trouble else []
  if run.status == "interrupted" and run.id not in seen.history:
    parts.append(plain("its process ended; the same command goes on with it", "yellow"))
  if "train/loss" in logged:
    roomy = width >= ROOMY
    wide = max(8, min(WIDTH, width - BESIDE - roomy * ENDS))
    parts += [
      _progress(run, logged, max(8, min(wide, width - 62))),
      *_resumed(logged),
      *empty,
      _figures(logged, wide, figures, roomy),
      *empty,
    ]
    parts += _phases({tag: logged[tag] for tag in _tags(tags, "time/") if tag in logged})
    parts += _router({tag: logged[tag] for tag in _loads(tags) if tag in logged})
    parts += _ranks(live, run) if "rank/0/step_s" in tags else []
  parts += _production(live, seen, run, logged)
  return Group(*parts, *_evaluations(run, _measured(seen, run, logged), most, empty))


def _tags(tags: Sequence[str], prefix: str) -> list[str]:
  return [tag for tag in tags if tag.startswith(prefix)]


def _loads(tags: Sequence[str]) -> list[str]:
  ends = ("/load_max_over_mean", "/dead")
  return [tag for tag in _tags(tags, "moe/") if tag.endswith(ends)]


def _head(run: Run, loss: Logged | None) -> Text:
  tone = {"completed": "green", "failed": "red", "running": "cyan"}.get(run.status, "yellow")
  return Text.assemble(
    (run.id, "bold"),
    visible(f"  {run.experiment_id} · {run.arm} · seed {run.seed}  "),
    (run.status, tone),
    _age(loss) if run.status == "running" and loss is not None else "",
  )


def _age(loss: Logged) -> tuple[str, str]:
  """Of the last line; yellow where it is much older than such lines are apart."""
  age_s = time.time() - loss.time[-1]
  apart_s = float(np.median(np.diff(loss.time[-20:]))) if len(loss.time) > 1 else 0.0
  return f", last line {ago(loss.time[-1])}", "yellow" if age_s > max(LATE_S, 10 * apart_s) else ""


def _resumed(logged: dict[str, Logged]) -> list[Text]:
  """When the run last went on after its process ended."""
  found = starts({tag: logged[tag] for tag in ("train/loss", *STARTS) if tag in logged})
  if not found:
    return []
  last, more = found[-1], len(found) - 1
  back = f", {counted(int(last['rewound']), 'step')} back" if last["rewound"] else ""
  text = f"resumed at step {last['step']:,}{back}, {ago(last['when'])}"
  return [plain(text + (f"; {counted(more, 'time')} before" if more else ""), "dim")]


def _progress(run: Run, logged: dict[str, Logged], wide: int) -> Table:
  step, tokens = int(logged["train/loss"].step[-1]), int(logged["train/loss"].tokens[-1])
  total = dict(leaves(run.toml)).get("schedule.total_tokens", tokens)
  row = Table.grid(padding=(0, 2))
  left = _left(logged, total - tokens) if run.live and "train/tokens_per_s" in logged else ""
  done = f"step {step:,}, {rounded(tokens)} of {rounded(total)} tokens"
  row.add_row(ProgressBar(total=total, completed=tokens, width=wide), done, left)
  return row


def _left(logged: dict[str, Logged], tokens: int) -> str:
  rate = float(np.median(logged["train/tokens_per_s"].value[-20:]))
  return f"{timedelta(seconds=round(tokens / rate))} left" if tokens > 0 and rate > 0 else ""


def _figures(logged: dict[str, Logged], wide: int, most: int, roomy: bool) -> Table:
  table = Table.grid(padding=(0, 2))
  table.add_column(width=24, no_wrap=True, overflow="ellipsis")
  table.add_column(justify="right", width=11, no_wrap=True)
  table.add_column(no_wrap=True)
  for tag in [tag for tag in FIGURES if tag in logged][:most]:
    form, factor, name = FIGURES[tag]
    label = name or MEASURES[tag].label.split(",")[0]
    value = logged[tag].value
    last = plain(_told(form, factor * value[-1]), "" if np.isfinite(value[-1]) else "red")
    row = [plain(label), last, plain(curve(value, wide), "cyan")]
    if roomy and (ends := [_told(form, factor * end) for end in scale(means(value, wide))]):
      row.append(plain(" to ".join(dict.fromkeys(ends)) if len(set(ends)) > 1 else "", "dim"))
    table.add_row(*row)
  return table


def _told(form: str, value: float) -> str:
  if not math.isfinite(value):
    return str(value)
  if form == "%":
    return f"{100 * value:.1f} %"
  if form != "s":
    return f"{value:{form}}"
  return rounded(value, "s") if value < 100 else f"{value:,.0f} s"


def means(values: np.ndarray, width: int) -> list[float]:
  """The finite values as so many means at most; none of fewer than two."""
  known = values[np.isfinite(values)]
  if len(known) < 2:
    return []
  return [float(part.mean()) for part in np.array_split(known, min(width, len(known)))]


def scale(parts: Sequence[float]) -> tuple[float, ...]:
  """The least and the largest; the first twentieth sets no scale."""
  seen = parts[len(parts) // 20 :]
  return (min(seen), max(seen)) if seen else ()


def curve(values: np.ndarray, width: int) -> str:
  """The values as blocks, from least to largest."""
  parts = means(values, width)
  if not parts:
    return ""
  low, high = scale(parts)
  span = high - low
  places = (round(7 * (min(max(v, low), high) - low) / span) if span else 0 for v in parts)
  return "".join(BLOCKS[place] for place in places)


def _phases(phases: dict[str, Logged]) -> list[Text]:
  """The last log line's seconds by phase, as shares."""
  if not phases:
    return []
  step = max(int(rows.step[-1]) for rows in phases.values())
  last = {tag: float(rows.value[-1]) for tag, rows in phases.items() if rows.step[-1] == step}
  known = {tag: s for tag, s in last.items() if math.isfinite(s) and s > 0}
  total = sum(known.values())
  shares = [
    f"{tag[5:].removesuffix('_s')} {100 * s / total:.0f} %"
    for tag, s in sorted(known.items(), key=lambda item: -item[1])
    if s >= 0.005 * total
  ]
  return [plain("time: " + ", ".join(shares), "dim")] if shares else []


def _router(loads: dict[str, Logged]) -> list[Text]:
  last = {tag: v for tag, rows in loads.items() if math.isfinite(v := float(rows.value[-1]))}
  worst = {tag: v for tag, v in last.items() if tag.endswith("over_mean")}
  if not worst:
    return []
  dead = sum(v for tag, v in last.items() if tag.endswith("/dead"))
  layer = max(worst, key=worst.get)
  text = f"router: fullest expert over mean {worst[layer]:.2f} in MoE layer {layer.split('/')[1]}"
  return [plain(f"{text}, {dead:.0f} dead expert{'' if dead == 1 else 's'}", "dim")]


def _ranks(live: Live, run: Run) -> list[Text]:
  """Who was late in the newest logs."""
  found = live.file(run.id).of_ranks(20)
  phase = None if found is None else latest(found)
  if phase is None:
    return []
  above = rounded(phase.above, "s")
  text = f"ranks: rank {phase.rank} is {above} above the median in {phase.name}"
  return [plain(f"{text}, {100 * phase.share:.1f} % of the time between logs", "dim")]


def _production(live: Live, seen: Snapshot, run: Run, logged: dict[str, Logged]) -> list[Text]:
  """Of a production run: its goodput and what happened last."""
  if run.id not in seen.history:
    return []
  attempts, events = seen.history[run.id]
  found = goodput.account(live.root, run, attempts, events, logged)
  text = f"goodput {100 * found.goodput:.1f} %, ETTR {100 * found.ettr:.1f} %"
  lost = {k: s for k, s in found.seconds.items() if s >= 0.05 and k != "stepping"}
  most = sorted(lost.items(), key=lambda item: -item[1])[:4]
  text += f" of {found.wall_s:,.0f} s" + "".join(f", {name} {s:,.1f} s" for name, s in most)
  state = condition.state(found)
  parts = [*([plain(state)] if state else []), plain(text, "dim")]
  for event in events[-4:]:
    when = time.strftime("%F %T", time.gmtime(event.time))
    parts.append(
      plain(f"{when} UTC  attempt {event.attempt}, step {event.step}: {event.kind}", "dim")
    )
  return parts


def _measured(seen: Snapshot, run: Run, logged: dict[str, Logged]) -> dict[str, tuple[int, float]]:
  """tag -> (step, value), the newest of what an evaluation measured in the loop or after it."""
  last = {
    tag: (int(rows.step[-1]), float(rows.value[-1]))
    for tag, rows in logged.items()
    if TASK.fullmatch(tag)
  }
  for one in sorted(seen.evaluations.get(run.id, []), key=lambda e: e.step):
    of = {tag: (one.step, value) for tag, value in one.results.items() if TASK.fullmatch(tag)}
    last |= {tag: new for tag, new in of.items() if last.get(tag, (-1,))[0] <= new[0]}
  return last


def _tasks(last: dict[str, tuple[int, float]]) -> list[str]:
  return sorted({TASK.fullmatch(tag)[1] for tag in last})


def _evaluations(
  run: Run, last: dict[str, tuple[int, float]], most: int, empty: list[Text]
) -> list[Text | Table]:
  """The newest value of every task with its standard error, and the mean of the run's suite."""
  suite = PurePath(str(dict(leaves(run.toml)).get("eval.suite", ""))).stem
  tasks = sorted(_tasks(last), key=lambda task: (task != suite, task))
  if not tasks:
    return []
  table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
  table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=LONGEST)
  for name in ("accuracy", "bits per byte", "step"):
    table.add_column(name, justify="right", no_wrap=True)
  for task in tasks[:most]:
    step = max(last[f"eval/{task}/{m}"][0] for m in ("acc", "bpb") if f"eval/{task}/{m}" in last)
    cells = (_with_error(last, f"eval/{task}/{name}") for name in ("acc", "bpb"))
    name = f"mean of {task}" if task == suite else task
    table.add_row(plain(name), *cells, f"{step:,}")
  if len(tasks) > most:
    table.add_row(plain(f"and {len(tasks) - most} more", "dim"))
  return [*empty, table]


def _with_error(last: dict[str, tuple[int, float]], tag: str) -> str:
  if tag not in last:
    return "—"
  error = f" ± {last[tag + '_se'][1]:.3f}" if tag + "_se" in last else ""
  return f"{last[tag][1]:.4f}{error}"
