"""The experiment database: round trips, reuse, what a reader sees, and a run's provenance."""

import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from record_cases import HYPOTHESIS, REPO, child, start
from roots import RECORD

from nmoe.errors import RecordError
from nmoe.records import experiments
from nmoe.records.experiments import Experiments
from nmoe.records.provenance import provenance
from nmoe.records.reader import Reader


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
  """A run that can go on is the newest; one that is finished comes before it."""
  db = Experiments(tmp_path)
  experiment = db.create("muon", **HYPOTHESIS)

  def asked(seed=1, **changed):
    return db.find_or_start(experiment.id, "baseline", seed, **(RECORD | changed)).id

  runs = [start(db, experiment.id, seed=1).id for _ in range(2)]
  assert asked() == runs[1]
  db.update_run(runs[0], status="completed", results={"val/bpb": 1.0})
  assert asked() == runs[0]
  others = [asked(**{key: "w"}) for key in ("fingerprint", "data_digest", "code_version")]
  assert len({*runs, *others, asked(seed=2)}) == 6
  assert asked(toml="other words", environment={"torch": "2.14"}) == runs[0]


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
