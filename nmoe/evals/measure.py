"""From nats of choices to measures of a task: bits per byte first, then accuracies, with errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from nmoe.errors import DataError
from nmoe.evals.requests import Document, sizes
from nmoe.files import replacing


@dataclass(frozen=True)
class Items:
  """What was measured of a task's choices, all of its documents after each other: arrays [C].

  document, choice: which; gold: whether it is the right one; nats, tokens, chars, bytes of the
  answer; hit: whether greedy decoding gives it.
  """

  document: np.ndarray
  choice: np.ndarray
  gold: np.ndarray
  nats: np.ndarray
  tokens: np.ndarray
  chars: np.ndarray
  bytes: np.ndarray
  hit: np.ndarray


def items_of(
  documents: Sequence[Document], nats: np.ndarray, tokens: np.ndarray, hit: np.ndarray
) -> Items:
  """The items of documents, whose choices have these nats, tokens and hits [C]."""
  chars, num_bytes = sizes(documents)
  counts = [len(d.answers) for d in documents]
  choice = np.concatenate([np.arange(n) for n in counts])
  gold = choice == np.repeat([d.gold for d in documents], counts)
  document = np.repeat(np.arange(len(documents)), counts)
  return Items(document, choice, gold, nats, tokens, chars, num_bytes, hit)


def per_document(items: Items) -> dict[str, np.ndarray]:
  """float64 [documents] by measure.

  bpb        bits per byte of the right answer (OLMES, arXiv 2406.08446)
  acc        whether the most probable choice is the right one; of one choice: whether greedy
             decoding gives it
  acc_char, acc_byte, acc_token   the same of the highest log-probability per character, per byte
             and per token
  p_correct  softmax over the choices of the log-probability per byte, at the right one
  """
  gold = items.gold
  measures = {"bpb": items.nats[gold] / (math.log(2) * items.bytes[gold])}
  edges = np.flatnonzero(np.diff(items.document, prepend=-1))
  if len(edges) == len(items.nats):
    return measures | {"acc": items.hit[gold].astype(np.float64)}
  per = {"acc": items.nats, "acc_char": items.nats / items.chars}
  per |= {"acc_byte": items.nats / items.bytes, "acc_token": items.nats / items.tokens}
  for name, values in per.items():
    best = np.minimum.reduceat(values, edges)
    first = np.array(
      [
        edge + int(np.argmax(values[edge:end] == low))
        for edge, end, low in zip(edges, [*edges[1:], len(values)], best, strict=True)
      ]
    )
    measures[name] = gold[first].astype(np.float64)
  weight = np.exp(
    -per["acc_byte"]
    + np.repeat(np.minimum.reduceat(per["acc_byte"], edges), np.diff([*edges, len(gold)]))
  )
  measures["p_correct"] = weight[gold] / np.add.reduceat(weight, edges)
  return measures


def summary(items: Items) -> dict[str, float]:
  """The mean of every measure over documents, and as NAME_se its standard error."""
  values = {}
  for name, x in per_document(items).items():
    values[name] = float(x.mean())
    values[f"{name}_se"] = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
  return values


def write_items(path: Path, items: Mapping[str, Items]) -> None:
  """Every choice as a row of a Parquet file: its task and the columns of Items. It appears by
  a rename.
  """
  columns: dict[str, Any] = {"task": np.repeat(list(items), [len(x.nats) for x in items.values()])}
  for f in fields(Items):
    columns[f.name] = np.concatenate([getattr(x, f.name) for x in items.values()])
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
      parquet.write_table(pa.table(columns), new)
  except OSError as error:
    raise DataError(f"{path} cannot be written ({error}); make room, then run again") from error


def read_items(path: Path) -> dict[str, Items]:
  """The items by task of a file of `write_items`."""
  try:
    table = parquet.read_table(path)
  except (OSError, pa.ArrowInvalid) as error:
    raise DataError(f"{path} cannot be read ({error}); evaluate the run again") from error
  columns = {name: table[name].to_numpy() for name in table.column_names}
  tasks = columns.pop("task")
  return {
    str(task): Items(**{name: column[tasks == task] for name, column in columns.items()})
    for task in dict.fromkeys(tasks)
  }
