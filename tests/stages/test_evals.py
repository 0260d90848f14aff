"""`nmoe prep-evals` and `nmoe eval` end to end: child processes, records, table, CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from contextlib import closing

import numpy as np
import pytest
from pyarrow import parquet
from rich.console import Console

from nmoe.errors import CheckpointError, DataError, TargetError
from nmoe.evals import sources
from nmoe.evals.measure import Items, write_items
from nmoe.evals.suites import CORE
from nmoe.machine import driver
from nmoe.records.reader import Reader
from nmoe.records.root import Root
from stages import evals
from stages.launch import display


def items(folder):
  """A wanted continuation among two, of 12 documents."""
  path = folder / "items.jsonl"
  texts = (
    {"task": "pairs", "context": f"item {i}:", "choices": [" etaoin", " zzqqx"], "gold": i % 2}
    for i in range(12)
  )
  path.write_text("".join(json.dumps(t) + "\n" for t in texts))
  (folder / "mine.toml").write_text('tasks = ["pairs"]\n')
  return path


def command(lab, tmp_path, run, step=None, suite="mine.toml"):
  console = Console(record=True, width=160)
  out = tmp_path / "numbers.csv"
  evals.run(run, step, str(tmp_path / suite), 0, out, lab.root, console)
  return console.export_text(), out


def test_a_checkpoint_is_measured_recorded_and_shown(lab, tmp_path):
  console = Console(record=True, width=160)
  evals.prep(items(tmp_path), lab.root, console)
  assert "pairs" in console.export_text()
  run = lab.record(eval__suite=str(tmp_path / "mine.toml"))
  lab.attempt(run)
  said, out = command(lab, tmp_path, run)
  assert "merged" not in said  # nothing was
  assert "pairs" in said and "The capital of France is" in said and "cpu fp32" in said
  with closing(Reader(lab.root)) as reader:
    (kept,) = reader.evaluations(run)
  assert (kept.step, kept.suite, kept.arithmetic) == (12, "mine", "cpu fp32")
  last = {tag: values[-1][1] for tag, values in lab.logged(run).items() if tag[:5] == "eval/"}
  assert kept.results == last  # the command and the loop are one code
  with out.open() as stream:
    rows = {(r["task"], r["measure"]): float(r["value"]) for r in csv.DictReader(stream)}
  assert rows["pairs", "bpb"] == last["eval/pairs/bpb"]


def test_a_long_evaluation_says_how_far_it_is(lab, tmp_path, monkeypatch):
  """Batches done and left, of rank 0, as lines where there is no terminal."""
  evals.prep(items(tmp_path), lab.root, Console(quiet=True))
  run = lab.record(train__micro_batch=1)
  lab.attempt(run)
  monkeypatch.setattr(display, "LINE_S", 0.0)
  said = command(lab, tmp_path, run)[0].splitlines()
  head = r".* step 12 .*mine.toml: batch (\d+)/24  [\d,]+ tokens/s"
  batch = re.compile(rf"{head}(?:  0:00:0\d left|, writes samples  \(\d s\)|)")
  told = [found[1] for line in said if (found := batch.fullmatch(line))]
  assert list(dict.fromkeys(told)) == [str(n) for n in range(1, 25)]  # one may be said again
  assert sum(line.endswith("mine.toml: completed") for line in said) == 1


def test_it_is_said_over_which_tasks_an_accuracy_is(lab, tmp_path):
  """Of one answer it is no choice: such a task has its own line, and no part in the suite's."""
  path = items(tmp_path)
  one = {"task": "tale", "context": "once", "choices": [" upon a time"], "gold": 0}
  path.write_text(path.read_text() + json.dumps(one) + "\n")
  (tmp_path / "mine.toml").write_text('tasks = ["pairs", "tale"]\n')
  (tmp_path / "told.toml").write_text('tasks = ["tale"]\n')
  evals.prep(path, lab.root, Console(quiet=True))
  run = lab.record()
  lab.attempt(run)
  assert (
    "mine: bpb is the mean over its 2 tasks, acc over pairs\n" in command(lab, tmp_path, run)[0]
  )
  said = command(lab, tmp_path, run, suite="told.toml")[0]
  assert "told: bpb is the mean over its 1 task, acc over none: all have one answer\n" in said


@pytest.mark.parametrize(
  "limit, said", [(0, "22 tasks\n"), (4, "of the first 4 documents of each")]
)
def test_core_is_shown_and_no_number_is_cut(limit, said):
  """Where a terminal has 40 columns, and where it is none."""
  tasks = {task: {"bpb": 1.25, "acc": 0.5, "acc_se": 0.125, "acc_token": 0.375} for task in CORE}
  values = {f"eval/{task}/{n}": x for task, about in tasks.items() for n, x in about.items()}
  values |= {"eval/core/bpb": 1.25, "eval/core/acc": 0.5, "eval/core/core": -0.07608}
  told = {"values": values, "suite": "core", "limit": limit, "samples": [], "items": "c0"}
  told["chosen"] = list(CORE)
  console = Console(record=True, width=40, file=io.StringIO())
  evals.show(told | {"seconds": 1.0, "device": "d", "arithmetic": "cpu fp32"}, console)
  text = console.export_text()
  assert "CORE -0.0761: " in text and said in text and "\u2026" not in text
  for task in CORE:
    assert re.search(rf"^ {task} +1.250 +0.500 ± 0.125 +0.375 *$", text, re.MULTILINE)


def test_a_run_s_own_suite_has_its_own_limit(lab, tmp_path):
  evals.prep(items(tmp_path), lab.root, Console(quiet=True))
  run = lab.record(eval__suite=str(tmp_path / "mine.toml"), eval__limit=5)
  lab.attempt(run)
  (file,) = Root(lab.root).evaluated(run).values()
  before = file.read_bytes()
  evals.run(run, None, None, 0, None, lab.root, Console(quiet=True))
  evals.run(run, None, None, 7, None, lab.root, Console(quiet=True))
  assert file.read_bytes() == before  # answers to other items take no place of a study's
  assert Root(lab.root).evaluated(run).keys() == {"mine-5", "mine-7"}
  with closing(Reader(lab.root)) as reader:
    own, other = reader.evaluations(run)
  results = lab.run(run).results
  assert own.items == results["eval/items"] != other.items
  assert own.results["eval/mine/bpb"] == results["eval/mine/bpb"]


def test_two_ranks_measure_the_same_bits(lab, tmp_path):
  evals.prep(items(tmp_path), lab.root, Console(quiet=True))
  run, pair = lab.record(), lab.record(launch__ranks=2, train__micro_batch=4)
  lab.attempt(run)
  source = lab.checkpoints(run)
  lab.checkpoints(pair).symlink_to(source, target_is_directory=True)
  evals.run(run, None, str(tmp_path / "mine.toml"), 0, None, lab.root, Console(quiet=True))
  evals.run(pair, None, str(tmp_path / "mine.toml"), 0, None, lab.root, Console(quiet=True))
  with closing(Reader(lab.root)) as reader:
    (a,), (b,) = reader.evaluations(run), reader.evaluations(pair)
  assert a.results == b.results and a.items == b.items


def test_a_run_of_another_machine_is_refused_at_once(lab, tmp_path, monkeypatch):
  monkeypatch.setattr(driver, "gpus", lambda: ())
  run = lab.record(target__arch="sm_90a", target__dtype="bf16")
  with pytest.raises(TargetError, match=f"run {run} .*needs a GPU of .*; or `nmoe export` it"):
    command(lab, tmp_path, run)


def test_a_full_disk_leaves_no_half_of_items_or_answers(lab, tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  path = lab.root / "evals" / "a.parquet"
  made = Items(*[np.ones(2, dtype=np.int64)] * 8)
  write_items(path, {"a": made})
  before = path.read_bytes()
  with monkeypatch.context() as patched:
    patched.setattr(parquet.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match="a.parquet cannot be written .*No space.*make room"):
      write_items(path, {"a": made, "b": made})
  assert [f.name for f in path.parent.iterdir()] == ["a.parquet"] and path.read_bytes() == before
  source = items(tmp_path)
  monkeypatch.setattr(sources, "write_items", full)
  with pytest.raises(DataError, match="evals cannot be written .*No space.*make room"):
    evals.prep(source, lab.root, Console(quiet=True))
  assert [f.name for f in path.parent.iterdir()] == ["a.parquet"]


def test_what_is_not_there_is_named(lab, tmp_path):
  run = lab.record()
  with pytest.raises(CheckpointError, match=f"run {run} .* has no checkpoint"):
    command(lab, tmp_path, run)
  lab.attempt(run)
  with pytest.raises(CheckpointError, match="has the steps 9, 12, not 4"):
    command(lab, tmp_path, run, step=4)
  items(tmp_path)
  with pytest.raises(DataError, match="holds no items of task pairs; run `pip download"):
    command(lab, tmp_path, run)
