"""The metrics of a run, in DuckDB: `{root}/metrics/{run_id}/rank_{rank}.duckdb`.

A table of (step, tokens, tag, value, time), and `loads` of (step, layer, count of each expert):
the tokens that a MoE layer sent to each of its experts in that step. DuckDB locks a file while it
is open for writing, so the writer keeps rows in memory, and `flush` opens the file, appends them in
one transaction and closes it: others read a live run in between. A killed writer loses the rows not
yet flushed and nothing else: flush before a checkpoint becomes the newest, `rewind` to its step
after loading it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np

from nmoe.errors import RecordError
from nmoe.records.root import Root

Series = tuple[np.ndarray, np.ndarray, np.ndarray]

LOCK_TIMEOUT_S = 10.0

_TABLE = """CREATE TABLE metrics (step BIGINT NOT NULL, tokens BIGINT NOT NULL,
  tag VARCHAR NOT NULL, value DOUBLE NOT NULL, time DOUBLE NOT NULL)"""
_LOADS = "CREATE TABLE IF NOT EXISTS loads (step BIGINT, layer INTEGER, count UINTEGER[])"
_TYPES = {"step": np.int64, "tokens": np.int64, "tag": object, "value": float, "time": float}
# DuckDB takes a NaN of a registered NumPy array for NULL.
_APPEND = (
  "INSERT INTO metrics SELECT step, tokens, tag, coalesce(value, 'NaN'::DOUBLE), time FROM batch"
)
_APPEND_LOADS = """INSERT INTO loads SELECT step, layer, list(count ORDER BY expert) FROM counts
  GROUP BY step, layer ORDER BY step, layer"""


class Metrics:
  """The writer of one rank of one run. `add` flushes by itself every `batch` rows."""

  def __init__(self, root: str | Path, run_id: str, rank: int = 0, batch: int = 4096):
    self.path = _path(root, run_id, rank)
    self._batch = batch
    self._rows: list[tuple[int, int, str, float, float]] = []
    self._loads: list[tuple[int, np.ndarray]] = []

  def add(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
    """Log tag -> value at a step, after `tokens` tokens of the run. NaN and infinities are kept."""
    now = time.time()
    self._rows += [(step, tokens, tag, float(value), now) for tag, value in values.items()]
    if len(self._rows) >= self._batch:
      self.flush()

  def add_loads(self, step: int, count_LE: np.ndarray) -> None:
    """Log the tokens of every expert of every MoE layer in a step, beside its `add`."""
    self._loads.append((step, count_LE.astype(np.uint32)))

  def flush(self) -> None:
    """Append what is held, all or nothing.

    Raises RecordError, and keeps the rows for the next flush, if the file cannot be written.
    """
    if not self._rows:
      return
    columns = zip(_TYPES.items(), zip(*self._rows, strict=True), strict=True)
    batch = {name: np.array(column, dtype) for (name, dtype), column in columns}
    if not self.path.exists():
      _create(self.path)
    with _opened(self.path) as db:
      db.register("batch", batch)
      db.execute(_APPEND)
      if self._loads:
        db.execute(_LOADS)  # of a file of before there were any
        db.register("counts", _counts(self._loads))
        db.execute(_APPEND_LOADS)
    self._rows.clear()
    self._loads.clear()

  def rewind(self, step: int) -> None:
    """Delete the rows after `step`: a run resumed from the checkpoint of `step` logs them again."""
    self._rows = [row for row in self._rows if row[0] <= step]
    self._loads = [row for row in self._loads if row[0] <= step]
    if self.path.exists():
      with _opened(self.path) as db:
        db.execute("DELETE FROM metrics WHERE step > ?", [step])
        db.execute(_LOADS)
        db.execute("DELETE FROM loads WHERE step > ?", [step])

  def read(self) -> dict[str, Series]:
    """Flush, and everything logged so far, also before the run was interrupted."""
    self.flush()
    return _series(self.path, None)


def read(
  root: str | Path, run_id: str, tags: Iterable[str] | None = None, rank: int = 0
) -> dict[str, Series]:
  """tag -> (steps int64, tokens int64, values float64), in step order; also while the run is live.

  `tags` None: all. Tags that were never logged are absent; a run that flushed nothing gives {}.
  """
  return _series(_path(root, run_id, rank), tags)


def _series(path: Path, tags: Iterable[str] | None) -> dict[str, Series]:
  if not path.exists():
    return {}
  wanted = "" if tags is None else "WHERE tag IN (SELECT unnest(?))"
  with _opened(path, read_only=True) as db:
    found = db.execute(
      f"SELECT step, tokens, tag, value FROM metrics {wanted} ORDER BY tag, step, time",
      [] if tags is None else [list(tags)],
    ).fetchnumpy()
  tag = found["tag"]
  starts = [0, *(np.flatnonzero(tag[1:] != tag[:-1]) + 1), len(tag)]
  columns = [np.ma.getdata(found[name]) for name in ("step", "tokens", "value")]
  return {
    str(tag[i]): tuple(column[i:j] for column in columns)
    for i, j in zip(starts[:-1], starts[1:], strict=True)
    if i < j
  }


def _counts(loads: list[tuple[int, np.ndarray]]) -> dict[str, np.ndarray]:
  """Columns of one row an expert."""
  steps, counts = zip(*loads, strict=True)
  count_NLE = np.stack(counts)
  n, layer, expert = (i.ravel() for i in np.indices(count_NLE.shape, np.int32))
  step = np.array(steps, np.int64)[n]
  return {"step": step, "layer": layer, "expert": expert, "count": count_NLE.ravel()}


def _path(root: str | Path, run_id: str, rank: int) -> Path:
  return Root(Path(root)).metrics(run_id, rank)


def _create(path: Path) -> None:
  """An empty file appears whole, by a rename: a writer killed here leaves nothing half written."""
  beside = path.with_suffix(".new")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    with _opened(beside) as db:
      db.execute(_TABLE)
      db.execute(_LOADS)
    beside.rename(path)
  except OSError as error:
    raise RecordError(
      f"{path}: cannot be created ({error.strerror}); set run.root (NMOE_ROOT) to a writable folder"
    ) from error


@contextmanager
def _opened(path: Path, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
  """The open file, in one transaction. DuckDB's errors become RecordError with the remedy."""
  try:
    with _connect(path, read_only) as db:
      db.execute("BEGIN")
      yield db
      db.execute("COMMIT")
  except duckdb.Error as error:
    raise RecordError(f"{path}: {str(error).splitlines()[0]}; {_remedy(str(error))}") from error


def _connect(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
  """Open, waiting up to LOCK_TIMEOUT_S for a writer or reader that has the file open just now."""
  deadline = time.monotonic() + LOCK_TIMEOUT_S
  while True:
    try:
      return duckdb.connect(str(path), read_only=read_only, config={"threads": 1})
    except duckdb.Error as error:
      if not _locked(str(error)) or time.monotonic() > deadline:
        raise
    time.sleep(0.02)


def _locked(message: str) -> bool:
  return "Conflicting lock" in message or "Could not set lock" in message


def _remedy(message: str) -> str:
  if _locked(message):
    return (
      f"it stayed locked for {LOCK_TIMEOUT_S:g} s: close the process that has it open, or, "
      "if none has, put run.root on a filesystem with file locks"
    )
  if "not a valid DuckDB" in message or "orrupt" in message:
    return "the file is corrupt: move it away; the run's record and checkpoints are intact"
  return "check free space and write access of this folder"
