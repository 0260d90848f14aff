"""The schema of experiments.db as numbered steps, forward only.

MIGRATIONS[n] makes schema n + 1 of schema n; a new database takes all of them. Each runs in a
transaction of its own, which also writes the new number. A step is never edited once a release has
it: a change of the schema is one more function at the end of the list.

A step may use all that SQLite's ALTER TABLE can do, but not drop a table that others refer to.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

Step = Callable[[sqlite3.Connection], None]


def runs_and_members(db: sqlite3.Connection) -> None:
  """Schema 1: an experiment is one hypothesis; runs are its members, by arm."""
  db.execute(
    """CREATE TABLE experiments (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, stage TEXT NOT NULL, statement TEXT NOT NULL,
    metric TEXT NOT NULL, direction TEXT NOT NULL, min_effect REAL NOT NULL,
    status TEXT NOT NULL, verdict TEXT NOT NULL, conclusion TEXT NOT NULL,
    created TEXT NOT NULL, updated TEXT NOT NULL)"""
  )
  db.execute(
    """CREATE TABLE runs (
    id TEXT PRIMARY KEY, seed INTEGER NOT NULL, toml TEXT NOT NULL, fingerprint TEXT NOT NULL,
    data_digest TEXT NOT NULL, "commit" TEXT NOT NULL, diff TEXT NOT NULL,
    code_version TEXT NOT NULL, environment TEXT NOT NULL, target TEXT NOT NULL,
    status TEXT NOT NULL, results TEXT NOT NULL, error TEXT NOT NULL,
    host TEXT NOT NULL, pid INTEGER NOT NULL, created TEXT NOT NULL, updated TEXT NOT NULL)"""
  )
  db.execute(
    """CREATE TABLE members (
    experiment_id TEXT NOT NULL REFERENCES experiments(id),
    run_id TEXT NOT NULL REFERENCES runs(id),
    arm TEXT NOT NULL, PRIMARY KEY (experiment_id, run_id, arm))"""
  )
  db.execute(
    """CREATE TABLE links (
    from_id TEXT NOT NULL REFERENCES experiments(id),
    to_id TEXT NOT NULL REFERENCES experiments(id),
    relation TEXT NOT NULL, note TEXT NOT NULL, created TEXT NOT NULL)"""
  )
  db.execute("CREATE INDEX same_run ON runs (fingerprint, data_digest, seed, code_version)")


def several_hypotheses_and_arms(db: sqlite3.Connection) -> None:
  """Schema 2: an experiment has several hypotheses, and arms with points; what was written before
  the first step is never rewritten.

  `computation` says what an arm computes, whatever its seed; "" where schema 1 did not keep it.
  """
  db.execute(
    """CREATE TABLE hypotheses (
    experiment_id TEXT NOT NULL REFERENCES experiments(id), number INTEGER NOT NULL,
    statement TEXT NOT NULL, metric TEXT NOT NULL, direction TEXT NOT NULL,
    min_effect REAL NOT NULL, PRIMARY KEY (experiment_id, number))"""
  )
  db.execute(
    """INSERT INTO hypotheses
    SELECT id, 0, statement, metric, direction, min_effect FROM experiments ORDER BY rowid"""
  )
  for column in ("statement", "metric", "direction", "min_effect"):
    db.execute(f"ALTER TABLE experiments DROP COLUMN {column}")
  db.execute(
    """CREATE TABLE arms (
    experiment_id TEXT NOT NULL REFERENCES experiments(id), name TEXT NOT NULL,
    point TEXT NOT NULL, computation TEXT NOT NULL, created TEXT NOT NULL,
    PRIMARY KEY (experiment_id, name))"""
  )
  db.execute(
    """INSERT INTO arms SELECT m.experiment_id, m.arm, '{}', '', min(r.created)
    FROM members m JOIN runs r ON r.id = m.run_id GROUP BY 1, 2 ORDER BY min(m.rowid)"""
  )
  db.execute(
    """CREATE TABLE members_of_arms (
    experiment_id TEXT NOT NULL, run_id TEXT NOT NULL REFERENCES runs(id), arm TEXT NOT NULL,
    PRIMARY KEY (experiment_id, run_id, arm),
    FOREIGN KEY (experiment_id, arm) REFERENCES arms(experiment_id, name))"""
  )
  db.execute("INSERT INTO members_of_arms SELECT * FROM members ORDER BY rowid")
  db.execute("DROP TABLE members")
  db.execute("ALTER TABLE members_of_arms RENAME TO members")
  db.execute("CREATE INDEX members_of_run ON members (run_id)")
  db.execute("CREATE INDEX named ON experiments (name, stage)")
  db.execute("CREATE INDEX by_status ON runs (status)")
  for table in ("hypotheses", "arms"):
    _fixed(db, table, "UPDATE")
    _fixed(db, table, "DELETE")
  _fixed(db, "experiments", "UPDATE OF id, name, stage, created")
  decided = 'id, seed, fingerprint, data_digest, "commit", diff, code_version, environment, target'
  _fixed(db, "runs", f"UPDATE OF {decided}, created")
  db.execute(
    """CREATE TRIGGER hypotheses_come_first BEFORE INSERT ON hypotheses
    WHEN EXISTS (SELECT 1 FROM members WHERE experiment_id = NEW.experiment_id)
    BEGIN SELECT RAISE(ABORT, 'a hypothesis is written before the first run'); END"""
  )
  db.execute(
    """CREATE TRIGGER completed_runs_keep_their_toml BEFORE UPDATE OF toml ON runs
    WHEN OLD.status = 'completed'
    BEGIN SELECT RAISE(ABORT, 'the configuration of a completed run is never rewritten'); END"""
  )


def evaluations(db: sqlite3.Connection) -> None:
  """Schema 3: what `nmoe eval` measured of a run's checkpoint; of equal ones the newest counts.

  `items` is the digest of what was asked; `results` are values by tag (JSON).
  """
  db.execute(
    """CREATE TABLE evaluations (
    run_id TEXT NOT NULL REFERENCES runs(id), step INTEGER NOT NULL, suite TEXT NOT NULL,
    items TEXT NOT NULL, arithmetic TEXT NOT NULL, results TEXT NOT NULL, seconds REAL NOT NULL,
    created TEXT NOT NULL)"""
  )
  db.execute("CREATE INDEX evaluations_of_run ON evaluations (run_id, step)")


def attempts_and_events(db: sqlite3.Connection) -> None:
  """Schema 4: the attempts of production runs, what happened and what was generated for them."""
  db.execute(
    """CREATE TABLE attempts (
    run_id TEXT NOT NULL REFERENCES runs(id), number INTEGER NOT NULL, engine TEXT NOT NULL,
    job_id TEXT NOT NULL, nodes TEXT NOT NULL, "commit" TEXT NOT NULL, started REAL NOT NULL,
    first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, ended REAL NOT NULL,
    outcome TEXT NOT NULL, exit INTEGER NOT NULL, PRIMARY KEY (run_id, number))"""
  )
  db.execute(
    """CREATE TABLE events (
    run_id TEXT NOT NULL REFERENCES runs(id), attempt INTEGER NOT NULL, time REAL NOT NULL,
    step INTEGER NOT NULL, kind TEXT NOT NULL, rank INTEGER NOT NULL, host TEXT NOT NULL,
    detail TEXT NOT NULL)"""
  )
  db.execute("CREATE INDEX events_of_run ON events (run_id)")
  db.execute(
    """CREATE TABLE artifacts (
    run_id TEXT NOT NULL REFERENCES runs(id), path TEXT NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (run_id, path))"""
  )
  for change in ("UPDATE", "DELETE"):
    _fixed(db, "events", change)


def branches(db: sqlite3.Connection) -> None:
  """Schema 5: a run may begin with a checkpoint that another run wrote, its trunk.

  `sha256` is of the checkpoint's manifest; `changed` has the schedule keys that differ from those
  under which it was written: [then, now] by key (JSON).
  """
  db.execute(
    """CREATE TABLE branches (
    run_id TEXT PRIMARY KEY REFERENCES runs(id), trunk TEXT NOT NULL REFERENCES runs(id),
    step INTEGER NOT NULL, tokens INTEGER NOT NULL, sha256 TEXT NOT NULL, changed TEXT NOT NULL)"""
  )
  for change in ("UPDATE", "DELETE"):
    _fixed(db, "branches", change)


def starts(db: sqlite3.Connection) -> None:
  """Schema 6: where and with what a run began, and was continued; `environment` is JSON."""
  db.execute(
    """CREATE TABLE starts (
    run_id TEXT NOT NULL REFERENCES runs(id), step INTEGER NOT NULL, host TEXT NOT NULL,
    device TEXT NOT NULL, environment TEXT NOT NULL, created TEXT NOT NULL)"""
  )
  db.execute("CREATE INDEX starts_of_run ON starts (run_id)")
  for change in ("UPDATE", "DELETE"):
    _fixed(db, "starts", change)


def exports(db: sqlite3.Connection) -> None:
  """Schema 7: the folders that checkpoints were exported to.

  `digest` is the sha256 of the folder's nmoe.json; `check` says what was compared (JSON).
  """
  db.execute(
    """CREATE TABLE exports (
    run_id TEXT NOT NULL REFERENCES runs(id), step INTEGER NOT NULL, path TEXT NOT NULL,
    digest TEXT NOT NULL, "check" TEXT NOT NULL, created TEXT NOT NULL)"""
  )
  db.execute("CREATE INDEX exports_of_run ON exports (run_id)")


def amendments(db: sqlite3.Connection) -> None:
  """Schema 8: a production run's schedule may be changed from some tokens on; `value` is JSON."""
  db.execute(
    """CREATE TABLE amendments (
    run_id TEXT NOT NULL REFERENCES runs(id), at_tokens INTEGER NOT NULL, key TEXT NOT NULL,
    value TEXT NOT NULL, reason TEXT NOT NULL, who TEXT NOT NULL, time REAL NOT NULL)"""
  )
  db.execute("CREATE INDEX amendments_of_run ON amendments (run_id)")
  for change in ("UPDATE", "DELETE"):
    _fixed(db, "amendments", change)


def _fixed(db: sqlite3.Connection, table: str, change: str) -> None:
  """Refuse a kind of change of a table from now on."""
  db.execute(
    f"""CREATE TRIGGER {table}_never_{change.split()[0].lower()} BEFORE {change} ON {table}
    BEGIN SELECT RAISE(ABORT, '{table}: what was written before the first step is never rewritten');
    END"""
  )


MIGRATIONS: tuple[Step, ...] = (
  runs_and_members,
  several_hypotheses_and_arms,
  evaluations,
  attempts_and_events,
  branches,
  starts,
  exports,
  amendments,
)


def version(db: sqlite3.Connection) -> int:
  """The number of a database's schema; 0: it has none."""
  return db.execute("PRAGMA user_version").fetchone()[0]


def migrate(db: sqlite3.Connection) -> None:
  """Take all steps that a database has not taken. `db` is in autocommit mode.

  Several processes may do so at once: each step is taken by one of them.
  """
  for number, step in enumerate(MIGRATIONS, start=1):
    if version(db) < number:
      with transaction(db):
        if version(db) < number:
          step(db)
          db.execute(f"PRAGMA user_version = {number}")


def migrate_file(db: sqlite3.Connection, path: Path) -> None:
  """`migrate` the open database at `path`; the file as it was stands beside it, as
  experiments.db.schema-N, until all steps are taken.
  """
  old = version(db)
  if old == len(MIGRATIONS):
    return
  kept = path.with_name(f"{path.name}.schema-{old}")
  if old:
    with transaction(db):  # no other process writes meanwhile
      if version(db) == old:
        _copy(path, kept)
  migrate(db)
  kept.unlink(missing_ok=True)


def _copy(path: Path, to: Path) -> None:
  """A whole copy of a database appears by a rename."""
  part = to.with_name(to.name + ".part")
  part.unlink(missing_ok=True)
  with (
    closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as source,
    closing(sqlite3.connect(part)) as copy,
  ):
    source.backup(copy)
  with part.open("rb") as file:
    os.fsync(file.fileno())
  part.rename(to)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
  """All of it or nothing. SQLite itself has rolled back where the disk is full."""
  db.execute("BEGIN IMMEDIATE")
  try:
    yield db
    db.execute("COMMIT")
  except BaseException:
    if db.in_transaction:
      db.execute("ROLLBACK")
    raise
