"""The experiment database: what was asked, what was run, what came out.

A claim is a chain: hypothesis -> experiment -> runs -> conclusion, and links between experiments.
`{root}/experiments.db` is SQLite with a rollback journal, not WAL: WAL keeps its index in shared
memory, which the hosts of a shared filesystem do not have in common.

A run has one owner at a time. The owner holds an exclusive lock (flock) on `{root}/locks/{run_id}`,
which the kernel drops when the process dies, in a container or on another host too. Host and pid
stand in the record for people to read, and for the case that somebody deleted the lock file.
Experiments, runs and locks are one thing here: a run is found, recorded and owned in one step.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from nmoe import files
from nmoe.errors import RecordError
from nmoe.records.migrations import migrate_file, transaction, version
from nmoe.records.owner import TIME_FORMAT, lives
from nmoe.records.reader import (
  RUN_SQL,
  ArmRecord,
  Branch,
  Evaluation,
  Experiment,
  Export,
  Hypothesis,
  Reader,
  Run,
  Start,
  decoded_run,
)
from nmoe.records.root import Root

STATUSES = ("planned", "running", "completed", "failed", "interrupted")
PATIENCE_S = 300.0  # what a run came to is not lost to somebody who reads the database
UNFIT = ("?", "\\")  # of a path, that DuckDB reads as something else
MAX_SLUG = 60  # characters of a name that an id keeps
RELATIONS = ("supports", "refutes", "refines", "repeats", "continues")


class Experiments(Reader):
  """The database of one root. It holds the locks of the runs it owns: keep it open while they run.

  Opening it marks the runs whose owner died. Raises RecordError when it cannot be opened: not
  writable, locked, corrupt or of another schema.
  """

  def __init__(self, root: str | Path, timeout_s: float = 10.0):
    self._locks: dict[str, IO[str]] = {}
    super().__init__(root, timeout_s)

  def _open(self) -> None:
    place = files.resolved(self.root)
    unfit = [c for c in UNFIT if c in str(place)]
    if unfit:
      raise RecordError(
        f"{place} holds {' and '.join(unfit)}, which the metrics' files do not take in a path; set "
        "run.root (NMOE_ROOT) to another folder"
      )
    try:
      self.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise RecordError(
        f"{self.root}: cannot be created ({error.strerror}); "
        "set run.root (NMOE_ROOT) to a writable folder"
      ) from error
    with self._explained():
      self._connect(self.path.resolve().as_uri())
      if version(self._db):
        self._check_version()
      else:
        self._check_absence()
      migrate_file(self._db, self.path)
      self._db.execute("PRAGMA foreign_keys = ON")
    if os.access(self.path, os.W_OK):
      self.mark_interrupted()

  def _check_absence(self) -> None:
    """Refuse to begin anew where runs were, whose records are gone, and in another's file."""
    if self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
      raise RecordError(
        f"{self.path} holds tables of another program; move it away, or choose another run.root"
      )
    locks = Root(self.root).locks
    if locks.is_dir() and any(locks.iterdir()):
      raise RecordError(
        f"{self.root} has had runs, but its experiments.db is empty or gone: restore a copy of it, "
        f"or remove {locks} to begin anew"
      )

  def wait_longer(self, timeout_s: float = PATIENCE_S) -> None:
    """From now on wait this long for others that hold the database: what is written now would be
    lost with the error.
    """
    self._timeout_s = timeout_s
    self._db.execute(f"PRAGMA busy_timeout = {round(1000 * timeout_s)}")

  def close(self) -> None:
    """Close the database and drop the locks; runs still "running" then count as interrupted."""
    for lock in self._locks.values():
      lock.close()
    self._locks.clear()
    super().close()

  def create(
    self,
    name: str,
    stage: str,
    hypotheses: Sequence[Hypothesis],
    arms: Sequence[ArmRecord] = (),
  ) -> Experiment:
    """Write the hypotheses down; status "planned". Ids count the name: "muon-1", "muon-2", …"""
    with self._writing() as db:
      experiment_id = self._insert(db, name, stage, hypotheses, arms)
    return self.find(experiment_id)

  def find_or_create(
    self,
    name: str,
    stage: str,
    hypotheses: Sequence[Hypothesis],
    arms: Sequence[ArmRecord],
    seeds: Sequence[int],
    grows: bool = False,
  ) -> Experiment:
    """The newest experiment that asks the same of the same computations, else a new one; of
    several processes that ask at once, one creates it.

    What was found has no arm and no seed beyond those given, unless it `grows`.
    """
    with self._writing() as db:
      rows = self._read(
        "SELECT * FROM experiments WHERE name = ? AND stage = ? ORDER BY rowid DESC", name, stage
      )
      for found in map(self._one, rows):
        if self._asks(found, hypotheses, arms, seeds, grows):
          known = {arm.name for arm in found.arms}
          self._insert_arms(db, found.id, [arm for arm in arms if arm.name not in known])
          experiment_id = found.id
          break
      else:
        experiment_id = self._insert(db, name, stage, hypotheses, arms)
        self._link_to_results(db, experiment_id, stage, {arm.computation for arm in arms})
    return self.find(experiment_id)

  def _link_to_results(
    self, db: sqlite3.Connection, experiment_id: str, stage: str, computations: set[str]
  ) -> None:
    """Link a new experiment to the newest of its stage that had runs of just the same arms."""
    places = ",".join("?" * len(computations))
    sql = f"""SELECT a.experiment_id AS id FROM arms a JOIN experiments e ON e.id = a.experiment_id
      WHERE e.stage = ? AND e.id != ? AND a.computation IN ({places})
        AND EXISTS (SELECT 1 FROM members m WHERE m.experiment_id = e.id)
      GROUP BY a.experiment_id HAVING count(DISTINCT a.computation) = ? ORDER BY e.rowid DESC"""
    for row in self._read(sql + " LIMIT 1", stage, experiment_id, *computations, len(computations)):
      note = "another hypothesis about the same arms, written when they had run"
      db.execute(
        "INSERT INTO links VALUES (?,?,?,?,?)", (experiment_id, row["id"], "refines", note, _now())
      )

  def _one(self, row: sqlite3.Row) -> Experiment:
    return self._experiments([row])[0]

  def _asks(
    self,
    found: Experiment,
    hypotheses: Sequence[Hypothesis],
    arms: Sequence[ArmRecord],
    seeds: Sequence[int],
    grows: bool,
  ) -> bool:
    wanted, known = (
      {arm.name: (dict(arm.point), arm.computation) for arm in of} for of in (arms, found.arms)
    )
    if found.hypotheses != tuple(hypotheses):
      return False
    if any(wanted[name] != known[name] for name in wanted.keys() & known.keys()):
      return False
    if grows:
      return bool(wanted.keys() & known.keys())
    sql = "SELECT DISTINCT r.seed FROM members m JOIN runs r ON r.id = m.run_id "
    ran = {row["seed"] for row in self._read(sql + "WHERE m.experiment_id = ?", found.id)}
    return known.keys() == wanted.keys() and ran <= set(seeds)

  def _insert(
    self,
    db: sqlite3.Connection,
    name: str,
    stage: str,
    hypotheses: Sequence[Hypothesis],
    arms: Sequence[ArmRecord],
  ) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:MAX_SLUG].strip("-") or "experiment"
    taken = self._read("SELECT id FROM experiments WHERE id GLOB ?", f"{slug}-[0-9]*")
    numbers = [row["id"].removeprefix(f"{slug}-") for row in taken]
    number = 1 + max((int(n) for n in numbers if n.isdecimal()), default=0)
    experiment_id, now = f"{slug}-{number}", _now()
    db.execute(
      "INSERT INTO experiments VALUES (?,?,?,'planned','','{}',?,?)",
      (experiment_id, name, stage, now, now),
    )
    for position, h in enumerate(hypotheses):
      row = (experiment_id, position, h.statement, h.metric, h.direction, h.min_effect)
      db.execute("INSERT INTO hypotheses VALUES (?,?,?,?,?,?)", row)
    self._insert_arms(db, experiment_id, arms)
    return experiment_id

  def _insert_arms(
    self, db: sqlite3.Connection, experiment_id: str, arms: Sequence[ArmRecord]
  ) -> None:
    now = _now()
    rows = [
      (experiment_id, arm.name, json.dumps(dict(arm.point)), arm.computation, now) for arm in arms
    ]
    db.executemany("INSERT OR IGNORE INTO arms VALUES (?,?,?,?,?)", rows)

  def add_arms(self, experiment_id: str, arms: Sequence[ArmRecord]) -> None:
    """Plan more arms, as a sweep does that extends its grid; those that are there stay."""
    with self._writing() as db:
      self._insert_arms(db, experiment_id, arms)

  def set_status(
    self, experiment_id: str, status: Literal["running", "interrupted", "failed"]
  ) -> None:
    """Change an experiment's status. While it is "running" this process holds a lock, by which
    readers know that it lives.
    """
    assert status in STATUSES
    self._hold(experiment_id, status == "running")
    self._update("experiments", experiment_id, {"status": status})

  def _hold(self, experiment_id: str, under_way: bool) -> None:
    """Take the experiment's lock, beside other processes that carry it out, or let go."""
    path = Root(self.root).experiment_lock(experiment_id)
    if (old := self._locks.pop(path.name, None)) is not None:
      old.close()
    if under_way:
      self._locks[path.name] = lock = _opened(path)
      with _lockable(path):
        files.lock(lock, shared=True, wait=True)

  def conclude(self, experiment_id: str, verdict: str, conclusion: dict[str, Any]) -> None:
    """Store the verdict and the numbers behind it; the experiment is completed.

    The record adds to the numbers how many "runs" it had, and as "earlier" the verdicts over fewer.
    """
    old = self.find(experiment_id)
    num_runs = len(self.runs(experiment_id))
    earlier = [*old.conclusion.get("earlier", ())]
    if old.verdict and old.conclusion.get("runs", num_runs) < num_runs:
      earlier.append({"verdict": old.verdict, "runs": old.conclusion["runs"]})
    added = {"runs": num_runs} | ({"earlier": earlier} if earlier else {})
    text = json.dumps({**conclusion, **added})
    values = {"verdict": verdict, "conclusion": text, "status": "completed"}
    self._hold(experiment_id, False)
    self._update("experiments", experiment_id, values)

  def link(self, from_id: str, to_id: str, relation: str, note: str = "") -> None:
    """Record that experiment `from_id` bears on `to_id`; relation is one of RELATIONS."""
    if relation not in RELATIONS:
      raise RecordError(f"relation {relation!r} must be one of {', '.join(RELATIONS)}")
    row = (self.find(from_id).id, self.find(to_id).id, relation, note, _now())
    with self._writing() as db:
      db.execute("INSERT INTO links VALUES (?,?,?,?,?)", row)

  def add_evaluation(self, run_id: str, e: Evaluation) -> None:
    """Record what a suite measured of a run's checkpoint."""
    row = (run_id, e.step, e.suite, e.items, e.arithmetic, json.dumps(e.results), e.seconds, _now())
    with self._writing() as db:
      db.execute("INSERT INTO evaluations VALUES (?,?,?,?,?,?,?,?)", row)

  def add_export(self, e: Export) -> None:
    """Record that a run's checkpoint was exported."""
    row = (e.run_id, e.step, e.path, e.digest, json.dumps(e.check), _now())
    with self._writing() as db:
      db.execute("INSERT INTO exports VALUES (?,?,?,?,?,?)", row)

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
    branch: Branch | None = None,
  ) -> Run:
    """Record a new run, owned by this process, status "running".

    Its id sorts by time (UTC): 20261123-142233-ab12.
    """
    record = (toml, fingerprint, data_digest, commit, diff, code_version, environment, target)
    with self._writing() as db:
      run_id = self._insert_run(db, experiment_id, arm, seed, record, branch)
    return self.run(run_id)

  def find_or_start(
    self,
    experiment_id: str,
    arm: str,
    seed: int,
    *,
    usable: Callable[[Run], bool] = lambda run: True,
    toml: str,
    fingerprint: str,
    data_digest: str,
    commit: str,
    diff: str,
    code_version: str,
    environment: dict[str, Any],
    target: str,
    branch: Branch | None = None,
  ) -> Run:
    """The newest finished run of the same computation that is usable, else the newest that can go
    on, else a new one as of `start_run`; a member of the experiment either way.

    Of several processes that ask at once, one starts a new run.
    """
    record = (toml, fingerprint, data_digest, commit, diff, code_version, environment, target)
    with self._writing() as db:
      same = [r for r in self._same(fingerprint, data_digest, seed, code_version) if usable(r)]
      finished = [run for run in same if run.finished]
      run_id = next((run.id for run in (*finished, *same)), None)
      if run_id is None:
        run_id = self._insert_run(db, experiment_id, arm, seed, record, branch)
      else:
        self._join(db, experiment_id, run_id, arm)
    return next(run for run in self.runs(experiment_id) if (run.id, run.arm) == (run_id, arm))

  def _insert_run(
    self,
    db: sqlite3.Connection,
    experiment_id: str,
    arm: str,
    seed: int,
    record: tuple,
    branch: Branch | None,
  ) -> str:
    """A new run, its lock, its membership, where it begins."""
    *written, environment, target = record
    now = _now()
    owner = (json.dumps(environment), target, socket.gethostname(), os.getpid(), now, now)
    run_id = self._unused_run_id()
    lock = self._try_lock(run_id)
    try:
      db.execute(
        "INSERT INTO runs VALUES (?,?,?,?,?,?,?,?,?,?,'running','{}','',?,?,?,?)",
        (run_id, seed, *written, *owner),
      )
      self._join(db, experiment_id, run_id, arm)
      if branch is not None:
        self._insert_branch(db, experiment_id, run_id, branch)
    except BaseException:
      lock.close()
      raise
    self._locks[run_id] = lock
    return run_id

  def _insert_branch(
    self, db: sqlite3.Connection, experiment_id: str, run_id: str, branch: Branch
  ) -> None:
    changed = json.dumps(dict(branch.changed))
    row = (run_id, branch.trunk, branch.step, branch.tokens, branch.sha256, changed)
    db.execute("INSERT INTO branches VALUES (?,?,?,?,?,?)", row)
    note = f"run {run_id} goes on from {branch}: {branch.changes}"
    trunk = self.run(branch.trunk).experiment_id
    db.execute(
      "INSERT INTO links VALUES (?,?,?,?,?)", (experiment_id, trunk, "continues", note, _now())
    )

  def _join(self, db: sqlite3.Connection, experiment_id: str, run_id: str, arm: str) -> None:
    self._insert_arms(db, experiment_id, [ArmRecord(arm, {}, "")])
    db.execute("INSERT OR IGNORE INTO members VALUES (?,?,?)", (experiment_id, run_id, arm))

  def owns(self, run_id: str) -> bool:
    """Whether this process holds the run."""
    return run_id in self._locks

  def of_any_code(self, fingerprint: str, data_digest: str, seed: int) -> list[Run]:
    """The runs of the same configuration, data and seed, newest first."""
    rows = self._read(
      RUN_SQL + "WHERE r.fingerprint = ? AND r.data_digest = ? AND r.seed = ? "
      "ORDER BY r.rowid DESC, m.rowid",
      *(fingerprint, data_digest, seed),
    )
    return list({row["id"]: decoded_run(row) for row in reversed(rows)}.values())[::-1]

  def left_under_other_code(
    self, fingerprint: str, data_digest: str, seed: int, code_version: str
  ) -> Run | None:
    """The newest run of the same configuration, data and seed that other code made, if it is
    unfinished.
    """
    rows = self._read(
      RUN_SQL + "WHERE r.fingerprint = ? AND r.data_digest = ? AND r.seed = ? "
      "AND r.code_version != ? ORDER BY r.rowid DESC, m.rowid LIMIT 1",
      *(fingerprint, data_digest, seed, code_version),
    )
    return next((run for run in map(decoded_run, rows) if not run.finished), None)

  def held_elsewhere(self, run_id: str) -> bool:
    """Whether another process, which lives, owns the run."""
    if run_id in self._locks:
      return False
    lock = self._try_lock(run_id)
    if lock is not None:
      lock.close()
    return lock is None

  def claim(self, run_id: str) -> Run:
    """Become the owner of a run to resume it: status "running", the error cleared. Atomic.

    Raises RecordError naming the owner's host and pid if it is alive, or if the run is completed or
    unknown.
    """
    self.run(run_id)
    if run_id not in self._locks:
      self._locks[run_id] = self._lock(run_id)
    if self.run(run_id).status == "completed":
      self._locks.pop(run_id).close()
      raise RecordError(f"run {run_id} is completed and cannot be resumed; `nmoe rerun` repeats it")
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    self._update("runs", run_id, {"status": "running", "error": "", **owner})
    return self.run(run_id)

  def add_start(self, run_id: str, start: Start) -> None:
    """Record that this process executes a run from a step on."""
    row = (run_id, start.step, start.host, start.device, json.dumps(start.environment), _now())
    with self._writing() as db:
      db.execute("INSERT INTO starts VALUES (?,?,?,?,?,?)", row)

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
      RUN_SQL
      + "WHERE r.fingerprint = ? AND r.data_digest = ? AND r.seed = ? AND r.code_version = ? "
      "ORDER BY r.rowid DESC, m.rowid",
      *key,
    )
    return [decoded_run(row) for row in rows]

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
    with self._explained(), transaction(self._db) as db:
      yield db

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

  def _owner_lives(self, run_id: str) -> bool:
    """For want of a lock file: whether the record's owner is a process that is still alive."""
    sql = "SELECT host, pid, updated FROM runs WHERE id = ? AND status = 'running'"
    return any(lives(row["host"], row["pid"], row["updated"]) for row in self._read(sql, run_id))

  def _try_lock(self, run_id: str) -> IO[str] | None:
    """The open, locked file, or None while another holds it."""
    path = Root(self.root).lock(run_id)
    if not path.exists() and self._owner_lives(run_id):
      return None
    lock = _opened(path)
    with ExitStack() as unless_taken:
      unless_taken.callback(lock.close)
      with _lockable(path):
        if files.lock(lock):
          unless_taken.pop_all()
          return lock
    return None


def _opened(path: Path) -> IO[str]:
  """A lock file, made if it is not there."""
  try:
    path.parent.mkdir(exist_ok=True)
    return path.open("a")
  except OSError as error:
    raise RecordError(
      f"{path}: cannot be opened ({error.strerror}); give this user write access to it"
    ) from error


@contextmanager
def _lockable(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise RecordError(
      f"{path}: cannot be locked ({error.strerror}); put run.root on a filesystem with file locks"
    ) from error


def _now() -> str:
  return time.strftime(TIME_FORMAT, time.gmtime())
