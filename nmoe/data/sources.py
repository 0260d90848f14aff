"""Documents of a mixture's sources: one reader module per kind.

A reader module has two functions:
  identity(source)   a JSON value that changes when the text can change
  documents(source)  yields Document, or Skip for what is no text; always in the same order

`reader` imports the module by name. It is the one such place beside the target's choice of kernels:
the `datasets` library takes a second to import, and the embedded text must not wait for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from types import ModuleType

from nmoe.data.mixture import FilesSource, Source
from nmoe.errors import DataError
from nmoe.files import sha256

_MODULES = {
  "python": "nmoe.data.sources_python",
  "huggingface": "nmoe.data.sources_datasets",
  "text": "nmoe.data.sources_text",
  "jsonl": "nmoe.data.sources_datasets",
  "parquet": "nmoe.data.sources_datasets",
}


@dataclass(frozen=True, slots=True)
class Document:
  text: str
  group: bytes | None = None  # what decides the split; None: the text. Equal groups stay together.


@dataclass(frozen=True, slots=True)
class Skip:
  reason: str  # counted in the manifest under this name


def reader(source: Source) -> ModuleType:
  """The module that reads this source's kind or, for local files, their format."""
  key = source.format if isinstance(source, FilesSource) else source.kind
  return importlib.import_module(_MODULES[key])


def find_files(source: FilesSource) -> list[Path]:
  """The files of the source's globs, sorted, each once. DataError when a glob matches none."""
  found: set[str] = set()
  for pattern in source.paths:
    matches = [p for p in glob(pattern, recursive=True) if Path(p).is_file()]
    if not matches:
      raise DataError(f"source {source.name!r}: no file matches {pattern}; correct its paths")
    found.update(matches)
  return [Path(p) for p in sorted(found)]


def read_bytes(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise DataError(
      f"{path}: cannot be read: {error}; check the file and its permissions"
    ) from error


def file_identity(path: Path) -> str:
  """The sha256 of the content, in hex."""
  try:
    return sha256(path)
  except OSError as error:
    raise DataError(
      f"{path}: cannot be read: {error}; check the file and its permissions"
    ) from error


def decoded(data: bytes, group: bytes | None = None) -> Document | Skip:
  """UTF-8 bytes as a document."""
  try:
    return Document(data.decode("utf-8"), group)
  except UnicodeDecodeError:
    return Skip("not_utf8")


Documents = Iterator[Document | Skip]
