"""The schema's steps: a root made by the code of 85916c7 opens, lists and continues with nothing
lost; a step that is killed leaves the old file usable; what was written first stays.

tests/data/experiments-85916c7.db was made by `nmoe ablate` (2 seeds), `nmoe research run`, `nmoe
rerun` and an interrupted `nmoe research run` of that commit, on a model of four steps.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from roots import start_run

from nmoe.errors import RecordError
from nmoe.records import migrations
from nmoe.records.experiments import Experiments
from nmoe.records.migrations import MIGRATIONS
from nmoe.records.reader import ArmRecord, Hypothesis, Reader

REPO = Path(__file__).resolve().parents[2]
OLD = REPO / "tests" / "data" / "experiments-85916c7.db"
COUNTS = {"experiments": 4, "runs": 6, "members": 8, "links": 1}
KEPT = (  # of runs: every column of schema 1
  'id, seed, toml, fingerprint, data_digest, "commit", diff, code_version, environment, target, '
  "status, results, error, host, pid, created, updated"
)


@pytest.fixture
def root(tmp_path) -> Path:
  """The old root. Its interrupted run stays what it is: nobody holds its lock."""
  shutil.copy(OLD, tmp_path / "experiments.db")
  return tmp_path


def rows(path: Path, sql: str) -> list[tuple]:
  with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
    return db.execute(sql).fetchall()


def counts(path: Path, tables=tuple(COUNTS)) -> dict[str, int]:
  return {table: rows(path, f"SELECT count(*) FROM {table}")[0][0] for table in tables}


def version(path: Path) -> int:
  return rows(path, "PRAGMA user_version")[0][0]


def test_the_fixture_is_of_schema_1():
  assert version(OLD) == 1 and counts(OLD) == COUNTS


def test_nothing_is_lost(root):
  """Counts of all tables, every old column of every row, and what moved to other tables."""
  path = root / "experiments.db"
  Experiments(root).close()
  assert version(path) == len(MIGRATIONS)
  assert counts(path) == COUNTS
  assert counts(path, ("hypotheses", "arms")) == {"hypotheses": 4, "arms": 5}
  for sql in (
    f"SELECT {KEPT} FROM runs ORDER BY rowid",
    "SELECT experiment_id, run_id, arm FROM members ORDER BY rowid",
    "SELECT from_id, to_id, relation, note, created FROM links ORDER BY rowid",
    "SELECT id, name, stage, status, verdict, conclusion, created, updated FROM experiments "
    "ORDER BY rowid",
  ):
    assert rows(path, sql) == rows(OLD, sql)
  claims = "SELECT {}, statement, metric, direction, min_effect FROM {} ORDER BY rowid"
  assert rows(path, claims.format("experiment_id", "hypotheses")) == rows(
    OLD, claims.format("id", "experiments")
  )
  assert rows(path, "PRAGMA integrity_check") == [("ok",)]
  assert rows(path, "PRAGMA foreign_key_check") == []
  assert [p.name for p in root.glob("experiments.db*")] == ["experiments.db"]


def test_the_old_root_goes_on(root):
  """What was interrupted is claimed, what was completed is reused, new experiments are numbered."""
  db = Experiments(root)
  assert [e.id for e in db.list()] == ["long-1", "rerun-tiny-muon-1", "tiny-1", "tiny-muon-1"]
  first = db.find("tiny-muon")
  assert first.headline == Hypothesis("Muon is better.", "val/bpb", "lower", 0.05)
  assert [arm.name for arm in first.arms] == ["baseline", "variant"] and first.arms[0].point == {}
  assert first.verdict == "inconclusive" and first.conclusion["n"] == 2
  done = db.runs(first.id)
  assert [(r.arm, r.seed) for r in done] == [
    (a, s) for s in (0, 1) for a in ("baseline", "variant")
  ]
  (stopped,) = db.runs("long-1")
  assert db.claim(stopped.id).status == "running"
  db.update_run(stopped.id, status="completed", results={"val/bpb": 1.0})
  assert db.links(first.id)[0].relation == "repeats"
  db.link(first.id, "tiny-1", "refines")
  second = db.create("tiny-muon", "ablate", first.hypotheses)
  assert second.id == "tiny-muon-2"
  names = "toml fingerprint data_digest commit diff code_version environment target".split()
  record = {name: getattr(done[0], name) for name in names}
  found = db.find_or_start(second.id, "baseline", done[0].seed, **record)
  assert found.finished and found.id in {
    r.id for name in (first.id, "rerun-tiny-muon-1") for r in db.runs(name)
  }
  db.conclude(first.id, "confirmed", {"reason": "again"})
  db.close()
  assert counts(root / "experiments.db") == {"experiments": 5, "runs": 6, "members": 9, "links": 2}


def test_a_reader_shows_an_old_root_and_leaves_it_alone(root):
  before = (root / "experiments.db").read_bytes()
  reader = Reader(root)
  assert [e.id for e in reader.list()] == ["long-1", "rerun-tiny-muon-1", "tiny-1", "tiny-muon-1"]
  assert reader.find("tiny").headline.statement == "It learns."
  assert reader.counts() == {
    "tiny-muon-1": (4, 4, 0),
    "tiny-1": (2, 2, 2),  # a research run of the ablation's baseline
    "rerun-tiny-muon-1": (1, 1, 0),
    "long-1": (0, 1, 0),
  }
  assert [r.seed for r in reader.runs("tiny-1")] == [0, 1]
  reader.close()
  assert (root / "experiments.db").read_bytes() == before
  assert [p.name for p in root.iterdir()] == ["experiments.db"]


KILLED = """
import os, signal, sqlite3, sys
from nmoe.records import migrations
from nmoe.records.experiments import Experiments

def half(db):
  statements = 0
  def kill(statement):
    nonlocal statements
    statements += 1
    if statements == int(sys.argv[2]):
      os.kill(os.getpid(), signal.SIGKILL)
  db.execute("PRAGMA cache_size = 1")  # what does not fit is written to the file before the end
  db.set_trace_callback(kill)
  migrations.several_hypotheses_and_arms(db)
  for i in range(400):
    db.execute("INSERT INTO links VALUES ('tiny-1', 'tiny-1', 'refines', ?, '')", ("x" * 4000,))
  os.kill(os.getpid(), signal.SIGKILL)

migrations.MIGRATIONS = (migrations.runs_and_members, half)
Experiments(sys.argv[1])
"""


@pytest.mark.parametrize("statement", [1, 2, 4, 9, 14, 20, 100, 10**6])
def test_a_migration_that_is_killed_leaves_the_old_file_usable(root, statement):
  """Also where half of it was in the file already: SQLite's journal takes it back. The kill is
  real; a copy of the old file stands beside until all is done.
  """
  path = root / "experiments.db"
  command = [sys.executable, "-c", KILLED, str(root), str(statement)]
  assert subprocess.run(command, cwd=REPO).returncode == -signal.SIGKILL
  spilled = path.read_bytes() != OLD.read_bytes()
  assert spilled == (statement > 1), "all but the first leave half a migration in the file"
  kept = root / "experiments.db.schema-1"
  assert version(kept) == 1 and counts(kept) == COUNTS
  with closing(sqlite3.connect(path)) as db:  # as the old code opens it: for writing
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.execute("UPDATE runs SET error = '' WHERE seed = 0")
    db.commit()
  assert counts(path) == COUNTS
  sql = f"SELECT {KEPT} FROM runs ORDER BY rowid"
  assert rows(path, sql) == rows(OLD, sql)
  Experiments(root).close()
  assert version(path) == len(MIGRATIONS) and counts(path) == COUNTS
  assert [p.name for p in root.glob("experiments.db*")] == ["experiments.db"]


def test_a_step_that_fails_changes_nothing(root, monkeypatch):
  def broken(db):
    db.execute("DROP TABLE links")
    db.execute("SELECT no_such_column FROM runs")

  before = (root / "experiments.db").read_bytes()
  monkeypatch.setattr(migrations, "MIGRATIONS", (migrations.runs_and_members, broken))
  with pytest.raises(RecordError, match="no such column"):
    Experiments(root)
  assert (root / "experiments.db").read_bytes() == before
  assert (root / "experiments.db.schema-1").is_file()


def test_the_next_step_is_one_function(root, monkeypatch):
  """What a later feature adds: schema 1 and schema 2 both get there, data intact."""

  def notes(db):
    db.execute("CREATE TABLE notes (run_id TEXT NOT NULL REFERENCES runs(id), n INTEGER)")

  Experiments(root).close()
  monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, notes))
  for path in (root, root / "older"):
    path.mkdir(exist_ok=True)
    if path != root:
      shutil.copy(OLD, path / "experiments.db")
    Experiments(path).close()
    assert version(path / "experiments.db") == len(MIGRATIONS) + 1
    assert counts(path / "experiments.db") == COUNTS
    assert counts(path / "experiments.db", ("notes",)) == {"notes": 0}


def test_several_processes_migrate_at_once(root):
  code = "import sys; from nmoe.records.experiments import Experiments; Experiments(sys.argv[1])"
  command = [sys.executable, "-c", code, str(root)]
  several = [subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE) for _ in range(4)]
  assert [p.communicate(timeout=60)[1].decode() for p in several] == [""] * 4
  path = root / "experiments.db"
  assert version(path) == len(MIGRATIONS) and counts(path) == COUNTS


CHANGES = (
  "UPDATE hypotheses SET min_effect = 0",
  "UPDATE hypotheses SET direction = 'higher' WHERE number = 0",
  "DELETE FROM hypotheses",
  "INSERT INTO hypotheses SELECT experiment_id, 7, 's', 'm', 'none', 0 FROM hypotheses LIMIT 1",
  "UPDATE arms SET point = '{}'",
  "UPDATE arms SET name = 'other'",
  "DELETE FROM arms",
  "UPDATE experiments SET name = 'other'",
  "UPDATE experiments SET created = '2020'",
  "UPDATE runs SET seed = 7",
  "UPDATE runs SET fingerprint = 'f'",
  "UPDATE runs SET data_digest = 'f'",
  "UPDATE runs SET diff = ''",
  "UPDATE runs SET \"commit\" = ''",
  "UPDATE runs SET code_version = 'v'",
  "UPDATE runs SET environment = '{}'",
  "UPDATE runs SET created = '2020'",
  "UPDATE runs SET toml = 'x' WHERE status = 'completed'",
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_written_before_the_first_step_is_never_rewritten(root, change):
  """Whoever asks: the database itself refuses."""
  Experiments(root).close()
  with closing(sqlite3.connect(root / "experiments.db")) as db:
    before = list(db.iterdump())
    with pytest.raises(sqlite3.IntegrityError, match="never rewritten|before the first run"):
      db.execute(change)
    assert list(db.iterdump()) == before


def test_several_hypotheses_and_points(tmp_path):
  db = Experiments(tmp_path)
  claims = [
    Hypothesis("The optimum stays.", "val/loss", "none", 0.5),
    Hypothesis("The control's moves.", "val/loss", "lower", 0.5),
  ]
  arms = [ArmRecord(f"lr {x:g}", {"lr": x, "width": 64, "rule": "on"}, f"c{x}") for x in (0.1, 0.2)]
  made = db.create("sweep", "proxy", claims, arms)
  assert made.hypotheses == tuple(claims) and made.headline == claims[0]
  assert [(a.name, a.point, a.computation) for a in made.arms] == [
    ("lr 0.1", {"lr": 0.1, "width": 64, "rule": "on"}, "c0.1"),
    ("lr 0.2", {"lr": 0.2, "width": 64, "rule": "on"}, "c0.2"),
  ]
  assert Reader(tmp_path).find("sweep") == made and Reader(tmp_path).list() == [made]
  point = rows(tmp_path / "experiments.db", "SELECT point FROM arms")[0][0]
  assert json.loads(point) == {"lr": 0.1, "width": 64, "rule": "on"}
  db.add_arms(made.id, [arms[0], ArmRecord("lr 0.4", {"lr": 0.4}, "c0.4")])
  assert [a.name for a in db.find("sweep").arms] == ["lr 0.1", "lr 0.2", "lr 0.4"]


def ask(db: Experiments, claim="c", computation="x", arms=("a",), seeds=(0,), grows=False) -> str:
  claims = [Hypothesis(claim, "val/bpb", "lower", 0.0)]
  planned = [ArmRecord(name, {}, computation) for name in arms]
  return db.find_or_create("e", "test", claims, planned, seeds, grows).id


def member(db: Experiments, experiment_id: str, arm: str, seed: int) -> None:
  db.update_run(start_run(db, experiment_id, arm, seed).id, status="completed")


@pytest.mark.faults
def test_the_same_question_is_found_another_is_not(tmp_path):
  db = Experiments(tmp_path)
  assert ask(db) == ask(db) == "e-1"
  assert ask(db, claim="another") == "e-2"
  assert ask(db, computation="y") == "e-3"  # before any run: what the arms compute is on record
  assert ask(db, arms=("a", "b")) == "e-4"
  assert ask(db) == "e-1"
  member(db, "e-1", "a", 0)
  assert ask(db, seeds=(0, 1)) == "e-1"
  member(db, "e-1", "a", 1)
  assert ask(db, seeds=(0,)) == "e-5", "one with fewer seeds would be judged on fewer"
  assert ask(db, seeds=(0,), grows=True) == "e-5"
  member(db, "e-5", "a", 9)
  assert ask(db, arms=("a", "b"), grows=True) == "e-5"
  assert [arm.name for arm in db.find("e-5").arms] == ["a", "b"]


@pytest.mark.faults
def test_of_several_that_ask_at_once_one_creates(tmp_path):
  Experiments(tmp_path).close()
  found, barrier = [], threading.Barrier(6)

  def one():
    db = Experiments(tmp_path)
    barrier.wait()
    found.append(ask(db))

  threads = [threading.Thread(target=one) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == ["e-1"] * 6
  assert counts(tmp_path / "experiments.db", ("experiments",)) == {"experiments": 1}


@pytest.mark.faults
@pytest.mark.parametrize("left", [b"", None])
def test_records_that_vanished_are_not_begun_anew(tmp_path, left):
  """A file of no bytes, or none, beside the locks of runs."""
  db = Experiments(tmp_path)
  member(db, ask(db), "a", 0)
  db.close()
  path = tmp_path / "experiments.db"
  path.unlink()
  if left is not None:
    path.write_bytes(left)
  with pytest.raises(RecordError, match="has had runs, but its experiments.db is empty or gone"):
    Experiments(tmp_path)
  with pytest.raises(RecordError, match="holds no records"):
    Reader(tmp_path)
  assert os.stat(tmp_path / "locks").st_nlink and (not path.exists() or path.stat().st_size == 0)
