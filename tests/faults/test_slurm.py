"""Faults of a run under a real Slurm of two nodes on this host.

`pytest -m "kills and slurm"`; needs root and Debian's slurmctld, slurmd, slurm-client and munge.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
from clusters import Slurm
from labs import Lab, same_bits, write_variant
from productions import (
  LONG,
  REPO,
  SLACK,
  attempts_of,
  beat_of,
  events_of,
  kinds,
  processes,
  ranks_of,
  state_of,
  wait_until,
  within,
)

from nmoe.records import checkpoint
from nmoe.records.root import Root

pytestmark = [pytest.mark.faults, pytest.mark.kills, pytest.mark.slurm]
TWO = """
[launch]
engine = "slurm"
ranks_per_node = 1
interface = "lo"
port = 29481
[rdep]
group = 1
[prod]
max_restarts = 1
"""


class Submitted:
  """`nmoe prod launch` of a configuration for Slurm, and its job; a context that cancels it."""

  def __init__(self, folder: Path, slurm: Slurm):
    self.lab, self.slurm = Lab(folder), slurm
    self.file = write_variant(write_variant(self.lab.file, "long", LONG), "slurm", TWO)
    self.root = self.lab.root
    self.env = slurm.env | {"OMP_NUM_THREADS": "1"}
    done = self.nmoe("launch", str(self.file), "--without-evidence", "a test")
    assert done.returncode == 0, done.stdout
    self.job = re.search(r"job (\d+):", done.stdout)[1]
    self.run = next((self.root / "runs").glob("*")).name

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.slurm.say("scancel", "--full", "--signal=KILL", self.job)
    self.slurm.say("scancel", self.job)
    wait_until(lambda: not self.slurm.jobs(f"nmoe-{self.run}"), 30, "the job is gone")
    wait_until(lambda: not list(processes(self.run)), 30, "its processes are gone")

  def nmoe(self, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, "-m", "stages.cli", "prod", *arguments],
      env=self.env,
      cwd=REPO,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=60 * SLACK,
    )

  def beat(self) -> tuple[int, int]:
    """(attempt, step) of the heartbeat."""
    beat = beat_of(self.root, self.run)
    return (beat.attempt, beat.entry.step) if beat else (0, 0)

  def wait_for(self, step: int, attempt: int = 1, limit_s: float = 60) -> float:
    what = f"attempt {attempt}, step {step}"
    return wait_until(lambda: self.beat() >= (attempt, step), limit_s, what)

  def end(self) -> None:
    """Until the job has left the queue."""
    wait_until(lambda: not self.slurm.jobs(f"nmoe-{self.run}"), 60, "the job ends")

  def events(self) -> list[str]:
    return kinds(events_of(self.root, self.run))

  def outcomes(self) -> list[str]:
    return [attempt.outcome for attempt in attempts_of(self.root, self.run)]

  @contextmanager
  def slowed(self) -> Iterator[None]:
    """Its ranks stand still nine tenths of the time: it would end before Slurm looks at it."""
    over = threading.Event()

    def stand() -> None:
      while not over.wait(0.1):
        ranks = ranks_of(self.run)
        send(ranks, signal.SIGSTOP)
        over.wait(0.9)
        send(ranks, signal.SIGCONT)

    thread = threading.Thread(target=stand)
    thread.start()
    try:
      yield
    finally:
      over.set()
      thread.join()

  def rank(self, number: int) -> int:
    """The process of a rank."""
    return next(pid for pid in ranks_of(self.run) if environment(pid)["RANK"] == str(number))

  def rank_of_agent(self, agent: int) -> int:
    return next(pid for pid in ranks_of(self.run) if parent(pid) == agent)

  def state(self) -> str:
    """Of the job; "" once it has left the queue."""
    return next((state for _, state in self.slurm.jobs(f"nmoe-{self.run}")), "")

  def agent(self, node: int) -> int:
    """The process of a node's agent."""
    of = {
      pid: environment(pid).get("SLURM_NODEID")
      for pid, command in processes(self.run)
      if b"stages.launch.agent" in command and b"nmoe.train.loop" not in command
    }
    return next(pid for pid, at in of.items() if at == str(node))


def send(ranks: list[int], number: int) -> None:
  """To those that are still there."""
  for pid in ranks:
    with suppress(ProcessLookupError):
      os.kill(pid, number)


def environment(pid: int) -> dict[str, str]:
  pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
  return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
    yield cluster


def test_a_killed_rank(tmp_path, slurm, undisturbed_hosts):
  """The agents restart both; meanwhile a second launch is refused."""
  with Submitted(tmp_path, slurm) as run:
    run.wait_for(30)
    os.kill(run.rank(1), signal.SIGKILL)
    wait_until(lambda: run.events() == ["launch", "restart"], 15, "Slurm, a killed rank")
    again = run.nmoe("launch", str(run.file), "--without-evidence", "a test")
    assert again.returncode == 1
    assert f"launched already by Slurm's job {run.job}" in " ".join(again.stdout.split())
    run.end()
    assert run.outcomes() == ["completed"]
    assert same_bits(state_of(run.root, run.run), undisturbed_hosts)


def test_a_killed_agent(tmp_path, slurm, undisturbed_hosts):
  """Its rank dies with it; the job is queued again."""
  with Submitted(tmp_path, slurm) as run:
    run.wait_for(30)
    ranks = set(ranks_of(run.run))
    orphan = run.rank_of_agent(agent := run.agent(0))
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: orphan not in ranks_of(run.run), 1, "its rank is gone")
    assert orphan in ranks
    run.wait_for(1, attempt=2, limit_s=60)
    run.end()
    assert run.outcomes() == ["crashed", "completed"]
    assert same_bits(state_of(run.root, run.run), undisturbed_hosts)


def test_a_lost_node(tmp_path, slurm, undisturbed_hosts):
  """Slurm queues the job again by itself; it goes on when the node is back."""
  with Submitted(tmp_path, slurm) as run:
    run.wait_for(30)
    agent = run.agent(1)
    lost = [run.rank_of_agent(agent), agent, *ancestors(agent)]
    slurm.kill("slurmd-n1", signal.SIGKILL)
    for pid in lost:
      os.kill(pid, signal.SIGKILL)
    wait_until(lambda: run.state() == "PENDING", 45, "queued again")
    slurm.start_node("n1")
    run.wait_for(1, attempt=2, limit_s=75)
    run.end()
    assert run.outcomes()[-1] == "completed"
    assert same_bits(state_of(run.root, run.run), undisturbed_hosts)


@pytest.mark.parametrize("how", ["preemption", "time limit"])
def test_preemption(tmp_path, slurm, undisturbed_hosts, how):
  """SIGTERM to the steps: ranks save at the next step, and the job is queued again."""
  with Submitted(tmp_path, slurm) as run:
    run.wait_for(30)
    if how == "preemption":
      slurm.say("scancel", "--signal=TERM", run.job)
      limit_s = 15
    else:
      slurm.say("scontrol", "update", f"jobid={run.job}", "TimeLimit=2")
      limit_s = 60 + 15  # Slurm looks at time limits once a minute
    with run.slowed() if how == "time limit" else nullcontext():
      wait_until(lambda: run.outcomes()[0] == "preempted", limit_s, f"{how}: saved and left")
    if how == "time limit":
      wait_until(lambda: run.state() in ("PENDING", ""), 30, "queued")
      slurm.say("scontrol", "update", f"jobid={run.job}", "TimeLimit=UNLIMITED")
    (stop,) = (e for e in events_of(run.root, run.run) if e.kind == "stop")
    assert stop.step >= 30
    steps = checkpoint.steps(Root(run.root).checkpoints(run.run))
    assert stop.step in steps
    run.end()
    assert run.outcomes() == ["preempted", "completed"]
    assert same_bits(state_of(run.root, run.run), undisturbed_hosts)


def test_stop(tmp_path, slurm):
  """`nmoe prod stop`: it saves, and is not queued again."""
  with Submitted(tmp_path, slurm) as run:
    run.wait_for(30)
    done = run.nmoe("stop", run.run, "--root", str(run.root))
    assert done.returncode == 0, done.stdout
    wait_until(lambda: run.outcomes() == ["stopped"], 15, "saved and left")
    run.end()
    time.sleep(3)
    assert slurm.jobs(f"nmoe-{run.run}") == [] and run.outcomes() == ["stopped"]
    assert checkpoint.steps(Root(run.root).checkpoints(run.run))[-1] >= 30


def test_what_sbatch_says_of_the_script(tmp_path, slurm):
  """`sbatch --test-only` takes it, and refuses it with a word that is wrong."""
  with Submitted(tmp_path, slurm) as run:
    script = Root(run.root).prod(run.run) / "job.sbatch"
    test = ["sbatch", "--test-only"]
    done = subprocess.run([*test, script], env=slurm.env, capture_output=True, text=True)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    wrong = script.with_name("wrong.sbatch")
    for before, after in (("#SBATCH --nodes=2", "#SBATCH --nods=2"), ("=2\n", "=9\n")):
      wrong.write_text(script.read_text().replace(before, after, 1))
      done = subprocess.run([*test, wrong], env=slurm.env, capture_output=True, text=True)
      assert done.returncode != 0, after


def test_a_preflight_is_a_job(tmp_path, slurm):
  """`nmoe prod check` of a configuration for Slurm runs where the run will, and is evidence."""
  lab = Lab(tmp_path)
  file = write_variant(write_variant(lab.file, "long", LONG), "slurm", TWO)
  begun = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", "stages.cli", "prod", "check", str(file)],
    env=slurm.env | {"OMP_NUM_THREADS": "1"},
    cwd=REPO,
    capture_output=True,
    text=True,
    timeout=60 * SLACK,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  within(begun, 30, "a check by Slurm, from command to verdict")
  (check,) = (one for one in lab.records.list() if one.stage == "check")
  (run,) = lab.records.runs(check.id)
  assert check.verdict == "confirmed" and len(run.results["ranks"]) == 2
  assert "sums of gradients" in done.stdout


def ancestors(pid: int) -> list[int]:
  """The parents of a process up to Slurm's stepd, which it has by itself."""
  found = []
  while (above := parent(pid)) > 1:
    found.append(above)
    if "slurmstepd" in Path(f"/proc/{above}/comm").read_text():
      break
    pid = above
  return found


def parent(pid: int) -> int:
  return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
