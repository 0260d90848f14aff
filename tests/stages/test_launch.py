"""The launcher: with runs where the process matters, with small scripts where it does not."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from labs import same_bits
from rich.console import Console

from nmoe.config.file import changed
from nmoe.records.root import Root
from nmoe.train.progress import Entry, Progress
from stages.interrupts import Terminated, interruptible
from stages.launch import display
from stages.launch import local as launch
from stages.launch.local import Job, Launcher

ENTRY = "Entry(1, 9, 2.0, 3.0, 4.0)"


def test_interrupted_and_finished(lab):
  """Ctrl-C while it trains: the child saves its state and leaves; the next one goes on from it."""
  run, whole = lab.record(), lab.record()
  seen = []

  def stop(entry):
    seen.append(entry.step)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    launch.run(Launcher(lab.root), Job(run, lab.config), stop)
  assert seen[0] == 1
  assert lab.run(run).status == "interrupted"
  assert lab.attempt(run) == lab.attempt(whole) == 0
  assert same_bits(lab.state(run), lab.state(whole))
  (line,) = (Root(lab.root).logs(run) / "rank_0.txt").read_text().splitlines()  # and no noise
  assert line.startswith("step 1/12  loss ") and line.endswith(" left")


PARENT = """
import os, sys
from pathlib import Path
from nmoe.config import file as configs
from stages.launch.local import Job, Launcher, run
root, run_id, toml, saved = sys.argv[1:]
config = configs.loads(Path(toml).read_text(), env={})
die = lambda _: any(Path(saved).glob("step_*")) and os.kill(os.getpid(), 9)
run(Launcher(Path(root)), Job(run_id, config), idle=die)
"""


@pytest.mark.faults
def test_a_run_whose_parent_is_killed_saves_and_leaves(lab, tmp_path):
  """At once, however rarely it logs: no step of this run writes to the pipe."""
  values = {"schedule__total_tokens": 40_000 * 512, "train__log_every": 50_000}
  run = lab.record(**values)
  toml = tmp_path / "run.toml"
  toml.write_text(lab.run(run).toml)
  arguments = [str(lab.root), run, str(toml), str(lab.checkpoints(run))]
  parent = subprocess.run([sys.executable, "-c", PARENT, *arguments], timeout=90)
  assert parent.returncode == -signal.SIGKILL
  deadline = time.monotonic() + 20
  while lab.records.run(run).status == "running" and time.monotonic() < deadline:
    time.sleep(0.1)
    lab.records.mark_interrupted()
  assert lab.run(run).status == "interrupted"
  assert lab.checkpoints(run).is_dir()


@pytest.fixture
def scripts(lab, monkeypatch):
  """Children that run a given line of Python in place of nmoe.train.loop."""

  def use(*lines: str):
    def command(module, arguments):
      rank = int(arguments[arguments.index("--rank") + 1])
      fd = arguments[arguments.index("--progress") + 1]
      head = f"from nmoe.train.progress import Entry, Progress; progress = Progress({fd})\n"
      return [sys.executable, "-c", head + lines[rank]]

    monkeypatch.setattr(launch, "child_command", command)
    return changed(lab.config, {"launch.ranks": len(lines), "schedule.batch_tokens": 1024})

  return use


def start(lab, config, **more):
  return launch.run(Launcher(lab.root), Job("r", config), **more)


SLEEP = "import time; time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


@pytest.mark.faults
def test_what_is_printed_is_not_progress(lab, scripts):
  """Whatever the code under study prints goes to the log, JSON or not."""
  config = scripts(
    "print('{'); print('{\"step\": 1}'); print({'loss': 1.0}, flush=True)\n"
    f"progress.tell({ENTRY}._asdict())"
  )
  entries = []
  handle = start(lab, config, follow=entries.append)
  assert handle.poll() == 0 and entries == [Entry(1, 9, 2.0, 3.0, 4.0)]
  assert handle.tail().endswith("rank_0.txt:\n{\n{\"step\": 1}\n{'loss': 1.0}\n")


def test_the_first_failure_is_the_status(lab, scripts):
  handle = start(lab, scripts("import sys; sys.exit(3)", "pass"))
  assert handle.poll() == 3 and handle.failure == "rank 0 of 2 ended with exit status 3"


@pytest.mark.faults
def test_a_killed_rank_is_named_at_once(lab, scripts, monkeypatch):
  """Also one that is not rank 0, while the others go on; then they have GRACE_S."""
  monkeypatch.setattr(launch, "GRACE_S", 1.0)
  config = scripts(STUBBORN, "import os, time; time.sleep(1); os.kill(os.getpid(), 9)")
  named, begun = [], time.monotonic()

  def idle(handle):
    if handle.failure and not named:
      named.append((handle.failure, time.monotonic() - begun))

  handle = start(lab, config, idle=idle)
  (failure, at_s), ended_s = named[0], time.monotonic() - begun
  assert failure == "rank 1 of 2 was killed by SIGKILL"
  assert at_s < 1 + 2 + 2  # the sleep, the interpreter's start on a busy machine, the promise
  assert 1.0 <= ended_s - at_s < 5
  assert handle.poll() == -signal.SIGKILL


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, 40])
def test_what_killed_a_rank_is_said_by_its_name(lab, scripts, number):
  """A real-time signal has none."""
  handle = start(lab, scripts(f"import os; os.kill(os.getpid(), {int(number)})"))
  name = "signal 40" if number == 40 else signal.Signals(number).name
  assert handle.failure == f"rank 0 of 1 was killed by {name}" and handle.poll() == -number


@pytest.mark.faults
def test_a_stopped_rank_does_not_outlive_the_others(lab, scripts, monkeypatch):
  """SIGSTOP: it answers nothing but SIGKILL."""
  monkeypatch.setattr(launch, "GRACE_S", 0.3)
  config = scripts("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "exit(4)")
  begun = time.monotonic()
  assert start(lab, config).poll() == 4
  assert time.monotonic() - begun < 20


def test_sigterm_stops_the_children(lab, scripts):
  """Sent to the launcher, it is passed on and raised there as an interrupt."""
  told = lab.root / "told"
  config = scripts(
    "import signal, time\n"
    f"signal.signal(signal.SIGTERM, lambda *_: (open({str(told)!r}, 'w').close(), exit(75)))\n"
    f"progress.tell({ENTRY}._asdict()); time.sleep(60)"
  )
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Terminated), interruptible():
    start(lab, config, follow=lambda _: os.kill(os.getpid(), signal.SIGTERM))
  assert told.exists()
  assert signal.getsignal(signal.SIGTERM) is before


def test_kill_at(lab, scripts):
  lines = "import time\nfor s in range(1, 9): progress.tell(dict(Entry(s, 9, 1, 1, 1)._asdict()))\n"
  config = scripts(lines + "time.sleep(60)")
  seen = []
  handle = launch.run(Launcher(lab.root), Job("r", config, kill_at=5), seen.append)
  assert handle.poll() == -signal.SIGKILL and 5 in [entry.step for entry in seen]


@pytest.mark.faults
def test_no_child_outlives_an_error_here(lab, scripts):
  config = scripts(
    f"import os; progress.tell(dict(Entry(os.getpid(), 1, 1, 1, 1)._asdict()))\n{SLEEP}"
  )
  pids = []

  def fail(entry):
    pids.append(entry.step)
    raise ValueError("here")

  with pytest.raises(ValueError, match="here"):
    start(lab, config, follow=fail)
  assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.faults
def test_every_start_has_a_meeting_place_of_its_own(lab, monkeypatch):
  """Nothing of an earlier start is found there, and nothing of this one stays."""
  places = []

  def command(module, arguments):
    places.append(arguments[arguments.index("--rendezvous") + 1])
    return [sys.executable, "-c", "pass"]

  monkeypatch.setattr(launch, "child_command", command)
  for _ in range(2):
    start(lab, lab.config)
  assert len(set(places)) == 2
  folders = [Path(place.removeprefix("file://")).parent for place in places]
  assert not any(folder.exists() for folder in folders)


@pytest.mark.faults
def test_nothing_of_the_current_folder_is_imported(lab, tmp_path, monkeypatch):
  (tmp_path / "numpy.py").write_text("raise SystemExit('a stray module was imported')")
  monkeypatch.chdir(tmp_path)
  run = lab.record()
  handle = launch.run(Launcher(lab.root), Job(run, lab.config))
  assert handle.poll() == 0, handle.tail()


@pytest.mark.parametrize("told", ["", "300000"])
def test_threads_that_wait_sleep_soon_unless_told_otherwise(lab, monkeypatch, told):
  """Those that spun made four steps beside six other processes on two cores 22 s, and not 2.5."""
  monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
  if told:
    monkeypatch.setenv("GOMP_SPINCOUNT", told)
  env = launch.child_environment(lab.root, lab.config)
  assert env["GOMP_SPINCOUNT"] == (told or launch.SPINS)


@pytest.mark.faults
def test_a_full_pipe_stops_no_rank():
  """Its reader is stopped (Ctrl-Z): messages are lost, each whole; one that is gone is noticed."""
  read, write = os.pipe()
  progress = Progress(write)
  done = threading.Thread(target=lambda: [progress.tell({"step": i}) for i in range(20_000)])
  done.start()
  done.join(20)
  assert not done.is_alive()
  assert os.read(read, 1 << 20).endswith(b"}\n")
  os.close(read)
  assert not progress.tell({"step": 0})
  os.close(write)


def test_tail_is_the_end_of_every_rank(lab):
  handle = launch.Handle(Job("r", lab.config), Root(lab.root).logs("r"), print)
  logs = handle.logs
  assert handle.tail() == ""
  logs.mkdir(parents=True)
  (logs / "rank_0.txt").write_text("".join(f"line {i}\n" for i in range(50)))
  (logs / "rank_1.txt").write_bytes(b"not \xff UTF-8\n")
  (logs / "rank_2.txt").write_text("\n")
  text = handle.tail(lines=2)
  assert text == f"{logs}/rank_0.txt:\nline 48\nline 49\n\n{logs}/rank_1.txt:\nnot \ufffd UTF-8\n"


def test_without_a_terminal_a_run_prints_plain_lines(monkeypatch):
  """The first step, the last, and what is known every LINE_S, also while nothing is logged."""
  now = [100.0]
  monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
  out = io.StringIO()
  with display.Display(Console(file=out, width=40)) as shown:
    line = shown.line("an arm with a long name seed 0", 90, "starting")
    for second in range(0, 60):
      now[0] = 100.0 + second
      if second == 25:
        line.follow(Entry(1, 90, 5.25, 1234.5, 89.4))
      elif second == 26:
        line.follow(Entry(2, 90, 5.0, 1234.5, 88.0))
      else:
        line.idle()
    line.follow(Entry(90, 90, 3.0, 1000.0, 0.0))
    line.end("completed")
  label = "an arm with a long name seed 0: "
  assert out.getvalue().replace(label, "").splitlines() == [
    "starting  (20 s ago)",
    "step 1/90  loss 5.2500  1,234 tokens/s  0:01:29 left",
    "step 2/90  loss 5.0000  1,234 tokens/s  0:01:28 left  (19 s ago)",
    "step 90/90  loss 3.0000  1,000 tokens/s",
    "completed",
  ]


def test_what_a_run_does_after_its_last_step_is_said(monkeypatch):
  """Its profile, which took a minute, was "0:00:00 left  (60 s ago)"."""
  now, out = [100.0], io.StringIO()
  monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
  with display.Display(Console(file=out, width=40)) as shown:
    line = shown.line("x", 2, "starting")
    line.follow(Entry(2, 2, 5.0, 1234.5, 0.0))
    for state in ("stepping", "profiling", "profiling", "stopping", "stepping"):
      line.idle("", state)
      now[0] += 25
      line.idle("", state)
  said, last = out.getvalue().splitlines(), "x: step 2/2  loss 5.0000  1,234 tokens/s"
  assert said == [
    last,
    f"{last}  (25 s ago)",
    f"{last}, writes its profile  (25 s)",
    f"{last}, writes its profile  (50 s)",
    f"{last}, writes its end  (25 s)",
    f"{last}  (125 s ago)",
  ]


def test_a_rank_tells_each_change_of_its_state(lab, scripts, monkeypatch):
  """Once, and not the steps between; the launcher shows them while the ranks live."""
  config = scripts(
    "import time\n"
    "for state in ('stepping', 'stepping', 'saving', 'saving', 'stopping'):\n"
    "  progress.enter(state)\n"
    "  time.sleep(0.5)\n"
  )
  seen, told = [], []

  class Handle(launch.Handle):
    def __setattr__(self, name, value):
      super().__setattr__(name, value)
      if name == "state":
        told.append(value)

  monkeypatch.setattr(launch, "Handle", Handle)
  assert start(lab, config, idle=lambda handle: seen.append(handle.state)).poll() == 0
  assert told == ["", "stepping", "saving", "stopping"]
  assert set(seen) == set(told)


def test_a_log_holds_the_same_lines(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr("nmoe.train.progress.time.monotonic", lambda: now[0])
  progress = Progress()
  for step in range(1, 61):
    now[0] = step
    assert progress.log(Entry(step, 60, 1.0, 2.0, 3.0), tell=False)
  lines = capsys.readouterr().err.splitlines()
  assert [line.split()[1] for line in lines] == ["1/60", "21/60", "41/60", "60/60"]
