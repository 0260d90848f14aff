"""`nmoe prep-evals` and `nmoe eval`: items are frozen once, and a checkpoint answers them."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from nmoe import wording
from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data.tokenizer import get as get_tokenizer
from nmoe.errors import RunError, TargetError
from nmoe.evals.contamination import Contamination, N, contamination, texts_of
from nmoe.evals.contamination import write as write_contamination
from nmoe.evals.requests import read_manifest, read_task
from nmoe.evals.sources import PARTIAL, prepare
from nmoe.files import check_out, clear_unfinished, replace
from nmoe.machine import driver
from nmoe.records.experiments import Experiments
from nmoe.records.manifests import manifest
from nmoe.records.reader import Evaluation, Reader
from nmoe.records.root import Root
from stages.checkpoints import answerable, step_folder
from stages.launch import local as launch
from stages.launch.display import Display
from stages.launch.local import Job, Launcher
from stages.text import plain, visible
from stages.workbench import prepared

COLUMNS = ("bpb", "acc", "acc_char", "acc_byte", "acc_token", "p_correct")
COUNTS = ("merged", "truncated")  # shown where there are any


def prep(
  source: str | Path,
  root: Path,
  console: Console,
  mixture: Path | None = None,
  tokenizer: str = "o200k_harmony",
) -> None:
  """Freeze a source's items and list its tasks; with a mixture, how many items stand in it."""
  for left in clear_unfinished(Root(root).evals, PARTIAL):
    console.print(plain(f"removed {left}: a killed prep-evals had left it"), soft_wrap=True)
  with console.status(plain(f"reading {source}")):
    folder = prepare(source, root)
  tasks = read_manifest(folder)["tasks"]
  told = {} if mixture is None else _contamination(folder, mixture, tokenizer, root, console)
  columns = ("task", "documents", "requests", "measure", "chance")
  table = Table(*columns, *(["in the training data"] if told else []))
  for task, entry in tasks.items():
    chance = f"{entry['chance']:.3f}" if entry["chance"] else ""
    counts = (f"{entry[name]:,}" for name in ("documents", "requests"))
    hits = [_hits(told[task])] if told else []
    table.add_row(plain(task), *counts, entry["primary"], chance, *hits)
  _print_whole(table, console)
  console.print(plain(folder), soft_wrap=True)


def _contamination(
  folder: Path, mixture: Path, tokenizer: str, root: Path, console: Console
) -> dict[str, Contamination]:
  """By task; written beside the manifest of the prepared data."""
  data, text = prepared(mixture, tokenizer, root, console), get_tokenizer(tokenizer)
  items = {task: read_task(folder, task, 0) for task in read_manifest(folder)["tasks"]}
  with console.status(plain(f"looking for items in {mixture.name}")):
    found = contamination(items, texts_of(data, text))
  path = Root(root).contamination(data.name, folder.name)
  write_contamination(path, found)
  said = f"items with {N} words in a row that the training data have: {path}"
  if any(c.checked < c.documents for c in found.values()):
    said += f"; too short, of fewer than {N} words: none of those was looked for"
  console.print(plain(said), soft_wrap=True)
  return found


def _hits(of: Contamination) -> str:
  """How many items of a task stand in the data, of those that are long enough to be looked for."""
  hits = [f"{len(of.found):,} of {of.checked:,}"] if of.checked else []
  short = of.documents - of.checked
  return ", ".join(hits + [f"{short:,} too short"] * (short > 0))


def run(
  run_id: str,
  step: int | None,
  suite: str | None,
  limit: int,
  out: Path | None,
  root: Path,
  console: Console,
) -> None:
  """Evaluate a run's checkpoint, the newest if no step is named; record it and show it.

  suite None: the run's own, with its own limit, or "quick" if it has none.
  """
  with closing(Reader(root)) as reader:
    found = reader.run(run_id)
  config = configs.loads(found.toml, f"run {found.id}")
  _check_machine(found.id, config.target.arch)
  step = manifest(step_folder(found.id, step, root))["step"]
  if suite is None and config.eval.suite != "none":
    suite, limit = config.eval.suite, limit or config.eval.limit
  suite = suite or "quick"
  answerable(suite, limit, root)
  check_out(out)
  told = _measured(found.id, config, step, suite, limit, root, console)
  with closing(Experiments(root)) as records:
    records.add_evaluation(
      found.id,
      Evaluation(
        step,
        told["suite"],
        told["items"],
        told["arithmetic"],
        told["values"],
        told["seconds"],
      ),
    )
  show(told, console)
  console.print(plain(f"items: {told['file']}"), soft_wrap=True)
  if out is not None:
    write_csv(out, told["values"])


def _check_machine(run_id: str, arch: str) -> None:
  try:
    driver.check(arch)
  except TargetError as error:
    raise TargetError(
      f"run {run_id} is evaluated with the arithmetic that it was trained with, and {error}; or "
      "`nmoe export` it, which needs no GPU, and score the folder by lm_eval"
    ) from error


def _measured(
  run_id: str, config: Config, step: int, suite: str, limit: int, root: Path, console: Console
) -> dict[str, Any]:
  """What the run's ranks say of the checkpoint. RunError with their last lines if they failed."""
  with tempfile.TemporaryDirectory(prefix="nmoe-") as folder:
    out = Path(folder) / "evaluation.json"
    options = ["--step", str(step), "--suite", suite, "--limit", str(limit), "--out", str(out)]
    job = Job(run_id, config, module="nmoe.train.evaluate", options=tuple(options))
    with Display(console) as display:
      line = display.line(visible(f"{run_id} step {step} {suite}"), 1, "reading")
      ended = launch.run(
        Launcher(root), job, line.follow, lambda handle: line.idle(handle.failure, handle.state)
      )
      line.end("failed" if ended.poll() else "completed")
    if ended.poll():
      raise RunError(f"the evaluation of {run_id} failed: {ended.tail()}")
    return json.loads(out.read_text(encoding="utf-8"))


def table_of(values: dict[str, float]) -> dict[str, dict[str, float]]:
  """task or suite -> measure -> value, from tags eval/TASK/MEASURE."""
  tasks: dict[str, dict[str, float]] = {}
  for tag, value in values.items():
    _, task, name = tag.split("/")
    tasks.setdefault(task, {})[name] = value
  return tasks


def show(told: dict[str, Any], console: Console) -> None:
  """Samples, then one table whose last line is the suite's mean, then CORE, of all its tasks."""
  console.print("greedy text after fixed prompts:")
  for sample in told["samples"]:
    console.print(plain(repr(sample)))
  tasks = table_of(told["values"])
  counted = [n for n in COUNTS if any(measures.get(n) for measures in tasks.values())]
  table = Table(*(Column(n, no_wrap=True) for n in ("task", *COLUMNS, *counted)), box=None)
  for task, measures in tasks.items():
    counts = [f"{measures[n]:.0f}" if n in measures else "" for n in counted]
    table.add_row(plain(task), *(_cell(measures, name) for name in COLUMNS), *counts)
  _print_whole(table, console)
  console.print(
    "bpb: bits per byte of the right answer; acc: the likeliest answer is right, whole, per "
    "character, per byte, per token, or greedy decoding gives the one that there is; ±: standard "
    "error; every prompt begins with the separator",
    soft_wrap=True,
  )
  suite, chosen = told["suite"], ", ".join(told["chosen"])
  console.print(
    f"{plain(suite)}: bpb is the mean over its {wording.counted(len(tasks) - 1, 'task')}, acc over "
    f"{chosen or 'none: all have one answer'}",
    soft_wrap=True,
    highlight=False,
  )
  core, limit = tasks[told["suite"]].get("core"), told["limit"]
  if core is not None:
    part = f", of the first {wording.counted(limit, 'document')} of each" if limit else ""
    console.print(
      f"CORE {core:.4f}: the mean of (accuracy - chance) / (1 - chance) over its 22 tasks{part}",
      soft_wrap=True,
      highlight=False,
    )
  console.print(
    f"{told['seconds']:.1f} s on {told['device']} ({told['arithmetic']}), items {told['items']}",
    soft_wrap=True,
  )


def _print_whole(table: Table, console: Console) -> None:
  """No number is cut, however narrow the terminal is, or a file that stands for it."""
  table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
  console.print(table, soft_wrap=True)


def _cell(measures: dict[str, float], name: str) -> str:
  if name not in measures:
    return ""
  shown = name in COLUMNS[:2] and f"{name}_se" in measures  # of the others it is in the records
  error = f" ± {measures[f'{name}_se']:.3f}" if shown else ""
  return f"{measures[name]:.3f}{error}"


def write_csv(path: Path, values: dict[str, float]) -> None:
  """task, measure, value: a line each."""
  text = io.StringIO()
  lines = csv.writer(text, lineterminator="\n")
  lines.writerow(("task", "measure", "value"))
  for task, measures in table_of(values).items():
    lines.writerows((task, name, value) for name, value in measures.items())
  replace(path, text.getvalue())
