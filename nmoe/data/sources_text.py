"""Local text files: one document per file, UTF-8."""

from __future__ import annotations

from nmoe.data.mixture import FilesSource
from nmoe.data.sources import Documents, decoded, file_identity, find_files, read_bytes


def identity(source: FilesSource) -> list[str]:
  """The files' hashes in order; names and places do not count."""
  return [file_identity(path) for path in find_files(source)]


def documents(source: FilesSource) -> Documents:
  for path in find_files(source):
    yield decoded(read_bytes(path))
