"""Ranks and commands that are killed, stopped or interrupted: named at once, nobody left behind."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
from labs import write_variant

from nmoe.config.file import changed
from nmoe.records.reader import Reader
from nmoe.records.root import Root
from stages.launch import local as launch
from stages.launch.local import Job, Launcher

pytestmark = pytest.mark.faults
SLACK = 6  # of a machine that others use too
HERE = Path(__file__).parents[1] / "faults"
TWO = {"launch__ranks": 2, "train__micro_batch": 4, "rdep__deadline_s": 6.0}


@pytest.fixture
def odd(lab, monkeypatch):
  """A run of two ranks, of which one has a fault; its ended handle and how long it took."""
  monkeypatch.setattr(launch, "GRACE_S", 2.0)
  monkeypatch.setenv("PYTHONPATH", str(HERE))

  def run(fault: str, **values):
    monkeypatch.setenv("ODD", fault)
    keys = TWO | values
    run_id = lab.record(**keys)
    config = changed(lab.config, {key.replace("__", "."): value for key, value in keys.items()})
    begun = time.monotonic()
    handle = launch.run(Launcher(lab.root), Job(run_id, config, "odd_rank"))
    lab.records.mark_interrupted()
    return handle, lab.run(run_id), time.monotonic() - begun

  return run


def test_a_rank_that_is_stopped_in_its_checkpoint(odd):
  """The other one misses it at the deadline and leaves, whatever its checkpoint's thread waits for
  (900 s for the lost rank's part); the stopped one is killed.
  """
  handle, run, seconds = odd("1:stopped in its checkpoint")
  assert handle.poll() == 1 and handle.failure == "rank 0 of 2 ended with exit status 1"
  assert run.status == "failed"
  assert re.search("rank 1 did not come|another rank stopped or was late", run.error)
  assert seconds < (6 + 2) * SLACK
  assert handle.ranks[1].returncode == -signal.SIGKILL


def test_a_rank_killed_at_the_start_is_named(odd):
  """Long before the other one would miss it."""
  handle, run, seconds = odd(f"1:{int(signal.SIGKILL)}", rdep__deadline_s=120.0)
  assert handle.failure == "rank 1 of 2 was killed by SIGKILL"
  assert handle.tail().startswith(handle.failure)
  assert seconds < 10 * SLACK and run.status in ("failed", "interrupted")


def test_a_rank_that_never_comes_is_missed_at_the_deadline(odd):
  """By an error of ours that says so, not by torch's own words alone."""
  handle, run, _ = odd(f"1:{int(signal.SIGSTOP)}", rdep__deadline_s=3.0)
  assert handle.poll() == 1 and run.status == "failed"
  assert re.match(r"rank 0 of 2: another rank did not come \(.*\): see its log", run.error)


def test_a_rank_that_gets_sigint_is_interrupted(odd):
  handle, run, _ = odd("0:interrupted", launch__ranks=1, train__micro_batch=8)
  assert handle.failure == "rank 0 of 1 was killed by SIGINT"
  assert (run.status, run.error) == ("interrupted", "rank 0 got SIGINT")


def test_ranks_of_one_host_listen_on_its_loopback_alone(odd):
  handle, run, _ = odd("-:listening")
  assert run.status == "completed", handle.tail()
  logs = "".join(log.read_text() for log in handle.logs.glob("rank_*.txt"))
  assert logs.count("listens on ['0100007F'] by lo\n") == 2  # 127.0.0.1


def test_a_meeting_place_that_a_kill_left_goes_with_the_next_start(lab, monkeypatch):
  run = lab.record()
  left = Path(tempfile.mkdtemp(prefix=f"nmoe-{run}-"))
  (left / "rendezvous").write_text("processes that are dead")
  monkeypatch.setattr(launch, "child_command", lambda *_: [sys.executable, "-c", "pass"])
  launch.run(Launcher(lab.root), Job(run, lab.config))
  assert not list(left.parent.glob(f"nmoe-{run}-*"))


# --- the command ---


def command(lab, *words: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "stages.cli", *words],
    cwd=Path(__file__).parents[2],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def processes_of(root: Path) -> list[int]:
  """Of this root, the command itself left out: by their command lines."""
  found = []
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
      continue
    if "stages.launch.child" in words and (str(root) in words or "nmoe.train.worker" in words):
      if f"{root}" in Path(path.parent / "environ").read_bytes().decode(errors="replace"):
        found.append(int(path.parent.name))
  return found


def wait_for(condition, seconds: float) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.fixture
def long(lab, monkeypatch):
  """A configuration of a run of minutes, and the environment by which its ranks are known."""
  monkeypatch.setenv("ODD_ROOT", str(lab.root))
  text = lab.file.read_text()
  lab.file.write_text(text.replace("total_tokens = 6144", "total_tokens = 61440000"))
  return lab.file


LONG = {  # what is typed
  "research": "research run tiny.toml --seeds 1",
  "ablate": "ablate tiny.toml variant.toml --seeds 1",
  "bench": "bench step tiny.toml --steps 100000",
  "resume": "check resume tiny.toml --steps 100000",
  "ep": "check ep tiny.toml --ranks 1,2 --steps 100000",
}
INT, TERM = signal.SIGINT, signal.SIGTERM
INTERRUPTED = [("research", INT, 0.0), ("research", INT, 1.0), ("research", TERM, 1.0)]
INTERRUPTED += [("ablate", TERM, 0.5), ("bench", INT, 1.0), ("resume", TERM, 1.0), ("ep", INT, 1.0)]


@pytest.mark.parametrize(("name", "number", "after_s"), INTERRUPTED)
def test_a_command_that_is_interrupted_says_by_what_and_leaves_nobody(
  lab, long, name, number, after_s
):
  """With the exit status that shells expect: 128 + the signal."""
  write_variant(lab.file, "variant", "[moe]\ntop_k = 3\n")
  words = (str(lab.file.parent / w) if w.endswith("toml") else w for w in LONG[name].split())
  running = command(lab, *words)
  wait_for(lambda: processes_of(lab.root), 30 * SLACK)
  time.sleep(after_s)
  running.send_signal(number)
  out, _ = running.communicate(timeout=20 * SLACK)
  assert running.returncode == 128 + number and "Traceback" not in out, out
  again = "continues it" if name in ("research", "ablate") else "starts all runs anew"
  assert f"the same command {again}: it was told to" in " ".join(out.split())
  assert processes_of(lab.root) == []
  with closing(Reader(lab.root)) as reader:
    newest = reader.list()[0]
    assert newest.status == "interrupted"
    assert {run.status for run in reader.runs(newest.id)} == {"interrupted"}


def test_records_of_a_command_that_was_killed_read_interrupted(lab, long):
  """Its runs and its experiment, without a writer's help; its rank ends with it."""
  running = command(lab, "research", "run", str(long), "--seeds", "1")
  with closing(Reader(lab.root)) as reader:

    def trains() -> bool:
      newest = reader.list()[0]
      runs = reader.runs(newest.id)
      at_step = [run for run in runs if any(Root(lab.root).checkpoints(run.id).glob("step_*"))]
      return newest.status == "running" and bool(at_step)

    wait_for(trains, 30 * SLACK)
    running.kill()
    running.communicate()
    wait_for(lambda: not processes_of(lab.root), 10 * SLACK)
    newest = reader.list()[0]
    assert newest.status == "interrupted"
    assert [run.status for run in reader.runs(newest.id)] == ["interrupted"]
