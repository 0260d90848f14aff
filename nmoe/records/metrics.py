"""The metrics of a run, in DuckDB: `{root}/metrics/{run_id}/rank_{rank}.duckdb`.

A table of (step, tokens, tag, value, time); `loads` of (step, layer, count of each expert): the
tokens that a MoE layer sent to each of its experts in that step; `experts` of (step, layer, name,
value of each expert): its router's bias, and what nmoe.train.routing samples. DuckDB locks a file
while it is open for writing, so the writer keeps rows in memory, and from time to time opens the
file, appends them in one transaction and closes it: others read a live run in between. That takes
tens of milliseconds, in which a GPU would have nothing to do, so a thread does it beside the run.
One who holds the file open costs the run nothing: the rows go into `rank_{rank}.rows` (JSON) beside
it, and into the file at a later flush; `read` counts them in. A killed writer loses the rows not
yet flushed and nothing else: flush before a checkpoint becomes the newest, `rewind` to its step
after loading it.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from nmoe.errors import RecordError
from nmoe.records.root import Root

Series = tuple[np.ndarray, np.ndarray, np.ndarray]


class Timed(NamedTuple):
  """The rows of a tag in step order: int64, int64, float64, and seconds since 1970."""

  step: np.ndarray
  tokens: np.ndarray
  value: np.ndarray
  time: np.ndarray


Row = tuple[int, int, str, float, float]  # step, tokens, tag, value, time
Load = tuple[int, str, np.ndarray]  # step, name (COUNT: of loads), value_LE

OTHERS = ("Binder Error", "Catalog Error", "Conversion Error", "Not implemented Error")
LOCK_TIMEOUT_S = 10.0  # of a reader, and of the writer once it must have all its rows in the file
TRY_S = 0.2  # of a flush while the run goes on
FLUSH_S = 5.0  # between flushes of a run that is watched

_TABLE = """CREATE TABLE IF NOT EXISTS metrics (step BIGINT NOT NULL, tokens BIGINT NOT NULL,
  tag VARCHAR NOT NULL, value DOUBLE NOT NULL, time DOUBLE NOT NULL)"""
COUNT = "count"
_TABLES = {
  "metrics": _TABLE,
  "loads": "CREATE TABLE IF NOT EXISTS loads (step BIGINT, layer INTEGER, count UINTEGER[])",
  "experts": """CREATE TABLE IF NOT EXISTS experts (step BIGINT, layer INTEGER, name VARCHAR,
    value FLOAT[])""",
}
_TYPES = {"step": np.int64, "tokens": np.int64, "tag": object, "value": float, "time": float}
# DuckDB takes a NaN of a registered NumPy array for NULL.
_APPEND = (
  "INSERT INTO metrics SELECT step, tokens, tag, coalesce(value, 'NaN'::DOUBLE), time FROM batch"
)
_DELETE_AGAIN = """DELETE FROM metrics WHERE step >= ?
  AND (step, tag, time) IN (SELECT step, tag, time FROM batch)"""
_READ = """SELECT step, tokens, tag, value, time FROM (SELECT * FROM metrics UNION ALL
  SELECT step, tokens, tag, coalesce(value, 'NaN'::DOUBLE), time FROM batch
  WHERE (step, tag, time) NOT IN (SELECT step, tag, time FROM metrics WHERE step >= ?))"""
_DELETE_EXPERTS_AGAIN = (
  f"DELETE FROM loads WHERE step IN (SELECT step FROM per_expert WHERE name = '{COUNT}')",
  "DELETE FROM experts WHERE (step, name) IN (SELECT step, name FROM per_expert)",
)
_APPEND_EXPERTS = (
  f"""INSERT INTO loads SELECT step, layer, list(value::UINTEGER ORDER BY expert) FROM per_expert
  WHERE name = '{COUNT}' GROUP BY step, layer ORDER BY step, layer""",
  f"""INSERT INTO experts SELECT step, layer, name, list(value::FLOAT ORDER BY expert)
  FROM per_expert WHERE name <> '{COUNT}' GROUP BY step, layer, name ORDER BY step, name, layer""",
)


class LockedError(RecordError):
  """Another process has the file open."""


class _Writing(NamedTuple):
  """Rows on their way to the disk."""

  done: Future[None]
  rows: list[Row]
  loads: list[Load]


class Metrics:
  """The writer of one rank of one run. `add` begins to flush every `batch` rows, and FLUSH_S after
  the flush before, beside what follows; what becomes of that, the next calls tell.
  """

  def __init__(self, root: str | Path, run_id: str, rank: int = 0, batch: int = 4096):
    self.path = _path(root, run_id, rank)
    self.beside = self.path.with_suffix(".rows")
    self._batch = batch
    self._rows: list[Row] = []
    self._loads: list[Load] = []
    self._flushed = time.monotonic()
    self._told = False
    self._thread = ThreadPoolExecutor(1, "metrics")
    self._writing: _Writing | None = None

  def add(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
    """Log tag -> value at a step, after `tokens` tokens of the run. NaN and infinities are kept.
    RecordError if rows of an earlier call could not be written; they and these are kept.
    """
    now = time.time()
    self._rows += [(step, tokens, tag, float(value), now) for tag, value in values.items()]
    if self._writing is not None and self._writing.done.done():
      error = self._settle()
      if error is not None:
        raise error
    due = len(self._rows) >= self._batch or time.monotonic() - self._flushed >= FLUSH_S
    if due and self._writing is None:
      self._flushed = time.monotonic()
      rows, loads, self._rows, self._loads = self._rows, self._loads, [], []
      self._writing = _Writing(self._thread.submit(self._write, rows, loads), rows, loads)

  def add_loads(self, step: int, count_LE: np.ndarray) -> None:
    """Log the tokens of every expert of every MoE layer in a step, beside its `add`."""
    self.add_experts(step, COUNT, count_LE)

  def add_experts(self, step: int, name: str, value_LE: np.ndarray) -> None:
    """Log a value of every expert of every MoE layer in a step, beside its `add`."""
    self._loads.append((step, name, value_LE.astype(np.float64)))

  def flush(self, insist: bool = False) -> None:
    """Put what is held on disk before it returns, all or nothing.

    While another process has the file open, the rows go into the file beside it; insist: wait
    LOCK_TIMEOUT_S for the file and raise RecordError then. RecordError too if nothing can be
    written; the rows are kept for the next flush.
    """
    self._settle()  # what the thread could not write is tried again
    self._flushed = time.monotonic()
    self._write(self._rows, self._loads, insist)
    self._rows, self._loads = [], []

  def _settle(self) -> RecordError | None:
    """Wait for the thread. What it could not write is held again, and why is returned."""
    if self._writing is None:
      return None
    (done, rows, loads), self._writing = self._writing, None
    error = done.exception()
    if error is not None:
      self._rows, self._loads = rows + self._rows, loads + self._loads
      if not isinstance(error, RecordError):
        raise error
    return error

  def _write(self, rows: list[Row], loads: list[Load], insist: bool = False) -> None:
    early, early_loads = _kept(self.beside)
    rows, loads = early + rows, early_loads + loads
    if not rows:
      return
    try:
      self._append(rows, loads, early[0][0] if early else None, insist)
      self.beside.unlink(missing_ok=True)
    except LockedError as error:
      if insist:
        raise
      _keep(self.beside, rows, loads)
      if not self._told:
        sys.stderr.write(f"{error}; its rows are kept in {self.beside.name} meanwhile\n")
      self._told = True

  def _append(self, rows: list[Row], loads: list[Load], again: int | None, insist: bool) -> None:
    """again: the step from which on the file may hold some of the rows already."""
    batch = _batch(rows)
    if not self.path.exists():
      _create(self.path)
    with _opened(self.path, timeout_s=LOCK_TIMEOUT_S if insist else TRY_S) as db:
      _create_tables(db)  # of a file that a full disk left without, or of before there were any
      db.register("batch", batch)
      if again is not None:
        db.execute(_DELETE_AGAIN, [again])
      db.execute(_APPEND)
      if loads:
        db.register("per_expert", _per_expert(loads))
        for sql in (*(_DELETE_EXPERTS_AGAIN if again is not None else ()), *_APPEND_EXPERTS):
          db.execute(sql)

  def rewind(self, step: int) -> int:
    """Delete the rows after `step`: a run resumed from the checkpoint of `step` logs them again.

    Returns by how many steps they went further.
    """
    self._settle()
    early, early_loads = _kept(self.beside)
    last = max([step, *(row[0] for row in early + self._rows)])
    rows = [row for row in early + self._rows if row[0] <= step]
    _keep(self.beside, rows, [row for row in early_loads + self._loads if row[0] <= step])
    self._rows.clear()
    self._loads.clear()
    if self.path.exists():
      with _opened(self.path) as db:
        _create_tables(db)
        (end,) = db.execute("SELECT max(step) FROM metrics").fetchone()
        last = max(last, end or 0)
        for name in _TABLES:
          db.execute(f"DELETE FROM {name} WHERE step > ?", [step])
    return last - step

  def read(self) -> dict[str, Series]:
    """Flush, and everything logged so far, also before the run was interrupted."""
    self.flush(insist=True)
    return {tag: rows[:3] for tag, rows in _series(self.path, None).items()}


def read(
  root: str | Path, run_id: str, tags: Iterable[str] | None = None, rank: int = 0
) -> dict[str, Series]:
  """tag -> (steps int64, tokens int64, values float64), in step order; also while the run is live.

  `tags` None: all. Tags that were never logged are absent; a run that flushed nothing gives {}.
  """
  return {tag: rows[:3] for tag, rows in timed(root, run_id, tags, rank).items()}


def timed(
  root: str | Path, run_id: str, tags: Iterable[str] | None = None, rank: int = 0
) -> dict[str, Timed]:
  """The same with the time at which each row was logged."""
  return _series(_path(root, run_id, rank), tags)


def _series(path: Path, tags: Iterable[str] | None) -> dict[str, Timed]:
  early, _ = _kept(path.with_suffix(".rows"))  # before the file: a flush unlinks them last
  if not path.exists():
    return {}
  wanted = "" if tags is None else "WHERE tag IN (SELECT unnest(?))"
  with _opened(path, read_only=True) as db:
    if not db.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'metrics'").fetchall():
      return {}  # a full disk left the file without
    db.register("batch", _batch(early))
    found = db.execute(
      f"{_READ} {wanted} ORDER BY tag, step, time",
      [early[0][0] if early else 0, *([] if tags is None else [list(tags)])],
    ).fetchnumpy()
  tag = found["tag"]
  starts = [0, *(np.flatnonzero(tag[1:] != tag[:-1]) + 1), len(tag)]
  columns = [np.ma.getdata(found[name]) for name in Timed._fields]
  return {
    str(tag[i]): Timed(*(column[i:j] for column in columns))
    for i, j in zip(starts[:-1], starts[1:], strict=True)
    if i < j
  }


def rows_beside(path: Path) -> list[Row]:
  """The rows that wait beside a file of metrics, in the order in which they were added; the file
  may hold some of them already. RecordError if they cannot be read.
  """
  return _kept(path.with_suffix(".rows"))[0]


def _batch(rows: list[Row]) -> dict[str, np.ndarray]:
  """Columns of rows, for DuckDB."""
  columns = zip(*rows, strict=True) if rows else [()] * len(_TYPES)
  return {
    name: np.array(column, dtype)
    for (name, dtype), column in zip(_TYPES.items(), columns, strict=True)
  }


def _per_expert(loads: list[Load]) -> dict[str, np.ndarray]:
  """Columns of one row an expert."""
  steps, names, values = zip(*loads, strict=True)
  value_NLE = np.stack(values)
  n, layer, expert = (i.ravel() for i in np.indices(value_NLE.shape, np.int32))
  columns = {"step": np.array(steps, np.int64)[n], "name": np.array(names, object)[n]}
  return columns | {"layer": layer, "expert": expert, "value": value_NLE.ravel()}


def _path(root: str | Path, run_id: str, rank: int) -> Path:
  return Root(Path(root)).metrics(run_id, rank)


def _create(path: Path) -> None:
  """An empty file appears whole, by a rename: a writer killed here leaves nothing half written."""
  beside = path.with_suffix(".new")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    wal = beside.with_name(beside.name + ".wal")
    wal.unlink(missing_ok=True)
    with _opened(beside) as db:
      _create_tables(db)
    with _connect(beside, False, LOCK_TIMEOUT_S) as db:
      db.execute("CHECKPOINT")
    if wal.exists():  # what closing could not move into the file: a full disk
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    beside.rename(path)
  except duckdb.Error as error:
    raise RecordError(f"{path}: {str(error).splitlines()[0]}; {_remedy(error)}") from error
  except OSError as error:
    raise RecordError(
      f"{path}: cannot be created ({error.strerror}); set run.root (NMOE_ROOT) to a writable folder"
    ) from error


def _create_tables(db: duckdb.DuckDBPyConnection) -> None:
  for table in _TABLES.values():
    db.execute(table)


def _kept(beside: Path) -> tuple[list[Row], list[Load]]:
  """What lies in a file beside the metrics, in the order in which it was added."""
  try:
    found = json.loads(beside.read_text(encoding="utf-8"))
    loads = [(step, name, np.array(value_LE)) for step, name, value_LE in found["loads"]]
    rows = [(int(s), int(t), str(tag), float(v), float(at)) for s, t, tag, v, at in found["rows"]]
    return rows, loads
  except (FileNotFoundError, NotADirectoryError):
    return [], []
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise RecordError(
      f"{beside}: cannot be read ({error}); move it away: it has the last rows of the metrics"
    ) from error


def _keep(beside: Path, rows: list[Row], loads: list[Load]) -> None:
  """Write, by a rename, what the metrics do not hold yet; no file if that is nothing."""
  if not rows:
    beside.unlink(missing_ok=True)
    return
  held = {"rows": rows, "loads": [(step, name, value.tolist()) for step, name, value in loads]}
  new = beside.with_suffix(".rows-new")
  try:
    with new.open("w", encoding="utf-8") as file:
      json.dump(held, file)
      file.flush()
      os.fsync(file.fileno())
    new.replace(beside)
  except OSError as error:
    raise RecordError(f"{beside}: cannot be written ({error.strerror}); free space") from error


@contextmanager
def _opened(
  path: Path, read_only: bool = False, timeout_s: float | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
  """The open file, in one transaction. DuckDB's errors become RecordError with the remedy.

  timeout_s: how long to wait for another who has it open; None: LOCK_TIMEOUT_S.
  """
  try:
    with _connect(path, read_only, LOCK_TIMEOUT_S if timeout_s is None else timeout_s) as db:
      db.execute("BEGIN")
      yield db
      db.execute("COMMIT")
  except duckdb.Error as error:
    kind = LockedError if is_locked(error) else RecordError
    raise kind(f"{path}: {str(error).splitlines()[0]}; {_remedy(error)}") from error


def _connect(path: Path, read_only: bool, timeout_s: float) -> duckdb.DuckDBPyConnection:
  """Open, waiting up to timeout_s for a writer or reader that has the file open just now."""
  deadline = time.monotonic() + timeout_s
  while True:
    try:
      return duckdb.connect(str(path), read_only=read_only, config={"threads": 1})
    except duckdb.Error as error:
      if not is_locked(error) or time.monotonic() > deadline:
        raise
    time.sleep(0.02)


def is_locked(error: duckdb.Error) -> bool:
  """Whether another process, or a thread of this one, has the file open just now: DuckDB has no
  error class for it.
  """
  told = ("Conflicting lock", "Could not set lock", "different configuration than existing")
  return any(words in str(error) for words in told)


def _remedy(error: duckdb.Error) -> str:
  message = str(error)
  if is_locked(error):
    return (
      "it stayed locked: close the process that has it open, or, if none has, put run.root on a "
      "filesystem with file locks"
    )
  if "not a valid DuckDB" in message or "orrupt" in message:
    return "the file is corrupt: move it away; the run's record and checkpoints are intact"
  if message.startswith(OTHERS):
    return (
      "the file is another program's: move it away; the run's record and checkpoints are intact"
    )
  return "check free space and write access of this folder"
