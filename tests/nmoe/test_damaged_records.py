"""Records that cannot be read or written: disks, locks, folders, others' files, killed writers."""

import os
import sqlite3
import subprocess
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import pytest
from record_cases import HYPOTHESIS, child, start

from nmoe import files
from nmoe.errors import RecordError
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics, read
from nmoe.records.reader import Reader


@pytest.mark.faults
def test_a_full_disk_is_said_to_be_one_and_nothing_is_half_written(tmp_path):
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  run = start(db, experiment.id)
  pages = db._db.execute("PRAGMA page_count").fetchone()[0]
  db._db.execute(f"PRAGMA max_page_count = {pages + 2}")
  with pytest.raises(RecordError, match="disk is full: free space and run again"):
    start(db, experiment.id, seed=1, diff="+" * 100_000)
  assert [r.id for r in db.runs(experiment.id)] == [run.id]
  db._db.execute("PRAGMA max_page_count = 100000")
  assert start(db, experiment.id, seed=1, diff="+" * 100_000).seed == 1


@pytest.mark.faults
@pytest.mark.parametrize("table, column", [("runs", "results"), ("experiments", "conclusion")])
def test_text_that_is_no_json_is_one_clear_error(tmp_path, table, column):
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  start(db, experiment.id)
  db.close()
  with sqlite3.connect(tmp_path / "experiments.db") as raw:
    raw.execute(f"UPDATE {table} SET {column} = '{{\"a\": '")
  reader = Reader(tmp_path)
  with pytest.raises(RecordError, match="where JSON belongs"):
    reader.runs(experiment.id)
    reader.list()


def test_a_reader_refuses_another_schema(tmp_path):
  Experiments(tmp_path).close()
  with sqlite3.connect(tmp_path / "experiments.db") as db:
    db.execute("PRAGMA user_version = 99")
  with pytest.raises(RecordError, match="schema 99"):
    Reader(tmp_path)


def test_a_writer_killed_at_any_moment_leaves_a_sound_database(tmp_path):
  experiment = Experiments(tmp_path).create("muon", **HYPOTHESIS)
  code = f"""
print('up', flush=True)
for i in range(10**6):
  r = db.start_run({experiment.id!r}, 'a', i, toml='t' * 5000, fingerprint='f', data_digest='d',
    commit='', diff='', code_version='v', environment={{}}, target='cpu')
  db.update_run(r.id, status='completed', results={{'seed': i}})
"""
  for delay in (0.05, 0.11, 0.17):
    writer = child(tmp_path, code)
    assert writer.stdout.readline() == "up\n"
    with pytest.raises(subprocess.TimeoutExpired):
      writer.communicate(timeout=delay)
    writer.kill()
    writer.communicate()
    db = Experiments(tmp_path)
    runs = db.runs(experiment.id)
    assert runs and {r.status for r in runs} <= {"completed", "interrupted"}
    assert all(r.results == {"seed": r.seed} for r in runs if r.status == "completed")
    assert sqlite3.connect(db.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_database_locked_by_another_process(tmp_path):
  db = Experiments(tmp_path, timeout_s=0.2)
  holder = sqlite3.connect(db.path, isolation_level=None)
  holder.execute("BEGIN EXCLUSIVE")
  with pytest.raises(
    RecordError, match=r"experiments\.db: database is locked; .* held it for 0\.2"
  ):
    db.create("muon", **HYPOTHESIS)
  holder.execute("ROLLBACK")
  assert db.create("muon", **HYPOTHESIS).id == "muon-1"


@pytest.mark.faults
def test_what_a_run_came_to_waits_for_whoever_reads(tmp_path):
  """A reader in a transaction for longer than a start waits."""
  db = Experiments(tmp_path, timeout_s=0.2)
  run = start(db, db.create("muon", **HYPOTHESIS).id)
  holder = sqlite3.connect(db.path, isolation_level=None, check_same_thread=False)
  holder.execute("BEGIN EXCLUSIVE")
  threading.Timer(1.0, holder.execute, ["ROLLBACK"]).start()
  db.wait_longer(20.0)
  db.update_run(run.id, status="completed", results={"val/bpb": 1.0})
  assert db.run(run.id).status == "completed"


@pytest.mark.faults
@pytest.mark.parametrize("name", ["a?b", "a\\b"])
def test_a_root_whose_name_the_metrics_would_misread(tmp_path, name):
  """Before a run trains for the first flush to fail."""
  with pytest.raises(RecordError, match="the metrics' files do not take in a path"):
    Experiments(tmp_path / name / "root")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
@pytest.mark.parametrize(
  "name", ["a#b", "a%41b", "a b ", "a\nb", "-r", "a'b", 'a"b', "a;b", "é", "[a]*"]
)
def test_a_root_of_any_other_name_holds_records_and_metrics(tmp_path, name):
  db = Experiments(tmp_path / name)
  assert db.create("muon", **HYPOTHESIS).id == "muon-1"
  metrics = Metrics(tmp_path / name, "run")
  metrics.add(1, 1, {"a": 1.0})
  metrics.flush()
  assert read(tmp_path / name, "run")["a"][2].tolist() == [1.0]
  assert [path.name for path in tmp_path.iterdir()] == [name]
  assert [e.id for e in Reader(tmp_path / name).list()] == ["muon-1"]


@pytest.mark.faults
def test_a_database_of_another_program_is_left_alone(tmp_path):
  path = tmp_path / "experiments.db"
  with closing(sqlite3.connect(path)) as other:
    other.execute("CREATE TABLE theirs (x)")
  before = path.read_bytes()
  with pytest.raises(RecordError, match="holds tables of another program"):
    Experiments(tmp_path)
  assert path.read_bytes() == before


@pytest.mark.faults
def test_a_root_behind_links(tmp_path):
  (tmp_path / "root").mkdir()
  (tmp_path / "link").symlink_to("root")
  made = Experiments(tmp_path / "link").create("muon", **HYPOTHESIS)
  assert [e.id for e in Reader(tmp_path / "root").list()] == [made.id]
  for name, target in (("a", "b"), ("b", "a"), ("c", "gone")):
    (tmp_path / name).symlink_to(target)
  for name in ("a", "c"):
    with pytest.raises(RecordError, match="cannot be created"):
      Experiments(files.resolved(tmp_path / name) if name == "a" else tmp_path / name)


@pytest.mark.parametrize(
  "content", [b"not a database " * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_corrupt_database(tmp_path, content):
  (tmp_path / "experiments.db").write_bytes(content)
  with pytest.raises(RecordError, match=r"experiments\.db: .*; the file is corrupt"):
    Experiments(tmp_path)
  assert (tmp_path / "experiments.db").read_bytes() == content


def test_a_database_of_another_schema(tmp_path):
  Experiments(tmp_path).close()
  sqlite3.connect(tmp_path / "experiments.db").execute("PRAGMA user_version = 99")
  with pytest.raises(
    RecordError,
    match=r"has schema 99, this nmoe reads schemas 1 to \d+; use the nmoe that wrote it",
  ):
    Experiments(tmp_path)


@pytest.fixture
def ordinary_user():
  """Root ignores permissions; become nobody for the test."""
  if os.geteuid() != 0:
    yield
    return
  os.seteuid(65534)
  yield
  os.seteuid(0)


def test_a_read_only_folder(ordinary_user):
  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    (root / "mine").mkdir()
    db = Experiments(root / "mine")
    experiment = db.create("muon", **HYPOTHESIS)
    db.close()
    for path in (root / "mine" / "experiments.db", root / "mine", root):
      path.chmod(path.stat().st_mode & 0o555)
    with pytest.raises(
      RecordError, match=r"cannot be created \(Permission denied\); set run\.root"
    ):
      Experiments(root / "other")
    readable = Experiments(root / "mine")
    assert readable.find("muon") == experiment
    with pytest.raises(RecordError, match="readonly database; it cannot be written here"):
      readable.create("again", **HYPOTHESIS)
    for path in (root, root / "mine"):
      path.chmod(0o755)


def test_an_empty_folder_that_cannot_be_written(ordinary_user):
  with tempfile.TemporaryDirectory() as folder:
    Path(folder).chmod(0o555)
    with pytest.raises(
      RecordError, match="unable to open database file; it cannot be written here"
    ):
      Experiments(folder)
    Path(folder).chmod(0o755)
