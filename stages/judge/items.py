"""Two arms on the same items: the difference of every task, and which can be told from chance.

d[document, seed] = variant − baseline of a measure. Its mean's error is clustered both by document
and by seed (Cameron, Gelbach, Miller 2011): documents are a sample of a task, seeds of training.
Tasks are tested together by Holm's procedure (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nmoe.errors import RecordError
from nmoe.evals.measure import Items, per_document
from stages.judge.intervals import rejected, two_sided_p

ALPHA = 0.05


@dataclass(frozen=True)
class TaskDifference:
  """variant − baseline of one measure of a task.

  error is the standard error of the mean, p two-sided of a mean of 0; told_apart: whether Holm's
  procedure over all tasks rejects that.
  """

  task: str
  measure: str
  documents: int
  seeds: int
  mean: float
  error: float
  p: float
  told_apart: bool


def task_differences(
  pairs: Sequence[tuple[Mapping[str, Items], Mapping[str, Items]]], measure: str
) -> list[TaskDifference]:
  """One a task, for the (baseline, variant) items of every seed.

  Raises RecordError where the two were asked other items.
  """
  found = []
  for task in pairs[0][0]:
    columns = [_difference(task, base, variant, measure) for base, variant in pairs]
    d = np.stack(columns, axis=1)
    error, freedom = clustered_error(d)
    mean = float(d.mean())
    p = two_sided(mean, error, freedom)
    found.append(TaskDifference(task, measure, *d.shape, mean, error, p, False))
  apart = rejected([t.p for t in found], ALPHA)
  return [
    TaskDifference(**{**vars(t), "told_apart": told}) for t, told in zip(found, apart, strict=True)
  ]


def _difference(
  task: str, base: Mapping[str, Items], variant: Mapping[str, Items], measure: str
) -> np.ndarray:
  same = task in variant and np.array_equal(base[task].bytes, variant[task].bytes)
  if not same or not np.array_equal(base[task].gold, variant[task].gold):
    raise RecordError(f"task {task}: the two arms were asked other items; evaluate both again")
  return per_document(variant[task])[measure] - per_document(base[task])[measure]


def clustered_error(d: np.ndarray) -> tuple[float, int]:
  """The standard error of the mean of d [documents, seeds], and its degrees of freedom.

  Of one seed it speaks of the documents alone.
  """
  documents, seeds = d.shape
  e = d - d.mean()

  def variance(sums: np.ndarray) -> float:
    groups = len(sums)
    return float((sums**2).sum()) / e.size**2 * (groups / (groups - 1) if groups > 1 else 1.0)

  by_document = variance(e.sum(1))
  if seeds == 1:
    return math.sqrt(by_document), documents - 1
  by_seed, alone = variance(e.sum(0)), variance(e.reshape(-1))
  both = max(by_document + by_seed - alone, by_document, by_seed)
  return math.sqrt(both), min(documents, seeds) - 1


def two_sided(mean: float, error: float, freedom: int) -> float:
  """p of Student's t; 1 where nothing differs, and where one document says nothing."""
  if mean == 0 or freedom < 1:
    return 1.0
  if error == 0:
    return 0.0
  return two_sided_p(mean / error, freedom)
