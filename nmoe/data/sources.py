"""Documents of a mixture's sources: one reader module per kind.

A reader module has two functions:
  identity(source, hash_of)  a JSON value that changes when the text can; hash_of: a file's sha256
  documents(source)          yields Document, or Skip for what is no text; always in the same order

`reader` imports the module by name. It is the one such place beside the target's choice of kernels:
the `datasets` library takes a second to import, and the embedded text must not wait for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from types import ModuleType

from nmoe.data.mixture import FilesSource, Source
from nmoe.errors import DataError

_MODULES = {
  "python": "nmoe.data.sources_python",
  "huggingface": "nmoe.data.sources_datasets",
  "files": "nmoe.data.sources_files",
}


@dataclass(frozen=True, slots=True)
class Document:
  text: str
  group: bytes | None = None  # what decides the split; None: the text. Equal groups stay together.


@dataclass(frozen=True, slots=True)
class Skip:
  reason: str  # counted in the manifest under this name


@dataclass(frozen=True, slots=True)
class Odd(Skip):
  """A row that its writer can't have meant: too many of them stop the preparation."""

  detail: str  # its place and what is wrong with it


def reader(source: Source) -> ModuleType:
  """The module that reads this source's kind."""
  return importlib.import_module(_MODULES[source.kind])


def find_files(source: FilesSource) -> list[Path]:
  """The files of the source's paths, sorted, each once. A path is a glob unless a file has that
  very name. DataError when one matches none.
  """
  found: set[str] = set()
  for pattern in source.paths:
    found_here = [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)
    matches = [p for p in found_here if Path(p).is_file()]
    if not matches:
      raise DataError(f"source {source.name!r}: no file matches {pattern}; correct its paths")
    found.update(matches)
  return [Path(p) for p in sorted(found)]


def check_there(sources: Iterable[Source]) -> None:
  """DataError when a path of one matches no file: hours may pass before its turn to be read."""
  for source in sources:
    if isinstance(source, FilesSource):
      find_files(source)


def read_bytes(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise DataError(
      f"{path}: cannot be read: {error}; check the file and its permissions"
    ) from error


def decoded(data: bytes, group: bytes | None = None) -> Document | Skip:
  """UTF-8 bytes as a document, without the mark of byte order that some begin with."""
  try:
    return Document(data.decode("utf-8-sig"), group)
  except UnicodeDecodeError:
    return Skip("not_utf8")


def text_of(data: bytes | None, place: str) -> Document | Skip:
  """A row's string by its bytes; None is a row without one."""
  if data is None:
    return Skip("null")
  try:
    return Document(data.decode("utf-8"))
  except UnicodeDecodeError as error:
    return Odd("not_utf8", f"{place}: {error}")


Documents = Iterator[Document | Skip]
