"""Documents through HuggingFace `datasets`: the Hub at a commit, local jsonl and parquet files."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import datasets
import pyarrow
from datasets.exceptions import DatasetsError

from nmoe.data.mixture import FilesSource, HuggingFaceSource
from nmoe.data.sources import Document, Documents, Skip, file_identity, find_files
from nmoe.errors import DataError

BATCH_ROWS = 1000
BUILDERS = {"jsonl": "json", "parquet": "parquet"}
_FAILURES = (DatasetsError, pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError)


def identity(source: FilesSource | HuggingFaceSource) -> list[str]:
  """The commit of a dataset of the Hub; the hashes of local files in order."""
  if isinstance(source, HuggingFaceSource):
    return [source.dataset, source.revision]
  return [file_identity(path) for path in find_files(source)]


def documents(source: FilesSource | HuggingFaceSource) -> Documents:
  """Rows are streamed in batches. Raises DataError when the text field is missing or not text."""
  if isinstance(source, HuggingFaceSource):
    where = f"dataset {source.dataset} at {source.revision}, split {source.split!r}"
    yield from _rows(source, where, source.dataset, name=source.config, revision=source.revision)
    return
  for path in find_files(source):
    yield from _rows(source, str(path), BUILDERS[source.format], data_files=str(path))


def _rows(source: FilesSource | HuggingFaceSource, where: str, path: str, **given) -> Documents:
  split = source.split if isinstance(source, HuggingFaceSource) else "train"
  try:
    rows = datasets.load_dataset(path, split=split, streaming=True, **given)
    for table in rows.with_format("arrow").iter(BATCH_ROWS):
      yield from _texts(table, source.text_field, f"source {source.name!r}: {where}")
  except StopIteration:  # what the json builder raises for a file without rows
    return
  except _FAILURES as error:
    raise DataError(
      f"source {source.name!r}: {where} cannot be read ({type(error).__name__}: {error}); check "
      "the name, the network, that the file is whole and of the format that the mixture states"
    ) from error


def _texts(table: pyarrow.Table, field: str, where: str) -> Iterator[Document | Skip]:
  if field not in table.column_names:
    close = difflib.get_close_matches(field, table.column_names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(f"{where} has no field {field!r}, it has {table.column_names}{hint}")
  column = table[field]
  if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
    raise DataError(f"{where}: field {field!r} is {column.type}, text_field must name strings")
  for text in column.to_pylist():
    yield Skip("null") if text is None else Document(text)
