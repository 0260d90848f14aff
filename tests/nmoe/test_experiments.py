"""The experiment database: round trips, reuse, ownership, and what happens when things break."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from roots import RECORD, start_run

from nmoe import files
from nmoe.errors import RecordError
from nmoe.records import experiments
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics, read
from nmoe.records.owner import TIME_FORMAT, lives
from nmoe.records.provenance import provenance
from nmoe.records.reader import Hypothesis, Reader

HYPOTHESIS = {
  "stage": "ablate",
  "hypotheses": [Hypothesis("Muon lowers bpb.", "val/bpb", "lower", 0.01)],
}
REPO = Path(__file__).resolve().parents[2]


def start(db, experiment_id, seed=0, arm="baseline", **changed):
  return start_run(db, experiment_id, arm, seed, **changed)


def child(root, code):
  """A Python process with `db` open."""
  head = "import sys, time; from nmoe.records.experiments import Experiments"
  return subprocess.Popen(
    [sys.executable, "-c", f"{head}; db = Experiments({str(root)!r})\n{code}"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=REPO,
  )


def test_hypothesis_and_conclusion_round_trip(tmp_path):
  db = Experiments(tmp_path)
  made = db.create("Muon vs AdamW", **HYPOTHESIS)
  assert (made.id, made.status, made.verdict) == ("muon-vs-adamw-1", "planned", "")
  db.set_status(made.id, "running")
  db.conclude(made.id, "confirmed", {"mean": -0.02, "low": -math.inf, "p": math.nan})
  db.close()
  found = Experiments(tmp_path).find("Muon vs AdamW")
  assert (found.verdict, found.status, found.headline.statement) == (
    "confirmed",
    "completed",
    "Muon lowers bpb.",
  )
  assert found.conclusion["low"] == -math.inf and math.isnan(found.conclusion["p"])
  assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.created)


def test_a_name_finds_the_newest_and_an_id_exactly_one(tmp_path):
  db = Experiments(tmp_path)
  first, second = db.create("muon", **HYPOTHESIS), db.create("muon", **HYPOTHESIS)
  assert (first.id, second.id) == ("muon-1", "muon-2")
  assert db.find("muon").id == second.id and db.find("muon-1").id == first.id
  assert [e.id for e in db.list()] == ["muon-2", "muon-1"]
  with pytest.raises(RecordError, match=r"no experiment 'mun'; the newest are: muon-2, muon-1"):
    db.find("mun")


def test_links_are_evidence_between_experiments(tmp_path):
  db = Experiments(tmp_path)
  a, b = db.create("a", **HYPOTHESIS), db.create("b", **HYPOTHESIS)
  db.link(b.id, a.id, "supports", "at twice the width")
  link = db.links(a.id)[0]
  assert (link.from_id, link.to_id, link.relation) == (b.id, a.id, "supports")
  assert db.links(b.id) == [link]
  with pytest.raises(RecordError, match="'proves' must be one of supports"):
    db.link(b.id, a.id, "proves")


def test_run_round_trip_and_sortable_id(tmp_path):
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  run = start(db, experiment.id, seed=3, diff="+x", toml="π = 3\n")
  assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.id)
  assert (run.status, run.pid, run.toml, run.diff) == ("running", os.getpid(), "π = 3\n", "+x")
  db.update_run(run.id, status="completed", results={"val/bpb": 1.25, "load/dead": 0})
  done = db.run(run.id)
  assert done.results == {"val/bpb": 1.25, "load/dead": 0} and done.environment == {"torch": "2.13"}
  with pytest.raises(RecordError, match="no run '2020'"):
    db.run("2020")
  with pytest.raises(RecordError, match="no run '2020' to update"):
    db.update_run("2020", error="x")


def test_runs_of_one_second_have_different_ids(tmp_path, monkeypatch):
  digits = iter(["ab12", "ab12", "cd34"])
  monkeypatch.setattr(experiments.secrets, "token_hex", lambda _: next(digits))
  monkeypatch.setattr(experiments.time, "strftime", lambda *_: "20261123-142233-")
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  ids = [start(db, experiment.id, seed).id for seed in range(2)]
  assert ids == ["20261123-142233-ab12", "20261123-142233-cd34"]


def test_reuse_needs_the_same_computation(tmp_path):
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  run = start(db, experiment.id, seed=1)
  key = (run.fingerprint, run.data_digest, 1, run.code_version)
  assert db.find_finished(*key) is None and db.find_unfinished(*key).id == run.id
  db.update_run(run.id, status="completed", results={"val/bpb": 1.0})
  assert db.find_finished(*key).id == run.id and db.find_unfinished(*key) is None
  for i, other in enumerate(("0" * 16, "other", 2, "w")):
    assert db.find_finished(*(*key[:i], other, *key[i + 1 :])) is None


def test_a_run_counts_in_several_experiments(tmp_path):
  db = Experiments(tmp_path)
  one, two = db.create("one", **HYPOTHESIS), db.create("two", **HYPOTHESIS)
  run = start(db, one.id)
  for _ in range(2):
    assert db.find_or_start(two.id, "control", run.seed, **RECORD).id == run.id
  assert [(r.id, r.experiment_id, r.arm) for r in db.runs(two.id)] == [(run.id, two.id, "control")]
  assert db.run(run.id).arm == "baseline"
  with pytest.raises(RecordError, match="FOREIGN KEY"):
    db.find_or_start("three-1", "control", run.seed, **RECORD)


def test_runs_with_an_outcome_before_the_hypothesis_are_counted_as_older(tmp_path):
  """A completed and a diverged one; one that failed is tried again, and is none."""
  db = Experiments(tmp_path)
  first = db.create("first", **HYPOTHESIS)
  outcomes = [("completed", {"val/bpb": 1.0}), ("failed", {"diverged": 1}), ("failed", {})]
  runs = [start(db, first.id, seed) for seed in range(3)]
  for run, (status, results) in zip(runs, outcomes, strict=True):
    db.update_run(run.id, status=status, results=results)
  time.sleep(1.1)  # the records' clock counts whole seconds
  second = db.create("second", **HYPOTHESIS)
  for seed in range(3):
    db.find_or_start(second.id, "baseline", seed, **RECORD)
  assert db.counts() == {first.id: (1, 3, 0), second.id: (1, 3, 2)}


def test_a_live_run_cannot_be_claimed_and_its_owner_is_named(tmp_path):
  db = Experiments(tmp_path)
  run = start(db, db.create("muon", **HYPOTHESIS).id)
  claimer = child(tmp_path, f"db.claim({run.id!r})")
  error = claimer.communicate(timeout=30)[1]
  assert claimer.returncode == 1
  assert f"run {run.id} belongs to process {os.getpid()} on host" in error
  assert db.run(run.id).status == "running"


def test_of_many_claimers_one_wins(tmp_path):
  db = Experiments(tmp_path)
  run = start(db, db.create("muon", **HYPOTHESIS).id)
  db.release(run.id)
  code = f"sys.stdin.readline()\ndb.claim({run.id!r})\nprint('mine', flush=True)\ntime.sleep(3)"
  claimers = [child(tmp_path, code) for _ in range(4)]
  for process in claimers:
    process.stdin.write("go\n")
    process.stdin.flush()
  outcomes = [process.communicate(timeout=60) for process in claimers]
  assert sorted(out for out, _ in outcomes) == ["", "", "", "mine\n"]
  assert sum("belongs to process" in error for _, error in outcomes) == 3


def test_a_killed_owner_leaves_an_interrupted_run_that_can_be_resumed(tmp_path):
  db = Experiments(tmp_path)
  run = start(db, db.create("muon", **HYPOTHESIS).id)
  db.release(run.id)
  owner = child(tmp_path, f"db.claim({run.id!r}); print('up', flush=True); time.sleep(60)")
  assert owner.stdout.readline() == "up\n"
  assert db.mark_interrupted() == [] and db.run(run.id).pid == owner.pid
  db.release(run.id)
  assert db.run(run.id).status == "running", "only the owner can release"
  owner.send_signal(signal.SIGKILL)
  owner.communicate()
  assert Experiments(tmp_path).run(run.id).status == "interrupted"
  assert db.claim(run.id).pid == os.getpid()
  db.update_run(run.id, status="completed")
  with pytest.raises(RecordError, match="is completed"):
    db.claim(run.id)


@pytest.mark.faults
def test_a_deleted_lock_makes_no_second_owner(tmp_path):
  """Whoever tidied up `locks/`: the owner lives, and only its death ends its run."""
  db = Experiments(tmp_path)
  run = start(db, db.create("muon", **HYPOTHESIS).id)
  db.release(run.id)
  owner = child(tmp_path, f"db.claim({run.id!r}); print('up', flush=True); time.sleep(60)")
  assert owner.stdout.readline() == "up\n"
  shutil.rmtree(tmp_path / "locks")
  assert Reader(tmp_path).run(run.id).status == "running"
  assert db.mark_interrupted() == []
  with pytest.raises(RecordError, match=f"belongs to process {owner.pid} on host"):
    db.claim(run.id)
  owner.send_signal(signal.SIGKILL)
  owner.communicate()
  assert Reader(tmp_path).run(run.id).status == "interrupted"
  assert db.claim(run.id).pid == os.getpid()


def test_a_process_with_the_number_of_a_dead_owner_is_not_the_owner():
  now = time.strftime(TIME_FORMAT, time.gmtime())
  host = socket.gethostname()
  assert lives(host, os.getpid(), now)
  assert not lives(host, os.getpid(), "2001-01-01T00:00:00Z")  # this process started later
  assert not lives("another host", os.getpid(), now)
  assert not lives(host, 2**22 + 1, now)


@pytest.mark.faults
def test_of_several_that_want_the_same_run_one_starts_it(tmp_path):
  """Finding or starting is one step: the others find that one."""
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  code = f"""
sys.stdin.readline()
record = dict.fromkeys(("toml", "fingerprint", "data_digest", "commit", "diff"), "")
record |= dict(code_version="v", environment={{}}, target="cpu")
run = db.find_or_start({experiment.id!r}, "a", 0, **record)
print(run.id, db.owns(run.id), flush=True)
sys.stdin.readline()
"""
  several = [child(tmp_path, code) for _ in range(4)]
  for process in several:
    process.stdin.write("go\n")
    process.stdin.flush()
  said = [process.stdout.readline().split() for process in several]
  for process in several:
    process.communicate("\n", timeout=60)
  assert len({run_id for run_id, _ in said}) == 1
  assert sorted(owner for _, owner in said) == ["False", "False", "False", "True"]
  assert len(db.runs(experiment.id)) == 1


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


def contents(root):
  """Every path below a root with its size, its bytes and when it was changed."""
  files = sorted(path for path in root.rglob("*"))
  return [(p, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in files]


@pytest.mark.faults
def test_a_reader_changes_nothing_and_sees_a_dead_run_as_interrupted(tmp_path):
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  run = start(db, experiment.id)
  experiment = db.find(experiment.id)
  reader = Reader(tmp_path)
  assert reader.run(run.id).status == "running"  # its owner, this process, lives
  db.release(run.id)
  code = f"db.claim({run.id!r}); print('up', flush=True); time.sleep(60)"
  owner = child(tmp_path, code)
  assert owner.stdout.readline() == "up\n"
  assert reader.run(run.id).status == "running"
  owner.send_signal(signal.SIGKILL)
  owner.communicate()
  db.close()
  before = contents(tmp_path)
  reader = Reader(tmp_path)
  assert reader.find("muon") == experiment and reader.list() == [experiment]
  assert [r.status for r in reader.runs(experiment.id)] == ["interrupted"]
  assert reader.run(run.id).status == "interrupted" and reader.links(experiment.id) == []
  reader.close()
  assert contents(tmp_path) == before
  row = sqlite3.connect(tmp_path / "experiments.db").execute("SELECT status FROM runs").fetchone()
  assert row == ("running",)  # as the dead owner left it: marking it is a writer's work


@pytest.mark.faults
def test_a_reader_of_a_root_without_records_creates_nothing(tmp_path):
  for root in (tmp_path / "no such folder", tmp_path):
    with pytest.raises(RecordError, match="holds no records.*--root or NMOE_ROOT"):
      Reader(root)
  assert list(tmp_path.iterdir()) == []


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
@pytest.mark.parametrize("name", ["../../evil", "nothing", "a/b"])
def test_a_run_that_is_not_there_gets_no_lock(tmp_path, name):
  db = Experiments(tmp_path / "root")
  run = start(db, db.create("muon", **HYPOTHESIS).id)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(RecordError, match="no run"):
    db.claim(name)
  assert sorted(tmp_path.rglob("*")) == before and db.owns(run.id)


@pytest.mark.faults
def test_an_experiment_runs_while_a_process_carries_it_out(tmp_path):
  """Of two that do, the second still holds it when the first is gone; then it reads interrupted,
  and a reader changes nothing.
  """
  db = Experiments(tmp_path)
  made = db.create("muon", **HYPOTHESIS)
  code = f"db.set_status({made.id!r}, 'running'); print('up', flush=True); time.sleep(60)"
  owners = [child(tmp_path, code) for _ in range(2)]
  for owner in owners:
    owner.stdout.readline()
  reader = Reader(tmp_path)
  assert [e.status for e in reader.list()] == ["running"]
  for owner, status in zip(owners, ("running", "interrupted"), strict=True):
    owner.kill()
    owner.communicate()
    assert reader.find(made.id).status == status
  row = sqlite3.connect(reader.path).execute("SELECT status FROM experiments").fetchone()
  assert row == ("running",)
  db.set_status(made.id, "running")
  assert reader.find(made.id).status == "running"
  db.conclude(made.id, "confirmed", {})
  assert reader.find(made.id).status == "completed"


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


def test_a_filesystem_without_locks(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  monkeypatch.setattr(fcntl, "flock", refuse)
  with pytest.raises(RecordError, match=r"No locks available.*filesystem with file locks"):
    start(db, experiment.id)
  assert db.runs(experiment.id) == []


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


def git(folder, *arguments):
  identity = ("-c", "user.name=n", "-c", "user.email=e")
  subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_provenance_of_a_dirty_checkout(tmp_path):
  (tmp_path / "nmoe").mkdir()
  source = tmp_path / "nmoe" / "a.py"
  source.write_text("x = 1\n")
  clean = provenance(tmp_path)
  assert clean[:2] == ("", "") and re.fullmatch("[0-9a-f]{12}", clean[2])
  git(tmp_path, "init", "-q")
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "-qm", "one")
  commit, diff, version = provenance(tmp_path)
  assert len(commit) == 40 and diff == "" and version == clean[2]
  source.write_text("x = 2\n")
  (tmp_path / "nmoe" / "new.toml").write_text("y = 3\n")
  (tmp_path / "noise.bin").write_bytes(b"z")
  commit, diff, changed = provenance(tmp_path)
  assert "-x = 1" in diff and "+x = 2" in diff and "+y = 3" in diff and "noise" not in diff
  assert changed != version
  source.rename(tmp_path / "nmoe" / "b.py")
  assert provenance(tmp_path)[2] not in (version, changed), "a name is part of the code"


def test_provenance_without_git(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  commit, diff, version = provenance(REPO)
  assert (commit, diff) == ("", "") and len(version) == 12


def test_the_module_needs_no_torch():
  code = (
    "import sys, nmoe.records.experiments; "
    "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


def test_results_are_plain_json_for_other_readers(tmp_path):
  db = Experiments(tmp_path)
  run = start(db, db.create("muon", **HYPOTHESIS).id)
  db.update_run(run.id, status="failed", results={"val/bpb": 1.0}, error="loss is nan")
  row = sqlite3.connect(db.path).execute("SELECT results, error FROM runs").fetchone()
  assert json.loads(row[0]) == {"val/bpb": 1.0} and row[1] == "loss is nan"
