"""Local files: text (a file or a paragraph a document), jsonl and parquet (a row a document).

A file that ends in .gz, .bz2, .zst or .lz4 is decompressed while it is read. Of jsonl and parquet
only `text_field` is read, as a string: what other fields hold is nobody's business here. A row that
is no text costs itself; more than `ODD_SHARE` of a file's rows, or of a source's files or
paragraphs of text, stop the preparation.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from nmoe.data.mixture import FilesSource
from nmoe.data.sources import Document, Documents, Odd, Skip, find_files, text_of
from nmoe.errors import DataError

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
PACKED = (".xz", ".lzma", ".br", ".z", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")
BATCH_ROWS = 1000
ODD_SHARE = 0.05  # of a file's rows; one is always allowed beside others
ODD_EARLY = 1000  # so many stop a file before its end
_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(r"(?:\r\n|\r(?!\n)|\n)\s*(?:\r\n|\r|\n)")


def identity(source: FilesSource, hash_of: Callable[[Path], str]) -> list[str]:
  """The files' hashes in order; names and places do not count."""
  return [hash_of(path) for path in find_files(source)]


def documents(source: FilesSource) -> Documents:
  """Raises DataError for a file that cannot be read or that has too many odd rows."""
  if source.format == "text":
    yield from bounded(_texts(source), f"source {source.name!r}")
    return
  for path in find_files(source):
    with _opened(source, path) as (file, where):
      if source.format == "jsonl":
        yield from bounded(_lines(file, source.text_field), where)
      else:
        yield from bounded(_columns(file, source.text_field, where), where)


def _texts(source: FilesSource) -> Documents:
  for path in find_files(source):
    with _opened(source, path) as (file, _):
      yield from _text(file.read(), source.documents, str(path))


@contextmanager
def _opened(source: FilesSource, path: Path) -> Iterator[tuple[IO[bytes], str]]:
  """A file as it was before its compression, and what an error calls it."""
  where = f"source {source.name!r}: {path}"
  suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
  ends = suffixes[-2:] if suffixes[-1] in CODECS else suffixes[-1:]
  packed = [suffix for suffix in ends if suffix in PACKED]
  if packed:
    raise DataError(
      f"{where}: {packed[0]} is not unpacked here; unpack the file, or compress it alone, into one "
      f"of {', '.join(CODECS)}"
    )
  codec = CODECS.get(suffixes[-1])
  with _readable(where), path.open("rb") as raw, _decompressed(raw, codec) as file:
    yield file, where


@contextmanager
def _readable(where: str) -> Iterator[None]:
  """A failure to read or to decompress as DataError."""
  try:
    yield
  except (OSError, pa.ArrowException) as error:
    raise DataError(
      f"{where} cannot be read ({type(error).__name__}: {error}); check the file's permissions, "
      "that it is whole and of the format that the mixture states"
    ) from error


@contextmanager
def _decompressed(raw: IO[bytes], codec: str | None) -> Iterator[IO[bytes]]:
  if codec is None:
    yield raw
    return
  with pa.input_stream(raw, compression=codec) as stream, BufferedReader(stream) as file:
    yield file


def _text(data: bytes, unit: str, place: str) -> Documents:
  """A file, or each of its paragraphs; a byte that is no UTF-8 costs the one that it is in."""
  if unit == "files":
    yield text_of(data.removeprefix(_BOM), place)
    return
  text = data.removeprefix(_BOM).decode("utf-8", errors="surrogateescape")
  for number, paragraph in enumerate(_BLANK_LINES.split(text), 1):
    if paragraph.strip():
      part = paragraph.strip("\r\n").encode("utf-8", errors="surrogateescape")
      yield text_of(part, f"{place}, paragraph {number}")


def _lines(file: IO[bytes], field: str) -> Documents:
  """A line a row; blank lines are none."""
  for number, line in enumerate(file, 1):
    line = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
    if line:
      yield _row(line, field, f"line {number}")


def _row(line: bytes, field: str, place: str) -> Document | Skip:
  try:
    row = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return Odd("not_utf8", f"{place}: {error}")
  except (ValueError, RecursionError) as error:
    return Odd("bad_json", f"{place}: {error}")
  if not isinstance(row, dict):
    return Odd("bad_json", f"{place}: a {type(row).__name__}, not an object")
  if field not in row:
    return Odd("no_field", f"{place}: {missing(field, list(row))}")
  text = row[field]
  if text is None:
    return Skip("null")
  if not isinstance(text, str):
    return Odd("not_text", f"{place}: field {field!r} is {type(text).__name__}, not a string")
  return Document(text)


def _columns(file: IO[bytes], field: str, where: str) -> Documents:
  """The rows of a parquet file. DataError if the column is missing or can't hold text."""
  if isinstance(file, BufferedReader) and not file.seekable():
    file = pa.BufferReader(file.read())
  table = pq.ParquetFile(file)
  if table.metadata.num_rows == 0:
    return
  if field not in table.schema_arrow.names:
    raise DataError(f"{where}: {missing(field, table.schema_arrow.names)}")
  if table.schema_arrow.names.count(field) > 1:
    raise DataError(f"{where}: field {field!r} is there more than once; write the file with one")
  first = 1
  for batch in table.iter_batches(BATCH_ROWS, columns=[field]):
    for place, data in enumerate(binary(batch[field], field, where), first):
      yield text_of(data, f"row {place}")
    first += len(batch)


def binary(column: pa.Array | pa.ChunkedArray, field: str, where: str) -> list[bytes | None]:
  """A column of strings as their bytes, however it stores them; DataError for another type."""
  stored = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
  texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
  others = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
  if not any(fits(stored) for fits in (*texts, *others)):
    raise DataError(f"{where}: field {field!r} is {column.type}, text_field must name strings")
  return column.cast(pa.large_binary()).to_pylist()


def missing(field: str, fields: list[str]) -> str:
  """What is said of rows without the field."""
  close = difflib.get_close_matches(field, fields, n=1)
  hint = f"; did you mean {close[0]!r}?" if close else ""
  return f"no field {field!r}, it has {fields}{hint}"


def bounded(rows: Iterable[Document | Skip], where: str) -> Documents:
  """The rows of a file. DataError, naming the first odd one, if there are too many or only such."""
  total, odd = 0, 0
  first = ""
  for row in rows:
    total += 1
    if isinstance(row, Odd):
      first, odd = first or row.detail, odd + 1
      if odd > max(ODD_EARLY, ODD_SHARE * total):
        break
    yield row
  if odd and (odd == total or odd > max(1, ODD_SHARE * total)):
    raise DataError(
      f"{where} cannot be read: {odd} of {total} rows are no text ({first}); at most "
      f"{ODD_SHARE:.0%} may be: correct the file, its format or text_field in the mixture"
    )
