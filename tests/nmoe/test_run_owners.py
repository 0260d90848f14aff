"""Whose a run is: one process has it, while it lives, whatever happens to its lock."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import sqlite3
import time

import pytest
from record_cases import HYPOTHESIS, child, start

from nmoe.errors import RecordError
from nmoe.records.experiments import Experiments
from nmoe.records.owner import TIME_FORMAT, lives
from nmoe.records.reader import Reader


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


def test_a_run_that_its_study_gave_to_a_child_is_starting_until_the_child_has_it(tmp_path):
  """It stood as interrupted while its child was loading, which on a GPU takes minutes."""
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS).id
  run = start(db, experiment)
  db.release(run.id)
  reader = Reader(tmp_path)
  assert reader.run(run.id).status == "interrupted", "nobody carries its experiment out"
  db.set_status(experiment, "running")
  assert reader.run(run.id).status == "starting" and reader.run(run.id).live
  owner = child(tmp_path, f"db.claim({run.id!r}); print('up', flush=True); time.sleep(60)")
  assert owner.stdout.readline() == "up\n"
  assert reader.run(run.id).status == "running"
  owner.send_signal(signal.SIGKILL)
  owner.communicate()
  assert reader.run(run.id).status == "interrupted", "of a child that was killed"
  other = start(db, experiment)
  db.release(other.id)
  assert reader.run(other.id).status == "starting"
  db.close()
  assert reader.run(other.id).status == "interrupted", "of a study that ended"


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


def test_a_filesystem_without_locks(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)
  monkeypatch.setattr(fcntl, "flock", refuse)
  with pytest.raises(RecordError, match=r"No locks available.*filesystem with file locks"):
    start(db, experiment.id)
  assert db.runs(experiment.id) == []
