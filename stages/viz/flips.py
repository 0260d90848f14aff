"""Which evaluation items two groups of runs answer differently, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from nmoe.errors import DataError, RecordError
from nmoe.evals.measure import Items, per_document, read_items
from nmoe.evals.requests import Document, find_task, read_task
from nmoe.records.live import Live
from nmoe.records.reader import Run
from stages.judge.items import task_differences
from stages.viz.answers import Json, plain

SHOWN = 8  # items of a task
Pair = tuple[Mapping[str, Items], Mapping[str, Items]]
Version = tuple[Path, int]  # a file, and when it was written: another one may take its place


def flips(live: Live, pairs: Sequence[tuple[Run, Run]]) -> Json:
  """Of the newest suite and step that all runs answered: a row a task, and its items that flipped
  in most seeds. {"missing": why} where there is none.
  """
  if not pairs:
    return {"missing": "no seed is on both sides"}
  answered = [[live.eval_items(run.id) for run in pair] for pair in pairs]
  common = set.intersection(*(set(files) for pair in answered for files in pair))
  if not common:
    return {"missing": "no suite was answered by all of these runs at one step; set [eval] suite"}
  suite, step = max(common, key=lambda key: (key[1], key[0]))
  try:
    items = [tuple(_read(files[suite, step]) for files in pair) for pair in answered]
    differences = task_differences(items, "acc")
  except (DataError, RecordError) as error:
    return {"missing": str(error)}
  tasks = [asdict(d) | _flipped(live.paths.evals, d.task, items) for d in differences]
  return plain({"suite": suite, "step": step, "seeds": len(pairs), "tasks": tasks})


def _flipped(evals: Path, task: str, pairs: Sequence[Pair]) -> Json:
  """How many answers of all seeds became right and wrong, and the items that did so most."""
  change = np.stack([_right(b[task]) - _right(a[task]) for a, b in pairs])  # [seeds, documents]
  net = change.sum(0)
  order = np.argsort(-np.abs(net), kind="stable")[:SHOWN]
  documents = _documents(evals, task)
  found = []
  for i in (int(i) for i in order if net[i]):
    of = documents[i] if i < len(documents) else None
    text = {"context": of.contexts[of.gold][-300:], "answer": of.answers[of.gold]} if of else {}
    gained, lost = int((change[:, i] > 0).sum()), int((change[:, i] < 0).sum())
    found.append({"document": i, "gained": gained, "lost": lost, **text})
  return {"gained": int((change > 0).sum()), "lost": int((change < 0).sum()), "items": found}


def _right(items: Items) -> np.ndarray:
  return per_document(items)["acc"]


def _read(path: Path) -> dict[str, Items]:
  return _read_once((path, path.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _read_once(version: Version) -> dict[str, Items]:
  return read_items(version[0])


def _documents(evals: Path, task: str) -> list[Document]:
  """The task's items, in the order in which they are asked; [] where they are not in this root."""
  try:
    return _documents_once(find_task(evals, task), task)
  except DataError:
    return []


@lru_cache(maxsize=64)
def _documents_once(folder: Path, task: str) -> list[Document]:
  return read_task(folder, task, 0)
