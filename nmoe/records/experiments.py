"""The experiment database: what was asked, what was run, what came out.

A claim is a chain: hypothesis -> experiment -> runs -> conclusion, and links between experiments.
`{root}/experiments.db` is SQLite with a rollback journal, not WAL: WAL keeps its index in shared
memory, which the hosts of a shared filesystem do not have in common.

A run has one owner at a time. The owner holds an exclusive lock (flock) on `{root}/locks/{run_id}`,
which the kernel drops when the process dies, in a container or on another host too; host and pid
stand in the record for people to read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from nmoe.errors import RecordError
from nmoe.records.root import Root

SCHEMA_VERSION = 1
STATUSES = ("planned", "running", "completed", "failed", "interrupted")
RELATIONS = ("supports", "refutes", "refines", "repeats")

_SCHEMA = (
  """CREATE TABLE experiments (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, stage TEXT NOT NULL, statement TEXT NOT NULL,
    metric TEXT NOT NULL, direction TEXT NOT NULL, min_effect REAL NOT NULL,
    status TEXT NOT NULL, verdict TEXT NOT NULL, conclusion TEXT NOT NULL,
    created TEXT NOT NULL, updated TEXT NOT NULL)""",
  """CREATE TABLE runs (
    id TEXT PRIMARY KEY, seed INTEGER NOT NULL, toml TEXT NOT NULL, fingerprint TEXT NOT NULL,
    data_digest TEXT NOT NULL, "commit" TEXT NOT NULL, diff TEXT NOT NULL,
    code_version TEXT NOT NULL, environment TEXT NOT NULL, target TEXT NOT NULL,
    status TEXT NOT NULL, results TEXT NOT NULL, error TEXT NOT NULL,
    host TEXT NOT NULL, pid INTEGER NOT NULL, created TEXT NOT NULL, updated TEXT NOT NULL)""",
  """CREATE TABLE members (
    experiment_id TEXT NOT NULL REFERENCES experiments(id),
    run_id TEXT NOT NULL REFERENCES runs(id),
    arm TEXT NOT NULL, PRIMARY KEY (experiment_id, run_id, arm))""",
  """CREATE TABLE links (
    from_id TEXT NOT NULL REFERENCES experiments(id),
    to_id TEXT NOT NULL REFERENCES experiments(id),
    relation TEXT NOT NULL, note TEXT NOT NULL, created TEXT NOT NULL)""",
  "CREATE INDEX same_run ON runs (fingerprint, data_digest, seed, code_version)",
)
_RUN_SQL = """
  SELECT r.id, m.experiment_id, m.arm, r.seed, r.toml, r.fingerprint, r.data_digest, r."commit",
    r.diff, r.code_version, r.environment, r.target, r.status, r.results, r.error, r.host, r.pid,
    r.created, r.updated
  FROM runs r JOIN members m ON m.run_id = r.id """


@dataclass(frozen=True)
class Hypothesis:
  """A claim that an experiment tests.

  statement   the claim, in a sentence
  metric      a tag of nmoe.records.measures.MEASURES
  direction   "lower" or "higher": what is claimed of the variant; "none": that it doesn't matter
  min_effect  the smallest difference that matters, in the metric's unit
  """

  statement: str
  metric: str
  direction: str
  min_effect: float


@dataclass(frozen=True)
class Experiment:
  """A hypothesis and its outcome. Times: UTC, ISO 8601. `verdict` is "" until concluded."""

  id: str
  name: str
  stage: str
  statement: str
  metric: str
  direction: str
  min_effect: float
  status: str
  verdict: str
  conclusion: dict[str, Any]
  created: str
  updated: str


@dataclass(frozen=True)
class Run:
  """One training run as a member of one experiment (`experiment_id`, `arm`).

  `host` and `pid` are its last owner; "" in `commit` means that it ran outside a git checkout.
  """

  id: str
  experiment_id: str
  arm: str
  seed: int
  toml: str
  fingerprint: str
  data_digest: str
  commit: str
  diff: str
  code_version: str
  environment: dict[str, Any]
  target: str
  status: str
  results: dict[str, Any]
  error: str
  host: str
  pid: int
  created: str
  updated: str

  @property
  def finished(self) -> bool:
    """Whether it has an outcome: it completed or diverged."""
    return self.status == "completed" or "diverged" in self.results


@dataclass(frozen=True)
class Link:
  """Evidence: experiment `from_id` supports, refutes, refines or repeats experiment `to_id`."""

  from_id: str
  to_id: str
  relation: str
  note: str
  created: str


class Reader:
  """The records of one root, opened read-only: it creates, changes and locks nothing.

  A run whose owner died reads as "interrupted", whatever its row says. Raises RecordError if the
  root has no database, or one that cannot be read: locked, corrupt or of another schema.
  """

  def __init__(self, root: str | Path, timeout_s: float = 10.0):
    self.root = Path(root)
    self.path = Root(self.root).experiments_db
    self._timeout_s = timeout_s
    self._open()

  def _open(self) -> None:
    if not self.path.is_file():
      raise RecordError(
        f"{self.root} holds no records (no experiments.db); name the root of your runs by --root "
        "or NMOE_ROOT, or make one with `nmoe ablate`"
      )
    with self._explained():
      self._connect(f"{self.path.resolve().as_uri()}?mode=ro")
    self._check_version()

  def _connect(self, uri: str) -> None:
    self._db = sqlite3.connect(uri, timeout=self._timeout_s, isolation_level=None, uri=True)
    self._db.row_factory = sqlite3.Row

  def _check_version(self) -> None:
    with self._explained():
      version = self._version()
    if version != SCHEMA_VERSION:
      raise RecordError(
        f"{self.path} has schema {version}, this nmoe reads and writes schema "
        f"{SCHEMA_VERSION}; use the nmoe that wrote it, or another run.root"
      )

  def close(self) -> None:
    """Close the database."""
    self._db.close()

  def find(self, name_or_id: str) -> Experiment:
    """The experiment of this id, else the newest of this name. RecordError if there is none."""
    rows = self._read(
      "SELECT * FROM experiments WHERE id = ?1 OR name = ?1 "
      "ORDER BY id = ?1 DESC, rowid DESC LIMIT 1",
      name_or_id,
    )
    if not rows:
      known = ", ".join(e.id for e in self.list()[:8]) or "none yet"
      raise RecordError(f"{self.path}: no experiment {name_or_id!r}; the newest are: {known}")
    return _experiment(rows[0])

  def list(self) -> list[Experiment]:
    """Every experiment, newest first."""
    return [_experiment(row) for row in self._read("SELECT * FROM experiments ORDER BY rowid DESC")]

  def links(self, experiment_id: str) -> list[Link]:
    """The links from and to an experiment, oldest first."""
    sql = "SELECT * FROM links WHERE ?1 IN (from_id, to_id) ORDER BY rowid"
    return [Link(**row) for row in self._read(sql, experiment_id)]

  def runs(self, experiment_id: str) -> list[Run]:
    """The members of an experiment, in the order in which they joined it."""
    rows = self._read(_RUN_SQL + "WHERE m.experiment_id = ? ORDER BY m.rowid", experiment_id)
    return [self._seen(_run(row)) for row in rows]

  def run(self, run_id: str) -> Run:
    """A run, as a member of the experiment it was started for. RecordError if there is none."""
    rows = self._read(_RUN_SQL + "WHERE r.id = ? ORDER BY m.rowid LIMIT 1", run_id)
    if not rows:
      raise RecordError(f"{self.path}: no run {run_id!r}; see `nmoe experiments list`")
    return self._seen(_run(rows[0]))

  def _seen(self, run: Run) -> Run:
    """The run with the status that its lock tells: "running" needs an owner that holds it."""
    if run.status == "running" and not _held(Root(self.root).lock(run.id)):
      return replace(run, status="interrupted")
    return run

  def _version(self) -> int:
    return self._db.execute("PRAGMA user_version").fetchone()[0]

  def _read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
    with self._explained():
      return self._db.execute(sql, values).fetchall()

  @contextmanager
  def _explained(self) -> Iterator[None]:
    """SQLite's errors as RecordError with the remedy."""
    try:
      yield
    except sqlite3.Error as error:
      raise RecordError(f"{self.path}: {error}; {self._remedy(str(error))}") from error

  def _remedy(self, message: str) -> str:
    if "locked" in message or "locking" in message:
      return (
        f"another process held it for {self._timeout_s:g} s, or its filesystem has no file locks: "
        "stop that process, or put run.root on a filesystem with locks"
      )
    if "not a database" in message or "malformed" in message:
      return (
        "the file is corrupt: restore a copy or move it away; metrics and checkpoints are apart"
      )
    if "readonly" in message or "unable to open" in message:
      return "it cannot be written here: make the folder writable, or set run.root (NMOE_ROOT)"
    if "full" in message:
      return "the disk is full: free space and run again; nothing of this write was kept"
    return "check the folder's permissions and free space"


class Experiments(Reader):
  """The database of one root. It holds the locks of the runs it owns: keep it open while they run.

  Opening it marks the runs whose owner died. Raises RecordError when it cannot be opened: not
  writable, locked, corrupt or of another schema.
  """

  def __init__(self, root: str | Path, timeout_s: float = 10.0):
    self._locks: dict[str, IO[str]] = {}
    super().__init__(root, timeout_s)

  def _open(self) -> None:
    try:
      self.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise RecordError(
        f"{self.root}: cannot be created ({error.strerror}); "
        "set run.root (NMOE_ROOT) to a writable folder"
      ) from error
    with self._explained():
      self._connect(self.path.resolve().as_uri())
      self._db.execute("PRAGMA foreign_keys = ON")
      self._prepare()

  def close(self) -> None:
    """Close the database and drop the locks; runs still "running" then count as interrupted."""
    for lock in self._locks.values():
      lock.close()
    self._locks.clear()
    super().close()

  def create(
    self, name: str, stage: str, statement: str, metric: str, direction: str, min_effect: float
  ) -> Experiment:
    """Write the hypothesis down; status "planned". Ids count the name: "muon-1", "muon-2", …"""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "experiment"
    now = _now()
    with self._writing() as db:
      taken = {row["id"] for row in db.execute("SELECT id FROM experiments")}
      number = next(n for n in range(1, len(taken) + 2) if f"{slug}-{n}" not in taken)
      row = (f"{slug}-{number}", name, stage, statement, metric, direction, min_effect)
      db.execute(
        "INSERT INTO experiments VALUES (?,?,?,?,?,?,?,'planned','','{}',?,?)", (*row, now, now)
      )
    return self.find(f"{slug}-{number}")

  def set_status(
    self, experiment_id: str, status: Literal["running", "interrupted", "failed"]
  ) -> None:
    """Change an experiment's status."""
    assert status in STATUSES
    self._update("experiments", experiment_id, {"status": status})

  def conclude(self, experiment_id: str, verdict: str, conclusion: dict[str, Any]) -> None:
    """Store the verdict and the numbers behind it; the experiment is completed."""
    values = {"verdict": verdict, "conclusion": json.dumps(conclusion), "status": "completed"}
    self._update("experiments", experiment_id, values)

  def link(self, from_id: str, to_id: str, relation: str, note: str = "") -> None:
    """Record that experiment `from_id` bears on `to_id`; relation is one of RELATIONS."""
    if relation not in RELATIONS:
      raise RecordError(f"relation {relation!r} must be one of {', '.join(RELATIONS)}")
    row = (self.find(from_id).id, self.find(to_id).id, relation, note, _now())
    with self._writing() as db:
      db.execute("INSERT INTO links VALUES (?,?,?,?,?)", row)

  def start_run(
    self,
    experiment_id: str,
    arm: str,
    seed: int,
    *,
    toml: str,
    fingerprint: str,
    data_digest: str,
    commit: str,
    diff: str,
    code_version: str,
    environment: dict[str, Any],
    target: str,
  ) -> Run:
    """Record a new run, owned by this process, status "running".

    Its id sorts by time (UTC): 20261123-142233-ab12.
    """
    now = _now()
    record = (seed, toml, fingerprint, data_digest, commit, diff, code_version)
    owner = (json.dumps(environment), target, socket.gethostname(), os.getpid(), now, now)
    with self._writing() as db:
      run_id = self._unused_run_id()
      lock = self._try_lock(run_id)
      db.execute(
        "INSERT INTO runs VALUES (?,?,?,?,?,?,?,?,?,?,'running','{}','',?,?,?,?)",
        (run_id, *record, *owner),
      )
      db.execute("INSERT INTO members VALUES (?,?,?)", (experiment_id, run_id, arm))
    self._locks[run_id] = lock
    return self.run(run_id)

  def attach(self, experiment_id: str, run_id: str, arm: str) -> None:
    """Count an existing run as a member of another experiment too; twice is the same as once."""
    with self._writing() as db:
      db.execute("INSERT OR IGNORE INTO members VALUES (?,?,?)", (experiment_id, run_id, arm))

  def find_finished(
    self, fingerprint: str, data_digest: str, seed: int, code_version: str
  ) -> Run | None:
    """The newest finished run of the same computation, or None."""
    same = self._same(fingerprint, data_digest, seed, code_version)
    return next((run for run in same if run.finished), None)

  def find_unfinished(
    self, fingerprint: str, data_digest: str, seed: int, code_version: str
  ) -> Run | None:
    """The newest run of the same computation that can go on: interrupted, running or failed."""
    same = self._same(fingerprint, data_digest, seed, code_version)
    return next((run for run in same if not run.finished), None)

  def claim(self, run_id: str) -> Run:
    """Become the owner of a run to resume it: status "running", the error cleared. Atomic.

    Raises RecordError naming the owner's host and pid if it is alive, or if the run is completed.
    """
    if run_id not in self._locks:
      self._locks[run_id] = self._lock(run_id)
    if self.run(run_id).status == "completed":
      self._locks.pop(run_id).close()
      raise RecordError(f"run {run_id} is completed and cannot be resumed; `nmoe rerun` repeats it")
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    self._update("runs", run_id, {"status": "running", "error": "", **owner})
    return self.run(run_id)

  def release(self, run_id: str) -> None:
    """Give up a run of this process, if it is one, so that a child can claim it: "interrupted"."""
    if run_id in self._locks:
      self.update_run(run_id, status="interrupted")

  def update_run(
    self,
    run_id: str,
    *,
    toml: str | None = None,
    status: Literal["running", "completed", "failed", "interrupted"] | None = None,
    results: dict[str, Any] | None = None,
    error: str | None = None,
  ) -> None:
    """Store what is given; `results` replaces. A status other than "running" gives up the run."""
    assert status is None or status in STATUSES
    values = {
      "toml": toml,
      "status": status,
      "results": None if results is None else json.dumps(results),
      "error": error,
    }
    self._update("runs", run_id, {k: v for k, v in values.items() if v is not None})
    if status not in (None, "running") and run_id in self._locks:
      self._locks.pop(run_id).close()

  def mark_interrupted(self) -> list[str]:
    """Mark every "running" run whose owner is dead as "interrupted"; returns their ids."""
    marked = []
    for row in self._read("SELECT id FROM runs WHERE status = 'running'"):
      if row["id"] in self._locks:
        continue
      lock = self._try_lock(row["id"])
      if lock is None:
        continue
      with lock:
        if self.run(row["id"]).status == "running":
          self._update("runs", row["id"], {"status": "interrupted"})
          marked.append(row["id"])
    return marked

  def _prepare(self) -> None:
    """Create the tables in a new database, refuse one of another schema, mark dead runs."""
    if self._version() == 0:
      with self._writing() as db:
        if self._version() == 0:
          for statement in _SCHEMA:
            db.execute(statement)
          db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    self._check_version()
    if os.access(self.path, os.W_OK):
      self.mark_interrupted()

  def _seen(self, run: Run) -> Run:
    """As its row says: `mark_interrupted` has corrected it."""
    return run

  def _unused_run_id(self) -> str:
    """Four random digits tell runs of one second apart, but not always."""
    while True:
      run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)
      if not self._db.execute("SELECT 1 FROM runs WHERE id = ?", (run_id,)).fetchone():
        return run_id

  def _same(self, *key: str | int) -> list[Run]:
    """The runs of one computation, newest first."""
    rows = self._read(
      _RUN_SQL
      + "WHERE r.fingerprint = ? AND r.data_digest = ? AND r.seed = ? AND r.code_version = ? "
      "ORDER BY r.rowid DESC, m.rowid",
      *key,
    )
    return [_run(row) for row in rows]

  def _update(self, table: str, row_id: str, values: dict[str, Any]) -> None:
    values = {**values, "updated": _now()}
    columns = ", ".join(f"{name} = ?" for name in values)
    with self._writing() as db:
      done = db.execute(f"UPDATE {table} SET {columns} WHERE id = ?", (*values.values(), row_id))
      if done.rowcount != 1:
        raise RecordError(f"{self.path}: no {table[:-1]} {row_id!r} to update")

  @contextmanager
  def _writing(self) -> Iterator[sqlite3.Connection]:
    """One transaction: all of it or nothing."""
    with self._explained():
      self._db.execute("BEGIN IMMEDIATE")
      try:
        yield self._db
      except BaseException:
        self._db.execute("ROLLBACK")
        raise
      self._db.execute("COMMIT")

  def _lock(self, run_id: str) -> IO[str]:
    """The run's lock, or RecordError naming its owner. Waits out another's mark_interrupted."""
    for _ in range(20):
      lock = self._try_lock(run_id)
      if lock is not None:
        return lock
      time.sleep(0.05)
    run = self.run(run_id)
    raise RecordError(
      f"run {run_id} belongs to process {run.pid} on host {run.host}, which is alive; "
      "wait for it, or stop it there"
    )

  def _try_lock(self, run_id: str) -> IO[str] | None:
    """The open, locked file, or None while another holds it."""
    path = Root(self.root).lock(run_id)
    try:
      path.parent.mkdir(exist_ok=True)
      lock = path.open("a")
    except OSError as error:
      raise RecordError(
        f"{path}: cannot be opened ({error.strerror}); give this user write access to it"
      ) from error
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      lock.close()
      if error.errno in (errno.EAGAIN, errno.EACCES):
        return None
      raise RecordError(
        f"{path}: cannot be locked ({error.strerror}); put run.root on a filesystem with file locks"
      ) from error
    return lock


def _held(path: Path) -> bool:
  """Whether a process holds this lock file; one that is not there is not held."""
  try:
    with path.open() as lock:
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except OSError:
    return True  # held, or not ours to ask
  return False


def provenance(repo: str | Path) -> tuple[str, str, str]:
  """(commit, diff, code_version) of a checkout; commit and diff are "" where git knows no commit.

  The diff holds the changes of tracked files and, whole, the untracked .py and .toml files.
  code_version needs no git: 12 hex digits over names and bytes of the .py files of nmoe/ and
  kernels/, which decide what a run computes.
  """
  repo = Path(repo)
  code = hashlib.sha256()
  for path in sorted(p for package in ("nmoe", "kernels") for p in (repo / package).rglob("*.py")):
    code.update(f"{path.relative_to(repo).as_posix()}\0{path.stat().st_size}\0".encode())
    code.update(path.read_bytes())
  commit = _git(repo, "rev-parse", "HEAD").strip()
  diff = _git(repo, "diff", "HEAD", "--no-color", "--no-ext-diff", "--relative") if commit else ""
  listed = ("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "*.toml")
  for name in filter(None, _git(repo, *listed).split("\0") if commit else ()):
    diff += _git(repo, "diff", "--no-color", "--no-ext-diff", "--no-index", "--", "/dev/null", name)
  return commit, diff, code.hexdigest()[:12]


def _git(repo: Path, *arguments: str) -> str:
  """git's output; "" where git is missing or fails (1 is `diff --no-index`: files differ)."""
  try:
    done = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, timeout=60)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.decode(errors="replace") if done.returncode in (0, 1) else ""


def _now() -> str:
  return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _experiment(row: sqlite3.Row) -> Experiment:
  return Experiment(**{**dict(row), "conclusion": json.loads(row["conclusion"])})


def _run(row: sqlite3.Row) -> Run:
  decoded = {key: json.loads(row[key]) for key in ("environment", "results")}
  return Run(**{**dict(row), **decoded})
