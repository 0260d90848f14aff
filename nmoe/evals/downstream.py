"""A suite on a model: its tasks tokenized and cut into batches once, scored whenever asked.

In a training run and in `nmoe eval` it is the same code. It changes nothing of the model and draws
no random number, so a run with a suite trains the same bits as one without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmoe.config.sections import Config
from nmoe.data.tokenizer import Tokenizer
from nmoe.distributed.parallel import Parallel
from nmoe.errors import DataError
from nmoe.evals.measure import Items, items_of, summary
from nmoe.evals.requests import (
  Document,
  Row,
  by_accuracy,
  find_task,
  read_manifest,
  read_task,
  rows_of,
)
from nmoe.evals.scoring import Batch, Told, batches, score, untold
from nmoe.evals.suites import CORE, Suite, items_digest
from nmoe.model.decoder import Model
from nmoe.wording import counted

MAX_LOST = 0.01  # of a task's items may lose some of their own question, not of examples alone


@dataclass(frozen=True)
class Outcome:
  """values by tag (eval/TASK/MEASURE, eval/SUITE/MEASURE), items by task."""

  values: dict[str, float]
  items: dict[str, Items]
  seconds: float


class Downstream:
  """A suite, prepared for a configuration's tokenizer, context and micro-batch.

  evals: the folder of prepared items (Root.evals). digest: 16 hex digits over the items and their
  number. chosen: the tasks over which the suite's accuracy is a mean, those that others report an
  accuracy of. Raises DataError for items that are missing, changed, or too long for the context.
  """

  def __init__(self, suite: Suite, evals: Path, config: Config, tokenizer: Tokenizer):
    self.suite, self.longest = suite, config.data.seq_len
    self.documents: dict[str, list[Document]] = {}
    self.rows: dict[str, list[Row]] = {}
    self.about: dict[str, dict[str, Any]] = {}
    for task in suite.tasks:
      folder = find_task(evals, task)
      documents = read_task(folder, task, suite.limit)
      rows = [row for d in documents for row in rows_of(d, tokenizer, self.longest)]
      _check_length(task, rows, self.longest)
      self.documents[task], self.rows[task] = documents, rows
      self.about[task] = read_manifest(folder)["tasks"][task]
    self.chosen = [task for task, about in self.about.items() if by_accuracy(about)]
    self.digest = items_digest(suite, evals)
    self._batches, self._total = self._cut(config.rank_tokens)

  def run(self, model: Model, parallel: Parallel, told: Told = untold) -> Outcome:
    """Score every task; every rank calls it and gets the same outcome. told: as of `score`."""
    began = time.perf_counter()
    nats, hits = score(model, parallel, self._batches, self._total, told)
    values, items, begin = {}, {}, 0
    for task, rows in self.rows.items():
      tokens = np.array([len(row.ids) - row.start for row in rows])
      edges = begin + np.concatenate([[0], np.cumsum(tokens)[:-1]])
      sums = np.add.reduceat(nats[: begin + tokens.sum()], edges)
      whole = np.logical_and.reduceat(hits[: begin + tokens.sum()], edges)
      begin += int(tokens.sum())
      items[task] = items_of(self.documents[task], sums, tokens, whole)
      values |= {f"eval/{task}/{name}": x for name, x in summary(items[task]).items()}
      values[f"eval/{task}/merged"] = float(sum(row.merged for row in rows))
      values[f"eval/{task}/truncated"] = float(sum(row.cut > 0 for row in rows))
    for name, tasks in {"bpb": self.rows, "acc": self.chosen}.items():
      if tasks:
        mean = np.mean([values[f"eval/{task}/{name}"] for task in tasks])
        values[f"eval/{self.suite.name}/{name}"] = float(mean)
    if set(CORE) <= set(self.rows):
      values[f"eval/{self.suite.name}/core"] = core(values, self.about)
    return Outcome(values, items, time.perf_counter() - began)

  def _cut(self, tokens: int) -> tuple[list[Batch], int]:
    """All batches of all tasks, sorted by width, task, document and choice, and the number of
    answer tokens.
    """
    rows = [row for task in self.rows for row in self.rows[task]]
    return batches(rows, range(len(rows)), self.longest, tokens), sum(
      len(row.ids) - row.start for row in rows
    )


def core(values: Mapping[str, float], about: Mapping[str, Mapping[str, Any]]) -> float:
  """DCLM's CORE: the mean over its 22 tasks of (accuracy − chance) / (1 − chance)."""
  centered = []
  for task in CORE:
    chance = about[task]["chance"]
    accuracy = values[f"eval/{task}/{about[task]['primary']}"]
    centered.append((accuracy - chance) / (1 - chance))
  return float(np.mean(centered))


def _check_length(task: str, rows: list[Row], longest: int) -> None:
  lost = [row for row in rows if row.lost > 0]
  if len(lost) > MAX_LOST * len(rows):
    most = max(len(row.ids) - 1 + row.lost for row in lost)
    raise DataError(
      f"task {task}: {len(lost)} of {counted(len(rows), 'item')} do not fit data.seq_len = "
      f"{longest}, even without examples (the longest has {most} tokens), more than "
      f'{MAX_LOST:.0%}; leave the task out, or take suite "short"'
    )
