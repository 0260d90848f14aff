"""Faults of a production run on one host, with real agents and ranks: the end is the same bits.

`pytest -m kills`. Limits are those of two quiet cores, doubled by SLACK for a busy machine.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labs import Lab, open_lab, same_bits, write_variant

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.records import checkpoint
from nmoe.records.attempts import Event, History
from nmoe.records.root import Root
from nmoe.train.progress import Heartbeat
from stages.launch import local
from stages.launch.local import Job, Launcher

pytestmark = [pytest.mark.faults, pytest.mark.kills]
SLACK = 6  # this machine is shared
HERE = Path(__file__).parent
STEPS = 300
LONG = f"""
[schedule]
batch_tokens = 1024
total_tokens = {STEPS * 1024}
[train]
checkpoint_every = 20
log_every = 1
[launch]
ranks = 2
hang_s = 60.0
[rdep]
deadline_s = 30.0
[prod]
max_restarts = 2
stale_s = 30.0
"""


class Production:
  """`nmoe prod launch` of a small configuration, in a process of its own."""

  def __init__(self, folder: Path, body: str = "", **env: str):
    self.lab = Lab(folder)
    self.file = write_variant(self.lab.file, "long", LONG)
    if body:
      self.file = write_variant(self.file, "changed", body)
    self.root = self.lab.root
    self.env = dict(os.environ) | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | env
    self.begun = time.monotonic()
    self.process = self.start()

  def start(self) -> subprocess.Popen:
    command = [sys.executable, "-m", "stages.cli", "prod", "launch", str(self.file)]
    return subprocess.Popen(
      [*command, "--without-evidence", "a test"],
      env=self.env,
      cwd=HERE.parents[1],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def run_id(self) -> str:
    folders = list((self.root / "runs").glob("*")) if (self.root / "runs").is_dir() else []
    return folders[0].name if folders else ""

  def wait_for(self, step: int) -> Heartbeat:
    """Until a step is logged."""
    deadline = time.monotonic() + 60 * SLACK
    while time.monotonic() < deadline:
      assert self.process.poll() is None, self.process.stdout.read()
      beat = Heartbeat.read(Root(self.root).heartbeat(self.run_id())) if self.run_id() else None
      if beat is not None and beat.entry.step >= step:
        return beat
      time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")

  def rank(self, number: int) -> int:
    """The process of a rank; rank 0 is the one that writes the heartbeat."""
    beat = Heartbeat.read(Root(self.root).heartbeat(self.run_id()))
    if number == 0:
      return beat.pid
    return next(pid for pid in ranks_of(self.run_id()) if pid != beat.pid)

  def end(self) -> tuple[int, str]:
    """(exit status, what it printed)."""
    out, _ = self.process.communicate(timeout=120 * SLACK)
    assert ranks_of(self.run_id()) == [], "a rank outlives the launch"
    return self.process.returncode, out

  def events(self) -> list[Event]:
    records = History(self.root)
    found = records.events(self.run_id())
    records.close()
    return [event for event in found if event.kind not in ("override", "permanent")]

  def state(self):
    folder = Root(self.root).checkpoints(self.run_id())
    return checkpoint.read(folder / f"step_{STEPS:08d}")


def ranks_of(run_id: str) -> list[int]:
  """The processes that train a run."""
  found = []
  for entry in Path("/proc").glob("[0-9]*"):
    try:
      command = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
      continue
    if b"nmoe.train.loop" in command and run_id.encode() in command:
      found.append(int(entry.name))
  return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The final state of the same run without agents and faults."""
  with open_lab(tmp_path_factory.mktemp("undisturbed")) as lab:
    config = configs.load(write_variant(lab.file, "long", LONG), env={})
    values = {"launch.ranks": 2, "schedule.batch_tokens": 1024, "train.checkpoint_every": 20}
    values |= {"schedule.total_tokens": STEPS * 1024}
    run = lab.record(**{key.replace(".", "__"): value for key, value in values.items()})
    handle = local.run(Launcher(lab.root), Job(run, changed(config, {})))
    assert handle.poll() == 0, handle.tail()
    return lab.state(run, STEPS)


def check_equal(production: Production, undisturbed) -> None:
  assert same_bits(production.state(), undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(tmp_path, undisturbed, rank):
  """The agent restarts both from the newest checkpoint; no attempt is lost."""
  production = Production(tmp_path)
  production.wait_for(30)
  os.kill(production.rank(rank), signal.SIGKILL)
  killed = time.monotonic()
  while [event.kind for event in production.events()] != ["launch", "restart"]:
    assert time.monotonic() - killed < 15 * SLACK
    time.sleep(0.1)
  code, out = production.end()
  assert code == 0, out
  launch, restart = production.events()
  assert launch.step == 0 and restart.step >= 20 and restart.step % 20 == 0
  assert "1 attempts, 1 restarts" in out
  check_equal(production, undisturbed)


def test_a_rank_that_hangs(tmp_path, undisturbed):
  """Its own deadline ends it, with the stacks of its threads in its log."""
  production = Production(tmp_path, "[launch]\nhang_s = 8.0\n")
  production.wait_for(30)
  os.kill(production.rank(1), signal.SIGUSR1)
  code, out = production.end()
  assert code == 0, out
  assert [event.kind for event in production.events()] == ["launch", "restart"]
  logs = Root(production.root).logs(production.run_id()).rglob("stderr.log")
  hung = [log.read_text() for log in logs if "Timeout (0:00:08)!" in log.read_text()]
  assert any("sitecustomize.py" in text for text in hung)  # the line that sleeps
  detail = production.events()[-1].detail
  assert detail["suspect"] == 1 and "sitecustomize.py" in detail["why"]
  check_equal(production, undisturbed)


def test_a_stopped_rank(tmp_path, undisturbed):
  """SIGSTOP: its peer misses it at the deadline; the agent replaces both."""
  production = Production(tmp_path, "[rdep]\ndeadline_s = 6.0\n")
  production.wait_for(30)
  os.kill(production.rank(1), signal.SIGSTOP)
  code, out = production.end()
  assert code == 0, out
  assert "restart" in [event.kind for event in production.events()]
  check_equal(production, undisturbed)


def test_crash_after_crash_without_progress(tmp_path):
  """Three attempts, then it is given up, never to be queued again."""
  production = Production(tmp_path, "[prod]\nmax_restarts = 0\n", FAULT="crash")
  code, out = production.end()
  assert code == 76
  assert "no progress: 3 attempts in a row ended without a newer checkpoint" in out
  assert "planted" in out
  records = History(production.root)
  outcomes = [attempt.outcome for attempt in records.attempts(production.run_id())]
  records.close()
  assert outcomes == ["crashed", "crashed", "no progress"]


def test_divergence_is_final(tmp_path):
  production = Production(tmp_path, "[optim]\ndense_lr = 1e30\nexpert_lr = 1e30\n")
  code, out = production.end()
  assert code == 76 and "diverged: step" in out
  kinds = [event.kind for event in production.events()]
  assert kinds == ["launch", "bad step", "restart", "bad step", "diverged"]


def test_preemption(tmp_path, undisturbed):
  """SIGTERM to the launch: ranks save at the next step; the same command goes on."""
  production = Production(tmp_path)
  production.wait_for(30)
  production.process.terminate()
  code, out = production.end()
  assert code == 75 and "preempted" in out
  stop = production.events()[1]
  assert stop.kind == "stop" and stop.step >= 30
  production.process = production.start()
  code, out = production.end()
  assert code == 0 and f"goes on from step {stop.step}" in out
  check_equal(production, undisturbed)


def test_stop_and_go(tmp_path, undisturbed):
  """`nmoe prod stop`: exit 0, not queued again; launched again it goes on."""
  production = Production(tmp_path)
  production.wait_for(30)
  told = [sys.executable, "-m", "stages.cli", "prod", "stop", production.run_id()]
  subprocess.run([*told, "--root", str(production.root)], check=True, cwd=HERE.parents[1])
  code, out = production.end()
  assert code == 0 and "stopped: it was told to leave" in out
  production.process = production.start()
  assert production.end()[0] == 0
  check_equal(production, undisturbed)


def test_a_second_launch_is_refused(tmp_path, undisturbed):
  """It names who holds the run; the first is undisturbed."""
  production = Production(tmp_path)
  production.wait_for(30)
  second = production.start()
  out, _ = second.communicate(timeout=30 * SLACK)
  assert second.returncode == 1
  pattern = (
    rf"launched already by \S+ pid {production.process.pid} \(attempt 1, heartbeat \d+ s ago"
  )
  assert re.search(pattern, " ".join(out.split())), out
  assert production.end()[0] == 0
  check_equal(production, undisturbed)


def test_a_killed_launch(tmp_path, undisturbed):
  """kill -9 of the command: agent and ranks end with it; the same command goes on."""
  production = Production(tmp_path)
  production.wait_for(30)
  run = production.run_id()
  production.process.kill()
  deadline = time.monotonic() + 10 * SLACK
  while ranks_of(run):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  production.process = production.start()
  assert production.end()[0] == 0
  check_equal(production, undisturbed)
