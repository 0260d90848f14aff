"""Production launches: the gate, what an end means, what hosts must have in common, the records."""

import io
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from labs import write_variant
from rich.console import Console
from roots import start_run

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.config.sections import fingerprint
from nmoe.distributed.hosts import differences
from nmoe.errors import ConfigError, FencedError, RecordError, RunError
from nmoe.records.attempts import Attempt, History, check_newest
from nmoe.records.goodput import production
from nmoe.records.launches import Launch
from nmoe.records.reader import Hypothesis, Reader
from nmoe.records.root import Root
from nmoe.train.progress import Entry, Heartbeat, Progress
from stages import workbench
from stages.prod import earlier, hosts, launching, preflight
from stages.prod.attempt import begin, settle, stuck
from stages.prod.evidence import evidence
from stages.report.html import write_report

CLAIM = Hypothesis("It is better.", "val/bpb", "lower", 0.0)


def add_run(lab, records, experiment, arm, code="code", **values):
  """A completed run of the lab's configuration with keys replaced."""
  config = changed(lab.config, {key.replace("__", "."): value for key, value in values.items()})
  told = {"toml": configs.to_toml(config), "fingerprint": fingerprint(config, "data")}
  run = start_run(records, experiment.id, arm, 0, **told, data_digest="data", code_version=code)
  records.update_run(run.id, status="completed")


def conclude(lab, records, stage, name, verdict, code="code", **values):
  """A concluded experiment with one run, an ablation's variant; its id."""
  experiment = records.create(name, stage, (CLAIM,))
  add_run(lab, records, experiment, "variant", code, **values)
  records.conclude(experiment.id, verdict, {})
  return experiment.id


def ablate(lab, records, baseline, verdict="confirmed", **variant):
  """A concluded ablation."""
  experiment = records.create("better", "ablate", (CLAIM,))
  add_run(lab, records, experiment, "baseline", **baseline)
  add_run(lab, records, experiment, "variant", **variant)
  records.conclude(experiment.id, verdict, {})


def of_better(lab, records, **values) -> str:
  """What a configuration with these keys lacks that cites it."""
  return lacks(lab, records, prod__evidence=["better"], **values)["better"]


def lacks(lab, records, **values) -> dict[str, str]:
  config = changed(lab.config, {key.replace("__", "."): value for key, value in values.items()})
  found = evidence(config, lab.file, records, "code")
  return {one.what: one.lack for one in found}


def test_the_gate(lab, records):
  """Everything is missing, with the command that makes it; then it comes, piece by piece."""
  missing = lacks(lab, records, prod__evidence=["better"])
  assert missing.keys() == {"better", "check-resume", "prod-check"}  # check-ep: of several ranks
  assert "no experiment 'better'" in missing["better"]
  assert f"run `nmoe check resume {lab.file}`" in missing["check-resume"]
  conclude(lab, records, "ablate", "better", "refuted")
  assert (
    "is refuted; only what was confirmed"
    in lacks(lab, records, prod__evidence=["better"])["better"]
  )
  conclude(lab, records, "research", "better", "confirmed")
  assert "is of stage research" in lacks(lab, records, prod__evidence=["better"])["better"]
  conclude(lab, records, "ablate", "better", "confirmed", optim__beta1=0.8)
  assert "optim.beta1" in lacks(lab, records, prod__evidence=["better"])["better"]
  conclude(lab, records, "ablate", "better", "confirmed", model__num_layers=1)  # another size
  assert lacks(lab, records, prod__evidence=["better"])["better"] == ""
  conclude(lab, records, "check", "check-resume-x", "confirmed", model__num_layers=1)
  assert "was not run for this configuration" in lacks(lab, records)["check-resume"]
  conclude(lab, records, "check", "check-resume-x", "confirmed", code="other")
  assert "passed with other code" in lacks(lab, records)["check-resume"]
  conclude(
    lab,
    records,
    "check",
    "check-resume-x",
    "confirmed",
    schedule__total_tokens=1024,
    schedule__warmup_tokens=0,
    schedule__decay_tokens=0,
  )
  conclude(lab, records, "check", "prod-check-x", "confirmed")
  assert set(lacks(lab, records, prod__evidence=["better"]).values()) == {""}
  told = [str(one) for one in evidence(lab.config, lab.file, records, "code") if not one.lack]
  assert all(one.endswith(" passed") for one in told) and len(told) == 2
  conclude(lab, records, "check", "prod-check-x", "refuted")
  assert "did not pass" in lacks(lab, records)["prod-check"]
  assert "cites no experiment" in lacks(lab, records)["prod.evidence"]


@pytest.mark.parametrize(
  ("key", "value"),
  [("optim__experts", "muon"), ("optim__expert_lr", 3e-3), ("moe__num_experts", 8)],
)
def test_a_launch_takes_what_won(lab, records, key, value):
  """The value that an ablation confirmed, be it of identity, of the schedule or of size; the
  baseline's is not what was shown. What was refuted is no evidence for either.
  """
  ablate(lab, records, {}, **{key: value})
  dotted = key.replace("__", ".")
  assert f"confirmed {dotted} = {value!r}, and this has" in of_better(lab, records)
  assert of_better(lab, records, **{key: value}) == ""
  ablate(lab, records, {}, "refuted", **{key: value})
  assert "is refuted" in of_better(lab, records)
  assert "is refuted" in of_better(lab, records, **{key: value})
  ablate(lab, records, {key: value})  # and the way back: the variant has the lab's own
  assert of_better(lab, records) == ""
  assert f"confirmed {dotted} = " in of_better(lab, records, **{key: value})


def test_what_is_not_size_is_the_winner_s(lab, records):
  ablate(lab, records, {}, optim__experts="muon")
  wanted = {"optim__experts": "muon"}
  assert of_better(lab, records, **wanted, model__num_layers=3, moe__expert_dim=16) == ""
  told = of_better(lab, records, **wanted, model__tie_embeddings=True)
  assert told == "no arm of it has this configuration's model.tie_embeddings"


def test_a_launch_takes_the_rates_of_its_sweep(lab, records):
  name = conclude(lab, records, "proxy", "better", "confirmed")
  path = Root(lab.root).report(name) / "transfer.toml"
  path.parent.mkdir(parents=True)
  path.write_text("[optim]\nexpert_lr = 0.02\n[evidence]\nrule = 'x'\n")
  assert "confirmed optim.expert_lr = 0.02, and this has 0.01" in of_better(lab, records)
  assert of_better(lab, records, optim__expert_lr=0.02) == ""


def test_a_launch_without_evidence_starts_nothing(lab):
  with pytest.raises(ConfigError, match=r"(?s)this is missing:.*launch --without-evidence REASON"):
    launching.launch(lab.file, Console(file=io.StringIO()))
  assert not (lab.root / "logs").exists()


def test_a_launch_that_would_lose_everything_is_refused(lab):
  file = write_variant(lab.file, "never", "[train]\ncheckpoint_every = 0\n")
  with pytest.raises(ConfigError, match="a crash would lose all of it"):
    launching.launch(file, Console(file=io.StringIO()))


def test_attempts_count_and_end(lab, records):
  run = lab.record()
  first = begin(lab.root, run, "local", nodes=["a", "b"])
  records.started(run, first, 0, "a")
  records.started(run, first, 6, "a")
  records.event(run, first, "stop", step=7)
  end = settle(lab.root, run, first)
  assert (end.outcome, end.status) == ("preempted", 75)
  second = begin(lab.root, run, "local")
  Root(lab.root).prod(run).mkdir(parents=True, exist_ok=True)
  Root(lab.root).stop_request(run).touch()
  records.event(run, second, "stop", step=9)
  end = settle(lab.root, run, second)
  assert (end.outcome, end.status) == ("stopped", 0)
  assert not Root(lab.root).stop_request(run).exists()
  third = begin(lab.root, run, "local")
  records.event(run, third, "diverged", detail={"error": "step 3: not finite"})
  end = settle(lab.root, run, third)
  assert (end.outcome, end.status, end.why) == ("diverged", 76, "step 3: not finite")
  reader = History(lab.root)
  assert [(a.number, a.outcome, a.exit) for a in reader.attempts(run)] == [
    (1, "preempted", 75),
    (2, "stopped", 0),
    (3, "diverged", 76),
  ]
  assert reader.attempts(run)[0].nodes == ["a", "b"]
  kinds = [(event.attempt, event.kind) for event in reader.events(run)]
  assert kinds[:3] == [(1, "launch"), (1, "restart"), (1, "stop")]
  reader.close()
  records.update_run(run, status="completed")
  with pytest.raises(RecordError, match="is completed"):
    begin(lab.root, run, "local")


def test_an_attempt_of_a_jobset_has_its_pods_number(lab, records):
  """A JobSet that was evicted before its first attempt began counted that restart."""
  run = lab.record()
  assert begin(lab.root, run, "jobset", number=2) == 2
  assert begin(lab.root, run, "jobset") == 3
  for before in (1, 3):
    with pytest.raises(RecordError, match=f"attempt {before} of run {run} cannot begin: attempt 3"):
      begin(lab.root, run, "jobset", number=before)
  assert [attempt.number for attempt in records.attempts(run)] == [2, 3]


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


def test_a_newer_attempt_fences_an_older_one(lab, records):
  """The older may write nothing, and its end is never to be queued again."""
  run = lab.record()
  first = begin(lab.root, run, "local", nodes=["a"])
  check_newest(lab.root, run, first)
  second = begin(lab.root, run, "local", nodes=["b"])
  check_newest(lab.root, run, second)
  check_newest(lab.root, run, 0)  # a run without attempts
  with pytest.raises(FencedError, match="attempt 1 .* writes no more: attempt 2 has begun on b"):
    check_newest(lab.root, run, first)
  Root(lab.root).prod(run).mkdir(parents=True, exist_ok=True)
  Root(lab.root).stop_request(run).touch()
  end = settle(lab.root, run, first)
  assert (end.outcome, end.status) == ("superseded", 76)
  assert Root(lab.root).stop_request(run).exists()  # it was meant for the newer one


def test_a_full_disk_is_queued_again(lab, records):
  run = lab.record()
  number = begin(lab.root, run, "local")
  records.event(run, number, "disk full", detail={"error": "No space left"})
  end = settle(lab.root, run, number)
  assert (end.outcome, end.status, end.why) == ("disk full", 75, "No space left")


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


def test_a_host_is_reached_by_its_end_of_the_way_to_the_head():
  assert hosts.address("") == hosts.address("127.0.0.1:29400") == "127.0.0.1"
  with pytest.raises(RunError, match="the first host cannot be reached"):
    hosts.address("no-such-host.invalid:29400")


def test_the_head_compiles_before_its_agent_starts(lab, monkeypatch, tmp_path):
  """The others need no stamp to wait for: no rank starts anywhere before the head's agent is up."""
  done, order = tmp_path / "compiled", []

  def compile_beside(*_):
    order.append("begun")
    return [subprocess.Popen(["sh", "-c", f"sleep 0.3; touch {done}"])]

  monkeypatch.setattr(hosts.local, "compile_beside", compile_beside)
  monkeypatch.setattr(hosts.os, "execve", lambda *_: order.append(done.exists()))
  run = lab.record()
  hosts.node(run, lab.root, 1, "127.0.0.1:29400", 0)
  hosts.node(run, lab.root, 1, "127.0.0.1:29400", 1)
  assert order == ["begun", True, True]


def attempt(first: int) -> Attempt:
  return Attempt("r", 1, "local", "", [], "", 0.0, first, first, 0.0, "", 0)


@pytest.mark.parametrize(
  ("firsts", "step", "given_up"),
  [([0, 0], 0, False), ([0, 0, 0], 0, True), ([0, 0, 10], 10, False), ([0, 10, 10, 10], 10, True)],
)
def test_no_progress(firsts, step, given_up):
  """Three attempts that end where the first of them began; a newer checkpoint begins the count."""
  assert stuck([attempt(first) for first in firsts], step, 3) is given_up


@pytest.mark.faults
def test_who_was_told_to_leave_made_no_progress_by_no_fault_of_its_own(lab, records):
  """Preempted again and again while its ranks start, by its launch or on a host of a scheduler: it
  is queued again each time, and a crash among them is the first.
  """
  run = lab.record(prod__no_progress=2)
  for told in (True, False, True, False):
    number = begin(lab.root, run, "slurm")
    if not told:
      records.left(run, number)  # by the agent of its first host
      records.left(run, number)
    end = settle(lab.root, run, number, told=told)
    assert (end.outcome, end.status) == ("preempted", 75)
    assert end.why == "it was told to leave before its ranks could save"
  assert [e.kind for e in records.events(run)].count("stop") == 4
  outcomes = [settle(lab.root, run, begin(lab.root, run, "slurm")).outcome for _ in range(2)]
  assert outcomes == ["crashed", "no progress"]
  seconds = production(lab.root, run).seconds
  assert seconds["save stall"] == 0  # nothing was saved


@pytest.mark.faults
def test_attempts_that_were_told_to_leave_are_no_tries(lab, records):
  """A run that is preempted, stopped and amended for weeks may crash as often as any other."""
  run = lab.record(prod__max_attempts=2, prod__no_progress=9)
  for ask in (None, Root(lab.root).stop_request(run), Root(lab.root).amend_request(run)) * 2:
    number = begin(lab.root, run, "slurm")
    if ask is not None:
      ask.touch()
    assert settle(lab.root, run, number, told=True).outcome in ("preempted", "stopped", "amended")
  ends = [settle(lab.root, run, begin(lab.root, run, "slurm")) for _ in range(2)]
  assert [end.outcome for end in ends] == ["crashed", "no progress"]
  assert ends[1].why.startswith("2 attempts (prod.max_attempts): ")


@pytest.mark.faults
@pytest.mark.parametrize(
  ("kind", "outcome"),
  [("stop", "preempted"), ("amended", "amended"), ("disk full", "disk full"), ("crashed", "")],
)
def test_what_the_ranks_said_when_told_to_leave_stands(lab, records, kind, outcome):
  """Its agent adds nothing to an end that they recorded."""
  run = lab.record()
  number = begin(lab.root, run, "slurm")
  records.started(run, number, 0, "a")
  records.event(run, number, kind, step=3, detail={"error": "no space"})
  records.left(run, number)
  assert [e.kind for e in records.events(run)] == ["launch", kind] + ["stop"] * (not outcome)
  assert settle(lab.root, run, number, told=True).outcome == (outcome or "preempted")


def test_hosts_that_differ_are_named():
  same = {"host": "a", "torch": "2.13.0", "processor": "H100"}
  assert differences([same, same | {"host": "b"}]) == []
  told = [same, same, same | {"host": "c", "torch": "2.12.0"}]
  (line,) = differences(told)
  assert line.startswith("c (rank 2) has torch 2.12.0, most have 2.13.0: use hosts of one kind")


def test_a_heartbeat_is_whole_and_a_request_is_seen(tmp_path):
  path = tmp_path / "heartbeat.json"
  assert Heartbeat.read(path) is None
  progress = Progress(None, path, 3)
  entry = Entry(1, 9, 2.0, 3.0, 4.0)
  assert progress.log(entry, tell=True)
  beat = Heartbeat.read(path)
  assert beat.entry == entry and beat.attempt == 3 and abs(beat.time - time.time()) < 60
  (tmp_path / "stop").touch()
  assert not progress.log(entry, tell=True)
  (tmp_path / "stop").unlink()
  beat._replace(attempt=4).write(path)
  assert not progress.log(entry, tell=True)  # a newer attempt has begun: it is left alone
  assert Heartbeat.read(path).attempt == 4
  beat.write(path)
  (tmp_path / "stop").touch()
  assert progress.log(entry, tell=False)  # rank 0 hears it for all


@pytest.mark.faults
@pytest.mark.parametrize(
  "left", ["", "\0" * 400, '{"entry": {"st', "[]"], ids=("empty", "zeros", "cut", "other")
)
def test_a_heartbeat_that_a_loss_of_power_left(tmp_path, left):
  """Empty, of zeros, or cut: new ranks write it anew, and who only asks sees none or says so."""
  path = tmp_path / "heartbeat.json"
  path.write_text(left)
  if left.strip("\0"):
    with pytest.raises(RecordError, match="no heartbeat"):
      Heartbeat.read(path)
  else:
    assert Heartbeat.read(path) is None
  progress = Progress(None, path, 3)
  progress.enter("starting", 60.0)
  assert progress.before is None and Heartbeat.read(path).state == "starting"
  path.write_text(left)
  assert progress.log(Entry(1, 9, 2.0, 3.0, 4.0), tell=True)
  assert Heartbeat.read(path).entry.step == 1


@pytest.mark.faults
def test_a_disk_that_is_full_for_a_moment_ends_no_run(tmp_path, monkeypatch):
  """Between a checkpoint that does not fit and the older one that gives way, a log comes: neither
  its line nor its sign can be written, and the run goes on.
  """
  path = tmp_path / "heartbeat.json"
  progress = Progress(None, path, 3)
  full = Path("/dev/full").open("w", buffering=1)
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stderr", full)
    patch.setattr(Heartbeat, "write", lambda self, _: full.write("no\n"))
    progress.enter("saving", 60.0)
    assert progress.log(Entry(1, 9, 2.0, 3.0, 4.0), tell=True)
    (tmp_path / "stop").touch()
    assert not progress.log(Entry(2, 9, 2.0, 3.0, 4.0), tell=True)  # a request is heard
  assert not path.exists()
  progress.enter("stepping", 60.0)
  assert Heartbeat.read(path).entry.step == 2


HANG = """
import sys, threading, time
from nmoe.train.watchdog import no_longer_than
for _ in range(3):
  no_longer_than(1.0)
  time.sleep(0.6)
print("three steps", flush=True)
def the_line_that_hangs(): threading.Event().wait()
the_line_that_hangs()
"""


def test_a_hang_ends_with_the_stacks():
  """Steps within the deadline go on; a hang leaves the stack and a status that is not 0."""
  done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stdout == "three steps\n"
  assert "the_line_that_hangs" in done.stderr and "Timeout" in done.stderr


def test_a_stop_is_heard_while_ranks_fail(lab, records):
  """The request would go with the next attempt's begin."""
  run = lab.record()
  number = begin(lab.root, run, "local")
  records.update_run(run, status="failed", error="planted")
  launching.stop(run, lab.root, Console(file=io.StringIO()))
  end = settle(lab.root, run, number)
  assert (end.outcome, end.status) == ("stopped", 0) and "planted" in end.why


def said(rank: int, **other):
  """What a healthy rank of a preflight says."""
  same = {"host": f"n{rank}", "processor": "NVIDIA H100", "tflops": 700.0, "bits": "abc"}
  return (
    same
    | {
      "rank": rank,
      "steady": True,
      "locks": True,
      "free_bytes": 5e9,
      "sum_gb_s": 1.0,
      "write_gb_s": 1.0,
    }
    | other
  )


@pytest.mark.parametrize(
  ("other", "fault"),
  [
    ({}, ""),
    ({"bits": "abd"}, "rank 2 on n2 computes other bits; take it out"),
    ({"steady": False}, "rank 2 on n2 computes other bits; take it out"),
    ({"tflops": 610.0}, "slower: rank 2 on n2 610"),
    ({"locks": False}, "rank 2 on n2 took a lock that rank 0 held"),
    ({"free_bytes": 1e9}, "checkpoints take 4.0 GB; free space"),
  ],
)
def test_a_preflight_names_the_rank(other, fault):
  told = [said(0), said(1), said(2, **other), said(3)]
  faults = [one.fault for one in preflight.judged(told, 4e9) if one.fault]
  assert bool(faults) == bool(fault) and all(one.startswith(fault) for one in faults)


def test_a_preflight_of_two_ranks(lab):
  """Real ranks, recorded as a check that the gate accepts."""
  file = write_variant(lab.file, "two", "[launch]\nranks = 2\n[schedule]\nbatch_tokens = 1024\n")
  findings = preflight.check(file, Console(file=io.StringIO()))
  assert [one.fault for one in findings] == [""] * 6
  with closing(Reader(lab.root)) as reader:
    check = reader.list()[0]
    (run,) = reader.runs(check.id)
    assert (check.stage, check.verdict) == ("check", "confirmed")
    assert [one["rank"] for one in run.results["ranks"]] == [0, 1]
    found = evidence(configs.load(file, env={}), file, reader, run.code_version)
  assert {one.what: one.lack for one in found}["prod-check"] == ""


@pytest.mark.parametrize("leaves", [True, False])
def test_a_check_ends_when_its_job_is_gone(lab, monkeypatch, leaves):
  """Not with the ranks' outcome, while agents are still there; or after LEAVE_S."""
  run, asked = lab.record(), []
  lab.records.update_run(run, status="completed")

  def job(*_):
    asked.append(0)
    return "" if leaves and len(asked) == 3 else "Slurm's job 17"

  monkeypatch.setattr(hosts, "generate", lambda *_, **__: None)
  monkeypatch.setattr(hosts, "submit", lambda *_: None)
  monkeypatch.setattr(hosts, "job_of", job)
  monkeypatch.setattr(preflight, "POLL_S", 0.01)
  monkeypatch.setattr(preflight, "LEAVE_S", 60.0 if leaves else 0.1)
  bench = SimpleNamespace(root=lab.root, console=None, experiments=lab.records)
  assert preflight.elsewhere(lab.config, run, bench, lambda: None).id == run
  assert len(asked) == 3 if leaves else len(asked) > 3
