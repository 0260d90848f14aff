"""Which run a production launch executes, and who keeps it out."""

import io
import shutil
import socket
import time
from pathlib import Path

import pytest
from labs import write_variant
from rich.console import Console

from nmoe.config.file import changed
from nmoe.errors import ConfigError, RunError
from nmoe.records.launches import Launch
from nmoe.records.root import Root
from nmoe.train.progress import Entry, Heartbeat
from stages import workbench
from stages.launch.display import Display
from stages.prod import earlier, launching
from stages.prod.attempt import End, begin
from stages.report.html import write_report


def test_a_launch_without_evidence_starts_nothing(lab):
  with pytest.raises(ConfigError, match=r"(?s)this is missing:.*launch --without-evidence REASON"):
    launching.launch(lab.file, Console(file=io.StringIO()))
  assert not (lab.root / "logs").exists()


def test_a_launch_that_would_lose_everything_is_refused(lab):
  file = write_variant(lab.file, "never", "[train]\ncheckpoint_every = 0\n")
  with pytest.raises(ConfigError, match="a crash would lose all of it"):
    launching.launch(file, Console(file=io.StringIO()))


def launched_run(lab, file=None, **asked) -> str:
  """The run that a launch would execute."""
  console = Console(file=io.StringIO())
  assert launching.launch(file or lab.file, console, "a test", dry_run=True, **asked) == 0
  said = [line for line in console.file.getvalue().splitlines() if "goes on" in line]
  newest = next(e for e in lab.records.list() if e.stage == "prod")
  return said[0].split()[1] if said else lab.records.runs(newest.id)[-1].id


@pytest.mark.faults
def test_a_run_of_weeks_is_not_left_behind_in_silence(lab, records, monkeypatch):
  """Its file was edited: what differs is named. A free key is no difference, and without a
  checkpoint nothing is lost.
  """
  slower = write_variant(lab.file, "slower", "[optim]\ndense_lr = 5e-3\n")
  first = launched_run(lab)
  assert launched_run(lab, slower) != first
  other = launched_run(lab, slower)
  shutil.copytree(*(lab.checkpoints(run) for run in (trained(lab), first)))
  assert launched_run(lab) == first
  assert launched_run(lab, slower) == other  # the newest of this very computation
  faster = write_variant(lab.file, "faster", "[optim]\ndense_lr = 2e-2\n")
  told = (
    f"run {first} .* stands at step 12 and would be left there: optim.dense_lr was 0.01, is 0.02"
  )
  with pytest.raises(ConfigError, match=f"{told}; .*prod amend {first}.*--anew from step 0"):
    launched_run(lab, faster)
  assert launched_run(lab, faster, anew=True) not in (first, other)
  free = write_variant(lab.file, "free", "[train]\nlog_every = 3\n")
  assert launched_run(lab, free) == first


@pytest.mark.faults
def test_a_file_that_is_edited_under_its_live_run_begins_no_other(lab, records, monkeypatch):
  """Not even before its first checkpoint, nor where the edited one has a run that stopped: both
  would take the same processors.
  """
  slower = write_variant(lab.file, "slower", "[optim]\ndense_lr = 5e-3\n")
  other = launched_run(lab, slower)
  first = launched_run(lab)
  records.claim(first)
  told = f"run {first} .* is running: optim.dense_lr was 0.01, is 0.005; .*prod amend {first}"
  with pytest.raises(ConfigError, match=f"{told}.*`nmoe prod stop {first}` ends it"):
    launched_run(lab, slower)
  faster = write_variant(lab.file, "faster", "[optim]\ndense_lr = 2e-2\n")
  with pytest.raises(ConfigError, match=f"run {first} .* is running"):
    launched_run(lab, faster)
  assert launched_run(lab) == first  # which is refused by its lock, if it is not a dry run
  monkeypatch.setattr(workbench, "provenance", lambda _: ("c0ffee", "the repair", "repaired"))
  with pytest.raises(ConfigError, match=f"run {first} .* is running: its code was .* ends it"):
    launched_run(lab)
  records.release(first)
  records.update_run(first, status="interrupted")
  assert launched_run(lab, slower) not in (first, other)


@pytest.mark.faults
def test_two_first_launches_at_once_are_one_run(lab, monkeypatch):
  """Both looked before either had recorded a run."""
  first = launched_run(lab)
  monkeypatch.setattr(earlier, "known", lambda *_: None)
  assert launched_run(lab) == first
  assert launched_run(lab, anew=True) != first


@pytest.mark.faults
@pytest.mark.parametrize(
  ("outcome", "status"),
  [
    ("preempted", "interrupted"),
    ("stopped", "interrupted"),
    ("disk full", "interrupted"),
    ("superseded", "interrupted"),
    ("refused", "failed"),
    ("no progress", "failed"),
  ],
)
def test_an_experiment_that_goes_on_has_not_failed(lab, records, monkeypatch, outcome, status):
  """As `experiments list` says it of a launch that was told to leave (Ctrl-C): 75, not 76."""
  monkeypatch.setattr(launching, "_execute", lambda *_: End(outcome, "why"))
  launching.launch(lab.file, Console(file=io.StringIO()), "a test")
  (launch,) = (e for e in records.list() if e.stage == "prod")
  assert launch.status == status


@pytest.mark.faults
def test_other_code_goes_on_when_it_is_accepted(lab, records, monkeypatch):
  """As after the repair of a fault: refused, then recorded with the difference, then known."""
  first = launched_run(lab)
  shutil.copytree(*(lab.checkpoints(run) for run in (trained(lab), first)))
  before = records.run(first).code_version
  monkeypatch.setattr(workbench, "provenance", lambda _: ("c0ffee", "the repair", "repaired"))
  told = f"run {first} .*its code was {before} .*, this is repaired .*launch --accept-code"
  with pytest.raises(ConfigError, match=told):
    launched_run(lab)
  assert launched_run(lab, accept_code=True) == first
  assert records.run(first).code_version == before, "nothing was launched yet"
  monkeypatch.setattr(launching, "_carried_out", lambda *_: 0)
  for accept_code in (True, False):  # the second time it is known
    assert (
      launching.launch(lab.file, Console(file=io.StringIO()), "x", accept_code=accept_code) == 0
    )
    assert records.run(first).code_version == "repaired"
  (event,) = (event for event in records.events(first) if event.kind == "code")
  assert (event.detail["before"], event.detail["commit"], event.step) == (before, "c0ffee", 12)
  (patch,) = (path for path in records.artifacts(first) if path.endswith("code_repaired.patch"))
  assert Path(patch).read_text() == "the repair"
  (launch,) = (e.id for e in records.list() if e.stage == "prod")  # the run stays of its experiment
  begin(lab.root, first, "local")
  page = write_report(lab.root, launch).read_text()
  assert "<dt>code from step 12 on</dt><dd>repaired, commit c0ffee</dd>" in page


@pytest.mark.faults
def test_a_run_of_weeks_is_not_trained_once_more_for_other_code(lab, records, monkeypatch):
  """The same command after an update began at step 0, with --accept-code too. What it goes on with
  comes first.
  """
  first = launched_run(lab)
  records.claim(first)
  records.update_run(first, status="completed", results={"steps": 12})
  before = records.run(first).code_version
  monkeypatch.setattr(workbench, "provenance", lambda _: ("c0ffee", "", "updated"))
  told = f"run {first} .* is completed: its code was {before} .*, this is updated .*"
  with pytest.raises(ConfigError, match=f"{told}--accept-code takes it as done, .*--anew trains"):
    launched_run(lab)
  console = Console(file=io.StringIO())
  assert launching.launch(lab.file, console, "a test", accept_code=True) == 0
  assert f"run {first} is completed" in console.file.getvalue()
  assert records.run(first).code_version == before
  second = launched_run(lab, anew=True)
  assert second != first
  assert launched_run(lab) == launched_run(lab, accept_code=True) == second
  slower = write_variant(lab.file, "slower", "[optim]\ndense_lr = 5e-3\n")
  assert launched_run(lab, slower) not in (first, second), "another computation"


@pytest.mark.faults
def test_a_step_of_an_earlier_attempt_is_not_shown_again(lab, records, monkeypatch):
  """New ranks say in their heartbeat what the last ones reached, until they log a step: the launch
  said "goes on from step 0", then "step 4", with the time that was left there.
  """
  path, out = Root(lab.root).heartbeat(launched_run(lab)), io.StringIO()
  path.parent.mkdir(parents=True, exist_ok=True)
  old, new = Entry(4, 12, 5.0, 10.0, 9.0), Entry(1, 12, 6.0, 10.0, 12.0)
  Heartbeat(old, time.time(), "a", 7, 1).write(path)

  class Agent:
    polls = iter((("starting", old), ("stepping", old), ("stepping", new), None))

    def poll(self):
      state = next(self.polls)
      if state is None:
        return 0
      Heartbeat(state[1], time.time(), "a", 8, 2, state[0]).write(path)
      return None

    def kill(self):
      pass

  monkeypatch.setattr(launching, "POLL_S", 0.0)
  monkeypatch.setattr(launching.local, "spawn", lambda *_: Agent())
  with Display(Console(file=out, width=200)) as display:
    run = records.run(path.parent.name)
    launching._attempt(lab.root, run, lab.config, 2, display.line("production", 12, "starting"))
  assert out.getvalue().splitlines() == [f"production: {new}"]


@pytest.mark.faults
def test_a_report_shows_the_reason_of_a_launch_and_of_its_events(lab, records):
  """What it does without, and why; who was lost in a restart: as `nmoe prod status` says it."""
  run = launched_run(lab)
  number = begin(lab.root, run, "local")
  records.started(run, number, 0, "a")
  detail = {"suspect": 1, "why": "it ended without <a> word"}
  records.started(run, number, 6, "a", detail=detail)
  (launch,) = (e.id for e in records.list() if e.stage == "prod")
  page = write_report(lab.root, launch).read_text()
  assert "<dt>without prod.evidence, check-resume, prod-check</dt><dd>a test</dd>" in page
  assert "<td>suspect: rank 1; it ended without &lt;a&gt; word</td>" in page


def trained(lab) -> str:
  """A run of the lab at another seed, whose checkpoints can be copied."""
  run = lab.record(train__seed=7)
  assert lab.attempt(run) == 0
  return run


def test_another_host_s_fresh_heartbeat_keeps_a_launch_out(lab):
  """Even where its lock does not: locks of some filesystems hold for one host only."""
  run, config = lab.record(), changed(lab.config, {"prod.stale_s": 30.0})
  folder = Root(lab.root).prod(run)
  folder.mkdir(parents=True, exist_ok=True)
  entry = Entry(1, 9, 2.0, 3.0, 4.0)
  number = begin(lab.root, run, "local", nodes=["elsewhere"])
  for age, ours, refused in ((1.0, False, True), (60.0, False, False), (1.0, True, False)):
    name = socket.gethostname() if ours else "elsewhere"
    Heartbeat(entry, time.time() - age, name, 7, number).write(Root(lab.root).heartbeat(run))
    if refused:
      with pytest.raises(RunError, match=r"attempt 1, heartbeat 1 s ago by elsewhere, pid 7"):
        with launching._alone(lab.root, run, config):
          pass
    else:
      with launching._alone(lab.root, run, config):
        pass


@pytest.mark.faults
def test_a_launch_elsewhere_that_has_no_ranks_keeps_another_out(lab):
  """While they load, for longer than prod.stale_s, there is no heartbeat; its agent speaks."""
  run, config = lab.record(), changed(lab.config, {"prod.stale_s": 30.0})
  number = begin(lab.root, run, "local", nodes=["elsewhere"])
  entry, now = Entry(1, 9, 2.0, 3.0, 4.0), time.time()
  Heartbeat(entry, now - 60, "elsewhere", 7, number).write(Root(lab.root).heartbeat(run))
  Launch(number, now - 90, now - 4, "elsewhere", 7).write(lab.root, run)
  with pytest.raises(RunError, match="is launched already"):
    with launching._alone(lab.root, run, config):
      pass
  Launch(number, now - 90, now - 40, "elsewhere", 7).write(lab.root, run)
  with launching._alone(lab.root, run, config):
    pass


@pytest.mark.faults
def test_a_sign_of_a_clock_that_is_ahead_names_its_file(lab):
  """A host whose clock was a day ahead is gone: its sign stays young for a day, so the launch says
  what to delete.
  """
  run, config = lab.record(), changed(lab.config, {"prod.stale_s": 30.0})
  number = begin(lab.root, run, "local", nodes=["elsewhere"])
  day, path = time.time() + 86400, Root(lab.root).heartbeat(run)
  Heartbeat(Entry(1, 9, 2.0, 3.0, 4.0), day, "elsewhere", 7, number).write(path)
  Launch(number, day, day, "elsewhere", 7).write(lab.root, run)
  told = rf"86,\d+ s ahead of this clock.*if elsewhere is gone, delete {path} and .*launch.json"
  with pytest.raises(RunError, match=told):
    with launching._alone(lab.root, run, config):
      pass
  path.unlink()
  Root(lab.root).launch(run).unlink()
  with launching._alone(lab.root, run, config):
    pass


@pytest.mark.faults
def test_a_refused_launch_changes_nothing(lab):
  """While the other's ranks are replaced nobody holds the run itself; and the file was edited."""
  edited = write_variant(lab.file, "edited", "[train]\nlog_every = 4\n")
  console = Console(file=io.StringIO())
  assert launching.launch(lab.file, console, "a test", dry_run=True) == 0
  (run,) = (
    run.id for e in lab.records.list() if e.stage == "prod" for run in lab.records.runs(e.id)
  )
  before = lab.run(run)
  with launching._alone(lab.root, run, lab.config):
    with pytest.raises(RunError, match=f"run {run} is launched already"):
      launching.launch(edited, console, "a test")
  assert lab.run(run).toml == before.toml
