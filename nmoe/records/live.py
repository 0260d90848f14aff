"""What the runs of a root log, read again and again while they run: the source of a dashboard.

A trainer cannot append to a DuckDB file that another process has open. So a file is opened only
when its stat has changed, for one short transaction, and only rows after the last known one are
read, of the tags that were asked for; rows that a trainer kept beside a locked file are counted in.
What is read is kept in memory and, so that a new process starts where the last one was, in a folder
outside the root. Nothing in the root is written, created or locked for longer than a query. A file
that cannot be read spoils nothing else: it says so in `trouble`, and what was read before stays.

One thing, and so one file: what was read is believed for as long as a stat, a row and a lock agree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile

import duckdb
import numpy as np

from nmoe.errors import RecordError
from nmoe.files import resolved
from nmoe.records.metrics import COUNT, Row, is_locked, rows_beside
from nmoe.records.reader import LIVE, Run
from nmoe.records.root import Root
from nmoe.records.snapshot import LiveReader, Snapshot

OPEN_TIMEOUT_S = 1.0  # a trainer's flush takes a tenth of it
RENEWED = 200  # files that one database in memory attaches: some kilobytes of each stay with it
LIVENESS_S = 5.0  # between two looks at the locks of running runs
OVERVIEW = (  # what a table of runs shows, and so is read of every file at once
  "train/loss",
  "val/bpb",
  "grad_norm/all",
  "train/tokens_per_s",
  "lr/dense",
  "memory/peak_bytes",
)
Stamp = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Logged:
  """The rows of one tag in the order in which they were written; four arrays of one length.

  step, tokens: int64; value, time (Unix seconds): float64.
  """

  step: np.ndarray
  tokens: np.ndarray
  value: np.ndarray
  time: np.ndarray

  def and_then(self, later: Logged | None) -> Logged:
    if later is None:
      return self
    return Logged(
      *(np.concatenate(pair) for pair in zip(_columns(self), _columns(later), strict=True))
    )


@dataclass(frozen=True)
class RankValues:
  """What rank 0 gathered of all ranks, as means over n equal parts of its logs, in order.

  step, tokens: int64 [n], time (Unix seconds): float64 [n], of the last log of a part; values: of
  each name, such as "forward_s" or "rows", float64 [ranks, n], NaN where none was told.
  """

  step: np.ndarray
  tokens: np.ndarray
  time: np.ndarray
  values: dict[str, np.ndarray]


_NONE = Logged(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, float, float)))


class Opener:
  """Opens DuckDB files read-only, each for the length of a block, in one database in memory: to
  attach a file takes a thirtieth of what a database of its own does. Threads may share it.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._memory: duckdb.DuckDBPyConnection | None = None
    self._numbers = itertools.count()

  @contextmanager
  def opened(self, path: Path, timeout_s: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """The open file; waits so long for a trainer that is writing to it."""
    number = next(self._numbers)
    name, db = f"file_{number}", self._cursor(number)
    try:
      _attach(db, path, name, timeout_s)
      try:
        db.execute(f"USE {name}")
        yield db
      finally:
        with suppress(duckdb.Error):  # of a database that a corrupt file spoilt
          db.execute("USE memory")
          db.execute(f"DETACH {name}")
    except (duckdb.FatalException, duckdb.InternalException):
      self._memory = None
      raise
    finally:
      db.close()

  def _cursor(self, number: int) -> duckdb.DuckDBPyConnection:
    with self._lock:
      if self._memory is None or number % RENEWED == 0:
        self._memory = duckdb.connect(config={"threads": 1})
      return self._memory.cursor()


class LiveFile:
  """The metrics of one run. Threads may share it."""

  def __init__(self, path: Path, kept: Path, opener: Opener):
    """kept: a file outside the root, for what was read; it need not exist."""
    self.path, self._kept, self._opener = path, kept, opener
    self._beside = path.with_suffix(".rows")
    self.trouble, self.locked = "", False
    self._lock = threading.Lock()
    self._stamp: Stamp | None = None
    self._begun = False
    self._forget()

  def read(self, tags: Iterable[str]) -> dict[str, Logged]:
    """tag -> its rows so far; a tag that was never logged is absent."""
    wanted = list(dict.fromkeys(tags))
    with self._lock:
      self._refresh([tag for tag in wanted if tag not in self._series])
      found = {tag: self._series.get(tag, _NONE).and_then(self._late.get(tag)) for tag in wanted}
      return {tag: rows for tag, rows in found.items() if len(rows.step)}

  def tags(self) -> list[str]:
    """Every tag logged so far, in order of name."""
    with self._lock:
      self._refresh([])
      return sorted(self._tags | self._late.keys())

  def experts(self, layer: int, name: str, columns: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A value of each expert of a MoE layer, (steps [n] int64, values [n, E] float64), of at most
    `columns` logged steps, evenly apart and with the last; None where it was not logged.

    name: one of `expert_names`.
    """
    return self._asked(lambda db: _experts(db, layer, name, columns))

  def expert_names(self) -> list[str]:
    """What was logged of each expert: COUNT its tokens, "bias", and what was sampled."""
    return self._asked(_expert_names) or []

  def of_ranks(self, parts: int) -> RankValues | None:
    """What all ranks told rank 0, whose file this is; None where it logged nothing of that."""
    return self._asked(lambda db: _of_ranks(db, parts))

  def _opened(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    """One that was locked when it was last tried is waited for no more."""
    return self._opener.opened(self.path, 0.0 if self.locked else OPEN_TIMEOUT_S)

  def _asked(self, ask: Callable[[duckdb.DuckDBPyConnection], T]) -> T | None:
    """An answer of the file; None where there is none, or it cannot be read."""
    with self._lock:
      try:
        if not self.path.is_file():
          return None
        with self._opened() as db:
          return ask(db)
      except duckdb.Error as error:
        self._fail(error)
        return None

  def _refresh(self, new: Sequence[str]) -> None:
    """Read what was appended since, and every row of the `new` tags."""
    if not self._begun:
      self._remember()
      new = [
        tag for tag in {**dict.fromkeys(new), **dict.fromkeys(OVERVIEW)} if tag not in self._series
      ]
      self._begun = True
    stamp = _stamp(self.path, self._beside)
    if stamp is None:
      if self._stamp is not None or self.locked:
        self._forget()
        self.trouble = f"{self.path.name} is gone"
      self._stamp, self.locked = None, False
    elif stamp != self._stamp or (new and not self.trouble):
      self._read(stamp, new)

  def _read(self, stamp: Stamp, new: Sequence[str]) -> None:
    try:
      early = rows_beside(self.path)  # before the file: a flush unlinks them last
      with self._opened() as db:
        self._take(db, new)
      self._stamp, self.trouble, self.locked = stamp, "", False
    except RecordError as error:
      early, self._stamp, self.trouble, self.locked = [], stamp, str(error), False
    except duckdb.Error as error:
      self._stamp = stamp
      self._fail(error)
    else:
      if new:
        self._keep()
    self._late = _later(early, self._series)

  def _fail(self, error: duckdb.Error) -> None:
    """A locked file is tried again, a corrupt one when it changes."""
    self.locked = is_locked(error)
    if self.locked:
      self._stamp = None
      known = "; what was read before is shown" if self._tags else "; it is tried again"
      self.trouble = f"{self.path.name} is locked by another process{known}"
    else:
      self.trouble = _explained(self.path, error)

  def _take(self, db: duckdb.DuckDBPyConnection, new: Sequence[str]) -> None:
    """All of it or, where a query fails, nothing."""
    last, series = self._last, dict(self._series)
    if last >= 0 and _row(db, last) != self._witness:  # rewound: rows were deleted
      last, new, series = -1, [*series, *new], {}
    appended = _rows(db, list(series), last)
    series |= {tag: series[tag].and_then(rows) for tag, rows in appended.items()}
    series |= dict.fromkeys(new, _NONE) | _rows(db, new, -1)
    sql = "SELECT DISTINCT tag FROM metrics WHERE rowid > ?"
    tags = {tag for (tag,) in db.execute(sql, [last]).fetchall()}
    self._tags = tags | (self._tags if last >= 0 else set())
    (end,) = db.execute("SELECT max(rowid) FROM metrics").fetchone()
    self._last = -1 if end is None else end
    self._witness, self._series = _row(db, self._last), series

  def _forget(self) -> None:
    self._last, self._witness = -1, None
    self._series: dict[str, Logged] = {}
    self._late: dict[str, Logged] = {}
    self._tags: set[str] = set()

  def _keep(self) -> None:
    """Write what is known to the kept file, whole or not at all."""
    beside = self._kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    lengths = {tag: len(rows.step) for tag, rows in self._series.items()}
    about = {"last": self._last, "witness": self._witness, "tags": sorted(self._tags)}
    about |= {"stamp": self._stamp, "lengths": lengths}
    columns = zip(*map(_columns, self._series.values()), strict=True)
    try:
      self._kept.parent.mkdir(parents=True, exist_ok=True)
      with beside.open("wb") as file:
        np.savez(file, np.array(json.dumps(about)), *(np.concatenate(c) for c in columns))
      beside.replace(self._kept)
    except OSError:  # no space, or not ours: the next process reads the run again
      beside.unlink(missing_ok=True)

  def _remember(self) -> None:
    """Take the kept file. Of a file that has the same stamp it is all; of another its last row is
    looked for in the run's file before it is believed.
    """
    try:
      with np.load(self._kept) as kept:
        about, *columns = (kept[name] for name in kept.files)
      about = json.loads(str(about))
    except (OSError, ValueError, EOFError, BadZipFile):
      return
    now, then = _stamp(self.path, self._beside), about["stamp"]
    if now is None or then is None or then[0] != now[0] or len(columns) != 4:
      return
    ends = np.cumsum(list(about["lengths"].values()))[:-1]
    parts = zip(*(np.split(column, ends) for column in columns), strict=True)
    self._series = {t: Logged(*part) for t, part in zip(about["lengths"], parts, strict=True)}
    self._last, self._tags = about["last"], set(about["tags"])
    self._witness = about["witness"] and tuple(about["witness"])
    if tuple(then) == now and not self._beside.exists():
      self._stamp = now


class Live:
  """One root, for as long as a process shows it. Threads may share it.

  cache: a folder outside the root, made when first needed.
  """

  def __init__(self, root: Path, cache: Path):
    self.root = resolved(root)
    self.paths = Root(self.root)
    self.cache = cache / hashlib.sha256(str(self.root).encode()).hexdigest()[:16]
    self._files: dict[str, LiveFile] = {}
    self._opener = Opener()
    self._lock = threading.Lock()
    self._seen: tuple[tuple[Stamp | None, ...], float] = ((), 0.0)
    self._snapshot = Snapshot((), (), ())

  def snapshot(self) -> Snapshot:
    """The records now. Where they cannot be read: as they last were, and why in `notice`."""
    db = self.paths.experiments_db
    stamps = (_stamp(db), _stamp(Path(f"{db}-journal")))
    with self._lock:
      known, when = self._seen
      records = (*self._snapshot.runs, *self._snapshot.experiments)
      running = any(one.status in LIVE for one in records)
      late = time.monotonic() - when > LIVENESS_S and (running or self._snapshot.notice)
      if stamps != known or late:
        self._snapshot = self._read()
        self._seen = (stamps, time.monotonic())
      return self._snapshot

  def _read(self) -> Snapshot:
    try:
      reader = LiveReader(self.root, self.cache / "records", OPEN_TIMEOUT_S)
      try:
        links, runs = tuple(reader.every_link()), tuple(reader.every_run())
        history, evaluations = reader.every_history(), reader.every_evaluation()
        every = tuple(reader.list())
        return Snapshot(every, runs, links, reader.notice, history, evaluations)
      finally:
        reader.close()
    except RecordError as error:
      return replace(self._snapshot, notice=str(error))

  def file(self, run_id: str) -> LiveFile:
    """The metrics of a run's first rank, which has those of the others too (nmoe.train.stragglers);
    of a run that the records know, whether or not its file is there.
    """
    with self._lock:
      if run_id not in self._files:
        kept = self.cache / "metrics" / f"{run_id}.npz"
        self._files[run_id] = LiveFile(self.paths.metrics(run_id, 0), kept, self._opener)
      return self._files[run_id]

  def trouble(self, run: Run) -> str:
    """Why no curve of a run can be shown, or not all of it; "" where all that it logged is read."""
    file = self.file(run.id)
    if file.tags() or file.trouble:
      return file.trouble
    name = file.path.name
    if run.live:
      return "no line is logged yet"
    if file.path.exists():
      return f"{name} holds no line"
    if run.results:  # which it logged
      return f"{name} is missing: it was deleted or moved; results and record stand without it"
    return f"{name} is missing: the run ended before its first log line, or it was deleted"

  def locked(self) -> list[str]:
    """The runs whose files were found locked; that a lock has ended no stat tells."""
    with self._lock:
      return [run_id for run_id, file in self._files.items() if file.locked]

  def ranks(self, run_id: str) -> list[int]:
    """The ranks that have logged."""
    names = (p.stem.removeprefix("rank_") for p in self._folder(run_id).glob("rank_*.duckdb"))
    return sorted(int(name) for name in names if name.isdigit())

  def stamps(self, run_ids: Iterable[str]) -> dict[str, int]:
    """A number for each run that grows whenever its first rank's file changes; 0 without a file."""
    found = {run_id: _stamp(self.paths.metrics(run_id, 0)) for run_id in run_ids}
    return {run_id: stamp[2] if stamp else 0 for run_id, stamp in found.items()}

  def eval_items(self, run_id: str) -> dict[tuple[str, int], Path]:
    """(suite, step) -> the file of what a run answered to every item."""
    folder = self.paths.eval_items(run_id, 0, "").parent
    found = {}
    for path in sorted(folder.glob("step_*_*.parquet")):
      step, _, suite = path.stem.removeprefix("step_").partition("_")
      if step.isdigit():
        found[suite, int(step)] = path
    return found

  def log_tail(self, run_id: str, lines: int = 200) -> str:
    """The end of the newest log of a run."""
    folder = self.paths.logs(run_id)
    logs = [p for p in folder.glob("*") if p.is_file() and not p.is_symlink()]
    if not logs:
      return ""
    with max(logs, key=lambda p: p.stat().st_mtime_ns).open("rb") as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - 200 * lines))
      return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

  def _folder(self, run_id: str) -> Path:
    return self.paths.metrics(run_id, 0).parent


def _columns(rows: Logged) -> tuple[np.ndarray, ...]:
  return rows.step, rows.tokens, rows.value, rows.time


def _stamp(path: Path, *besides: Path) -> Stamp | None:
  """Inode, size and time of a file, and size and time of DuckDB's log and of `besides`, where they
  are; None: no such file.
  """
  try:
    at = path.stat()
  except OSError:
    return None
  stamp = (at.st_ino, at.st_size, at.st_mtime_ns)
  for beside in (Path(f"{path}.wal"), *besides):
    with suppress(OSError):
      at = beside.stat()
      stamp += (at.st_size, at.st_mtime_ns)
  return stamp


def _attach(db: duckdb.DuckDBPyConnection, path: Path, name: str, timeout_s: float) -> None:
  deadline = time.monotonic() + timeout_s
  place = str(path).replace("'", "''")
  while True:
    try:
      db.execute(f"ATTACH '{place}' AS {name} (READ_ONLY)")
      return
    except duckdb.Error as error:
      if not is_locked(error) or time.monotonic() > deadline:
        raise
    time.sleep(0.02)


def _row(db: duckdb.DuckDBPyConnection, rowid: int) -> tuple[int, str, float] | None:
  """What tells a row from any that a resumed run writes in its place: the time is another."""
  return db.execute("SELECT step, tag, time FROM metrics WHERE rowid = ?", [rowid]).fetchone()


def _rows(db: duckdb.DuckDBPyConnection, tags: Sequence[str], after: int) -> dict[str, Logged]:
  """The rows of tags with a rowid above `after`. Tags come as numbers: strings would be objects."""
  if not tags:
    return {}
  found = db.execute(
    "SELECT list_position($tags, tag) AS place, step, tokens, value, time FROM metrics "
    "WHERE rowid > $after AND list_contains($tags, tag)",
    {"tags": list(tags), "after": after},
  ).fetchnumpy()
  place, *columns = (
    np.ma.getdata(found[name]) for name in ("place", "step", "tokens", "value", "time")
  )
  order = np.argsort(place, kind="stable")
  columns = [column[order] for column in columns]
  ends = np.searchsorted(place[order], np.arange(1, len(tags) + 2))
  return {
    tag: Logged(*(column[i:j] for column in columns))
    for tag, i, j in zip(tags, ends[:-1], ends[1:], strict=True)
    if i < j
  }


def _later(rows: Sequence[Row], series: dict[str, Logged]) -> dict[str, Logged]:
  """Rows kept beside the file, by tag, without those that are in the file too: a flush that was
  killed leaves both.
  """
  by_tag: dict[str, list[Row]] = {}
  for row in rows:
    by_tag.setdefault(row[2], []).append(row)
  late = {}
  for tag, of in by_tag.items():
    known = series.get(tag, _NONE)
    step, tokens, _, value, when = zip(*of, strict=True)
    columns = (np.array(step, np.int64), np.array(tokens, np.int64), np.array(value, float))
    rows_of = Logged(*columns, np.array(when, float))
    new = ~(np.isin(rows_of.time, known.time) & np.isin(rows_of.step, known.step))
    late[tag] = Logged(*(column[new] for column in _columns(rows_of)))
  return late


def _has_table(db: duckdb.DuckDBPyConnection, name: str) -> bool:
  sql = "SELECT 1 FROM duckdb_tables() WHERE table_name = ? AND database_name = current_database()"
  return db.execute(sql, [name]).fetchone() is not None


def _expert_names(db: duckdb.DuckDBPyConnection) -> list[str]:
  rows = (
    db.execute("SELECT DISTINCT name FROM experts ORDER BY name").fetchall()
    if _has_table(db, "experts")
    else []
  )
  counted = _has_table(db, "loads") and db.execute("SELECT 1 FROM loads LIMIT 1").fetchone()
  return [COUNT] * bool(counted) + [name for (name,) in rows]


def _experts(
  db: duckdb.DuckDBPyConnection, layer: int, name: str, columns: int
) -> tuple[np.ndarray, np.ndarray] | None:
  table = "loads" if name == COUNT else "experts"
  if not _has_table(db, table):
    return None
  of = "count" if name == COUNT else "value"
  where = "layer = $layer" + ("" if name == COUNT else " AND name = $name")
  rows = db.execute(
    f"WITH numbered AS (SELECT step, {of}, row_number() OVER (ORDER BY step DESC) - 1 AS back, "
    f"count(*) OVER () AS n FROM {table} WHERE {where}) SELECT step, {of} FROM numbered "
    "WHERE back % greatest(1, (n + $columns - 1) // $columns) = 0 ORDER BY step",
    {"layer": layer, "columns": columns} | ({} if name == COUNT else {"name": name}),
  ).fetchall()
  if not rows:
    return None
  steps, values = zip(*rows, strict=True)
  return np.array(steps, np.int64), np.array(values, float)


_OF_RANKS = """
  WITH told AS (SELECT * FROM metrics WHERE starts_with(tag, 'rank/')),
  logs AS (SELECT step, max(tokens) AS tokens, max(time) AS time,
    row_number() OVER (ORDER BY step) - 1 AS n, count(*) OVER () AS total FROM told GROUP BY step),
  parts AS (SELECT *, (n * least(total, $parts)) // total AS part FROM logs)
  SELECT part, split_part(tag, '/', 2)::INTEGER AS rank, split_part(tag, '/', 3) AS name,
    avg(value) AS value, max(p.step) AS step, max(p.tokens) AS tokens, max(p.time) AS time
  FROM told JOIN parts p USING (step) GROUP BY ALL ORDER BY name, rank, part"""


def _of_ranks(db: duckdb.DuckDBPyConnection, parts: int) -> RankValues | None:
  found = db.execute(_OF_RANKS, {"parts": parts}).fetchnumpy()
  part, rank, value = (np.ma.getdata(found[name]) for name in ("part", "rank", "value"))
  if not len(part):
    return None
  names, place = np.unique(np.ma.getdata(found["name"]).astype(str), return_inverse=True)
  values = np.full((len(names), rank.max() + 1, part.max() + 1), np.nan)
  values[place, rank, part] = value
  _, first = np.unique(part, return_index=True)
  columns = (np.ma.getdata(found[name])[first] for name in ("step", "tokens", "time"))
  return RankValues(*columns, dict(zip(names.tolist(), values, strict=True)))


def _explained(path: Path, error: duckdb.Error) -> str:
  text = str(error).splitlines()[0].rstrip("!")
  empty = path.is_file() and not path.stat().st_size
  why = "is empty (0 bytes)" if empty else f"cannot be read ({text[:160]})"
  return f"{path.name} {why}; the run's record and checkpoints are apart"
