"""Faults of a run on two hosts: two agents in network namespaces, with real ranks.

`pytest -m "kills and netns"`; needs root, and ip and unshare (Debian: iproute2).
"""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import Namespaces
from labs import Lab, same_bits, write_variant
from productions import (
  FAULTS,
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
from rich.console import Console

from nmoe.config import file as configs
from stages.prod import hosts, launching, preflight
from stages.prod.attempt import begin, settle

pytestmark = [pytest.mark.faults, pytest.mark.kills, pytest.mark.netns]
TWO = f"""
[launch]
engine = "slurm"
ranks_per_node = 1
interface = "{Namespaces.interface}"
[rdep]
group = 1
"""


class TwoHosts:
  """A recorded run and its agents, one a host; a context that ends what lives."""

  def __init__(self, folder: Path, network: Namespaces, body: str = ""):
    self.lab, self.network = Lab(folder), network
    self.file = write_variant(write_variant(self.lab.file, "long", LONG), "two", TWO)
    if body:
      self.file = write_variant(self.file, "changed", body)
    self.root = self.lab.root
    launching.launch(self.file, Console(file=io.StringIO()), "a test", dry_run=True)
    self.run = next((self.root / "runs").glob("*")).name
    self.config = configs.load(self.file, env={})
    self.attempt = begin(self.root, self.run, "slurm", nodes=["h0", "h1"])
    self.agents: list[subprocess.Popen] = []

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for agent in self.agents:
      agent.kill()
      agent.wait()
    wait_until(lambda: not list(processes(self.run)), 10, "ranks end with their agents")

  def start(self, of_host_1: str = "", attempt: int | None = None, **env: str) -> None:
    """Both agents; FAULT on the second host; env over what `prod node` sets. attempt 0: they check
    the hosts.
    """
    attempt = self.attempt if attempt is None else attempt
    given = hosts.environment(self.config, self.root) | {"OMP_NUM_THREADS": "1"} | env
    given["PYTHONPATH"] = os.pathsep.join((str(FAULTS), given["PYTHONPATH"]))
    head = f"{self.network.addresses[0]}:29471"
    for host in (0, 1):
      place = ["--root", self.root, "--run", self.run, "--attempt", attempt, "--nodes", 2]
      place += ["--node", host, "--head", head, "--address", self.network.addresses[host]]
      command = [sys.executable, "-P", "-m", "stages.launch.agent", *map(str, place)]
      log = (self.root / f"agent_{host}.txt").open("w")
      self.agents.append(
        subprocess.Popen(
          [*self.network.prefix(host), *command],
          env=given | {"FAULT": of_host_1 if host else ""},
          cwd=REPO,
          stdout=log,
          stderr=log,
        )
      )

  def step(self) -> int:
    beat = beat_of(self.root, self.run)
    return beat.entry.step if beat else 0

  def wait_for(self, step: int) -> None:
    wait_until(lambda: self.step() >= step, 60, f"step {step}")

  def events(self) -> list[str]:
    return kinds(events_of(self.root, self.run))

  def end(self) -> int:
    """The exit status that the attempt gives the engine."""
    for host, agent in enumerate(self.agents):
      assert agent.wait(60 * SLACK) == 0, (self.root / f"agent_{host}.txt").read_text()
    return settle(self.root, self.run, self.attempt).status

  def rank(self, number: int) -> int:
    """The process of a rank, in this host's numbers: its network tells it."""
    here = {pid: os.stat(f"/proc/{pid}/ns/net").st_ino for pid in ranks_of(self.run)}
    wanted = os.stat(f"/run/netns/{self.network.names[number]}").st_ino
    return next(pid for pid, network in here.items() if network == wanted)


@pytest.fixture
def network():
  with Namespaces() as two:
    yield two


def test_a_killed_rank(tmp_path, network, undisturbed_hosts):
  """Only rank 0 opens a database meanwhile."""
  with TwoHosts(tmp_path, network) as run:
    run.start(of_host_1="no sqlite")
    run.wait_for(30)
    os.kill(run.rank(1), signal.SIGKILL)
    wait_until(lambda: run.events() == ["launch", "restart"], 15, "two agents, a killed rank")
    assert run.end() == 0
    assert same_bits(state_of(run.root, run.run), undisturbed_hosts)


def test_a_cut_network(tmp_path, network, undisturbed_hosts):
  """Both hosts notice at their deadline; they go on when the wire is back."""
  with TwoHosts(tmp_path, network, "[rdep]\ndeadline_s = 8.0\n") as run:
    run.start()
    run.wait_for(30)
    network_cut = time.monotonic()
    network.cut(12)
    wait_until(lambda: "restart" in run.events(), 40, "trains again, from the wire's return")
    within(network_cut, 60, "trains again, from the cut")
    assert run.end() == 0
    assert same_bits(state_of(run.root, run.run), undisturbed_hosts)


@pytest.mark.parametrize(
  "fault", ["says: GPUs=7", "says: processor=NVIDIA H100", "says: torch=2.12.0", "no target"]
)
def test_a_host_that_is_another(tmp_path, network, fault):
  """A host is named before anything is allocated, and the run is not tried again."""
  with TwoHosts(tmp_path, network) as run:
    begun = time.monotonic()
    run.start(of_host_1=fault)
    assert run.end() == 76
    within(begun, 20, f"{fault}: refused, from the start of the agents")
    (attempt,) = attempts_of(run.root, run.run)
    (refused,) = events_of(run.root, run.run)
    assert (attempt.outcome, refused.kind, run.step()) == ("refused", "refused", 0)
    assert "h1" in refused.detail["error"] and str(tmp_path) not in refused.detail["error"]


@pytest.mark.parametrize("fault", ["", "no locks"])
def test_locks_that_hold_on_one_host_only(tmp_path, network, fault):
  """`prod check` names the host that took a lock which another held, and says what to do."""
  with TwoHosts(tmp_path, network) as run:
    begun = time.monotonic()
    run.start(of_host_1=fault, attempt=0)
    for agent in run.agents:
      assert agent.wait(60 * SLACK) == 0
    within(begun, 25, f"a check of two hosts, {fault or 'no fault'}")
    told = run.lab.run(run.run).results["ranks"]
    assert [one["host"] for one in told] == ["h0", "h1"]
    assert all(one["sum_gb_s"] > 0 and one["write_gb_s"] > 0 for one in told)
    faults = [one.fault for one in preflight.judged(told, 0) if one.fault]
    if fault:
      assert len(faults) == 1 and faults[0].startswith("rank 1 on h1 took a lock that rank 0 held")
      assert "mount with -o flock" in faults[0]
    else:
      assert faults == []
