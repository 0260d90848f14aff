"""What an experiment's runs answered, task by task: each arm's mean, and the paired difference.

Read from the items that runs and `nmoe eval` leave in the root, of each run at its newest step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmoe.errors import RecordError
from nmoe.evals.measure import Items, per_document, read_items
from nmoe.records.root import Root
from stages.judge.items import TaskDifference, clustered_error, task_differences
from stages.report.findings import Arm

MEASURES = ("bpb", "acc")
NOTE = (
  "± is a standard error clustered by document and by seed; told apart by Holm's procedure over "
  "tasks, at 5 %"
)


@dataclass(frozen=True)
class TaskRow:
  """One measure of a task. arms: mean and standard error of each; difference: of two arms."""

  task: str
  measure: str
  documents: int
  arms: tuple[tuple[float, float], ...]
  difference: TaskDifference | None

  def cells(self) -> list[str]:
    """As a line of a table, without the task's name."""
    shown = [f"{mean:.4f} ± {error:.4f}" for mean, error in self.arms]
    d = self.difference
    if d is not None:
      sign = f"{d.mean:+.4f}".replace("-", "−")
      shown += [f"{sign} ± {d.error:.4f}", f"{d.p:.3g}", "yes" if d.told_apart else "no"]
    return [self.measure, f"{self.documents:,}", *shown]


@dataclass(frozen=True)
class Answers:
  """Of a suite: rows by task and measure, and over how many seeds."""

  suite: str
  seeds: int
  rows: tuple[TaskRow, ...]

  def head(self, arms: Sequence[Arm]) -> list[str]:
    more = ["variant − baseline", "p", "told apart"] if self.rows[0].difference else []
    return ["task", "measure", "documents", *(arm.name for arm in arms), *more]


def answers(root: Path, arms: Sequence[Arm]) -> tuple[Answers, ...]:
  """Of every suite that each arm's completed runs have, over the seeds that all arms share.

  Raises RecordError where runs were asked other items.
  """
  files = [_files(root, arm) for arm in arms]
  suites = {suite for of_arm in files for by_suite in of_arm.values() for suite in by_suite}
  found = []
  for suite in sorted(suites):
    seeds = set.intersection(*({s for s, have in f.items() if suite in have} for f in files))
    if seeds:
      read = [[read_items(f[seed][suite]) for seed in sorted(seeds)] for f in files]
      found.append(Answers(suite, len(seeds), _rows(read)))
  return tuple(found)


def _files(root: Path, arm: Arm) -> dict[int, dict[str, Path]]:
  """Seed -> suite -> the items of its newest step, of the runs that completed."""
  return {run.seed: Root(root).evaluated(run.id) for run in arm.runs if run.status == "completed"}


def _rows(read: Sequence[Sequence[Mapping[str, Items]]]) -> tuple[TaskRow, ...]:
  """read: arm -> seed -> task -> items."""
  rows = []
  for measure in MEASURES:
    differences: dict[str, TaskDifference] = {}
    if len(read) == 2:
      pairs = list(zip(*read, strict=True))
      differences = {d.task: d for d in task_differences(pairs, measure)}
    for task in read[0][0]:
      means = tuple(_mean([items.get(task) for items in of_arm], measure) for of_arm in read)
      documents = len(np.unique(read[0][0][task].document))
      rows.append(TaskRow(task, measure, documents, means, differences.get(task)))
  return tuple(sorted(rows, key=lambda row: list(read[0][0]).index(row.task)))


def _mean(of_seeds: Sequence[Items | None], measure: str) -> tuple[float, float]:
  columns = [per_document(items)[measure] for items in of_seeds if items is not None]
  if len(columns) < len(of_seeds) or len({len(column) for column in columns}) > 1:
    raise RecordError("the runs of an arm were asked other items; evaluate all of them again")
  d = np.stack(columns, axis=1)
  return float(d.mean()), clustered_error(d)[0]
