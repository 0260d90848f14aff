"""What `nmoe prod status` says of a production run, in words and to a monitor."""

import io
import re
import socket
import subprocess
import time
from contextlib import closing

import pytest
from labs import write_variant
from rich.console import Console

from nmoe.errors import RunError
from nmoe.records import condition
from nmoe.records.goodput import production
from nmoe.records.launches import Launch
from nmoe.records.reader import Reader
from nmoe.records.root import Root
from nmoe.train.progress import Entry, Heartbeat
from stages.prod import hosts, launching, status
from stages.prod.attempt import begin, settle


def condition_of(lab, run: str, age_s: float | None = None, state: str = "stepping", **said):
  """(status, code for a monitor that finds 30 s too long) of a run whose heartbeat is so old."""
  if age_s is not None:
    path = Root(lab.root).heartbeat(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    beat = Heartbeat(Entry(3, 9, 2.0, 1.0, 1.0), time.time() - age_s, "a", 1, 1, state)
    beat._replace(**said).write(path)
  found = production(lab.root, run)
  return condition.status(found), condition.health(found, 30.0)


def test_health(lab, records):
  """Of what runs, a heartbeat that is older than it may be; a save may take longer than a step."""
  run = lab.record()
  assert condition_of(lab, run) == ("interrupted", condition.UNKNOWN)
  records.claim(run)
  assert condition_of(lab, run) == ("running", condition.UNKNOWN)  # no sign yet
  assert condition_of(lab, run, 1.0) == ("running", condition.HEALTHY)
  assert condition_of(lab, run, 60.0) == ("running", condition.SICK)
  assert condition_of(lab, run, -10.0) == ("running", condition.HEALTHY)  # as clocks differ
  assert condition_of(lab, run, -3600.0) == ("running", condition.UNKNOWN)  # it was set back
  assert "3,600 s ahead of this clock on a" in told_of(lab, run)
  assert condition_of(lab, run, 60.0, "saving", limit_s=90.0) == ("running", condition.HEALTHY)
  assert condition_of(lab, run, 99.0, "saving", limit_s=90.0) == ("running", condition.SICK)
  records.update_run(run, status="failed")
  assert condition_of(lab, run, 1.0) == ("failed", condition.SICK)
  records.update_run(run, status="completed")
  assert condition_of(lab, run, 99.0) == ("completed", condition.HEALTHY)


@pytest.mark.faults
def test_ranks_that_are_replaced_are_no_failure(lab, records):
  """As long as the launch lives and takes no longer than ranks may take to start; for all readers.
  Whatever the ranks that were lost wrote into the record.
  """
  run = lab.record()
  number = begin(lab.root, run, "local")
  assert condition_of(lab, run) == ("starting", condition.HEALTHY)
  records.update_run(run, status="failed", error="another rank stopped")
  begun = Launch.read(lab.root, run)
  lost = begun._replace(lost=time.time() - 7, restarts=2)
  lost.write(lab.root, run)
  assert condition_of(lab, run, 60.0) == ("restarting", condition.HEALTHY)
  assert re.search(r"attempt 1, restart 2, since ..:..:.. UTC, 7 s", told_of(lab, run))
  with closing(Reader(lab.root)) as reader:
    assert [one.status for one in reader.runs(reader.run(run).experiment_id)] == ["restarting"]
  launching.stop(run, lab.root, Console(file=io.StringIO()))  # it can be told to leave
  lost._replace(lost=time.time() - 1801).write(lab.root, run)
  assert condition_of(lab, run) == ("restarting", condition.SICK)
  dead = subprocess.Popen(["true"])
  dead.wait()
  lost._replace(pid=dead.pid).write(lab.root, run)
  assert condition_of(lab, run) == ("failed", condition.SICK)
  lost._replace(host="elsewhere", time=time.time() - 20).write(lab.root, run)
  assert condition_of(lab, run) == ("restarting", condition.HEALTHY)
  lost._replace(host="elsewhere", time=time.time() - 40).write(lab.root, run)
  assert condition_of(lab, run) == ("failed", condition.SICK)
  lost.write(lab.root, run)
  records.claim(run)  # the new ranks are there, and load
  assert condition_of(lab, run, 60.0, "loading") == ("restarting", condition.HEALTHY)
  assert condition_of(lab, run, 1.0) == ("running", condition.HEALTHY)
  records.update_run(run, status="failed")
  Root(lab.root).stop_request(run).unlink()
  settle(lab.root, run, number)
  assert condition_of(lab, run) == ("failed", condition.SICK)


@pytest.mark.faults
def test_a_launch_that_is_gone_wakes_somebody(lab, records):
  """Nobody begins the next attempt of a killed command; a scheduler may, of a lost host."""
  run, dead = lab.record(), subprocess.Popen(["true"])
  dead.wait()
  for engine, codes in (("local", (2, 2)), ("slurm", (1, 2))):
    number = begin(lab.root, run, engine, nodes=["a"])
    records.update_run(run, status="interrupted")
    said = Launch.read(lab.root, run)
    for age_s, code in zip((20.0, 40.0), codes, strict=True):
      now = time.time() - age_s
      host = socket.gethostname() if engine == "local" else "elsewhere"
      said._replace(pid=dead.pid, host=host, time=now - 30).write(lab.root, run)
      assert condition_of(lab, run, age_s, attempt=number) == ("interrupted", code), engine
  assert "attempt 2 is open and nobody keeps it up" in told_of(lab, run)


def test_what_a_scheduler_begins_again_is_not_failed(lab, records):
  """Nobody can tell when; but for a full disk, which is not free again by itself."""
  run = lab.record()
  number = begin(lab.root, run, "slurm", nodes=["a"])
  assert condition_of(lab, run) == ("starting", condition.HEALTHY)  # its agent is to come
  records.update_run(run, status="failed")
  settle(lab.root, run, number)
  assert condition_of(lab, run) == ("crashed", condition.UNKNOWN)
  assert "the next attempt is slurm's to begin" in told_of(lab, run)
  number = begin(lab.root, run, "slurm", nodes=["a"])
  assert condition_of(lab, run) == ("restarting", condition.HEALTHY)
  records.event(run, number, "disk full", detail={"error": "No space left"})
  settle(lab.root, run, number)
  assert condition_of(lab, run) == ("failed", condition.SICK)


@pytest.mark.faults
@pytest.mark.parametrize(
  ("engine", "command"), [("slurm", "scancel --name"), ("jobset", "kubectl")]
)
def test_a_job_that_waits_is_said_to(lab, records, monkeypatch, engine, command):
  """Before its first attempt, and after one that was killed or stopped; a stop says how to take it
  back. Then the attempt begins.
  """
  file = write_variant(lab.file, "there", f'[launch]\nengine = "{engine}"\n')
  monkeypatch.setattr(hosts, "job_of", lambda *_: "")
  monkeypatch.setattr(hosts, "generate", lambda *_: lab.file)
  monkeypatch.setattr(hosts, "submit", lambda *_: None)
  for before in ("", "killed", "stopped"):
    assert launching.launch(file, Console(file=io.StringIO()), "a test") == 0
    (run,) = (one.id for e in records.list() if e.stage == "prod" for one in records.runs(e.id))
    assert condition_of(lab, run) == ("queued", condition.UNKNOWN), before
    assert f"the next attempt is {engine}'s to begin" in told_of(lab, run)
    with pytest.raises(
      RunError, match=f"nothing to stop; `{command}.*nmoe-{run}` takes a job back"
    ):
      launching.stop(run, lab.root, Console(file=io.StringIO()))
    number = begin(lab.root, run, engine, nodes=["a"])
    assert condition_of(lab, run)[1] == condition.HEALTHY  # its agent is to come
    Launch.read(lab.root, run)._replace(time=0.0).write(lab.root, run)
    assert condition_of(lab, run) == ("interrupted", condition.SICK)
    if before == "killed":
      records.event(run, number, "stop", step=1)
      Root(lab.root).stop_request(run).touch()
      assert settle(lab.root, run, number).outcome == "stopped"
      assert condition_of(lab, run) == ("stopped", condition.UNKNOWN)


def test_a_run_that_never_began_has_no_goodput(lab):
  assert "goodput" not in told_of(lab, lab.record())


def told_of(lab, run: str) -> str:
  """What `nmoe prod status` prints."""
  out = io.StringIO()
  status.status(run, lab.root, Console(file=out, width=200))
  return out.getvalue()


def test_events_are_told_in_words(lab, records):
  """No mark of Python's is in them."""
  run = lab.record()
  number = begin(lab.root, run, "local")
  startup = {"imports": 3.0, "kernels": 0.5, "ranks_and_data": 1.25, "model": 0.25}
  detail = {"startup": startup, "reached": 7, "reached_at": 0.0, "post_mortem": "/r/p.json"}
  more = {"suspect": 1, "why": "it ended without a word"}
  records.started(run, number, 0, "a", detail={"startup": startup})
  records.started(run, number, 6, "a", detail=detail | more)
  records.event(run, 0, "override", detail={"reason": "a test", "without": {"check-ep": "none"}})
  records.event(run, number, "rewind", step=9, detail={"to": 6, "samples": [3, 5]})
  amended = {"at_tokens": 2048, "key": "optim.beta1", "value": "0.8", "reason": "why not"}
  records.event(run, number, "amend", detail=amended | {"who": "me@here", "time": 0.0})
  records.event(run, number, "hardware", step=9, rank=1, detail={"values": [["0x1p+0"]]})
  told = told_of(lab, run)
  lines = [line.partition(" UTC, ")[2] for line in told.splitlines() if " UTC, attempt " in line]
  assert lines == [
    "attempt 1, step 0: launch: trains after 5.0 s (imports 3.0 s, kernels 0.5 s, "
    "ranks and data 1.2 s, model 0.2 s)",
    "attempt 1, step 6: restart: trains after 5.0 s (imports 3.0 s, kernels 0.5 s, "
    "ranks and data 1.2 s, model 0.2 s); those before reached step 7 and were last seen at "
    "00:00:00; suspect: rank 1; post mortem /r/p.json; it ended without a word",
    "attempt 0, step 0: override: a test; without check-ep none",
    "attempt 1, step 9: rewind: to 6; samples 3, 5",
    "attempt 1, step 0: amend: optim.beta1 = 0.8 from 2,048 tokens on; why not",
    "attempt 1, step 9: hardware of rank 1",
  ]
