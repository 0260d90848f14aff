"""What the pods of a JobSet do, each as process 1 of its own process namespace on this host; the
controller that restarts them is played here.

`pytest -m "kills and netns"`; needs root. Not run anywhere here: the JobSet's own controller.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from labs import Lab, same_bits, write_variant
from productions import (
  LONG,
  REPO,
  agent_of,
  attempts_of,
  beat_of,
  events_of,
  kinds,
  processes,
  ranks_of,
  state_of,
  wait_until,
)

from nmoe.records import checkpoint
from nmoe.records.root import Root

pytestmark = [pytest.mark.faults, pytest.mark.kills, pytest.mark.netns]
BODY = f"""
[launch]
engine = "jobset"
interface = "lo"
port = 29491
[jobset]
image = "registry.example/nmoe@sha256:{"0" * 64}"
[prod]
max_restarts = 1
"""
COMMANDS = {  # of a pod's image, and of who launches
  "nmoe": f'#!/bin/sh\nexec {sys.executable} -m stages.cli "$@"\n',
  "kubectl": "#!/bin/sh\nexit 0\n",
}


class Pods:
  """`nmoe prod launch` of a configuration as a JobSet of one pod; a context that ends the pod."""

  def __init__(self, folder: Path):
    self.lab = Lab(folder)
    self.file = write_variant(write_variant(self.lab.file, "long", LONG), "jobset", BODY)
    self.root, self.pod = self.lab.root, None
    (folder / "bin").mkdir()
    for name, text in COMMANDS.items():
      (folder / "bin" / name).write_text(text)
      (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    self.env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    launch = ["nmoe", "prod", "launch", str(self.file), "--without-evidence", "a test"]
    subprocess.run(launch, env=self.env, cwd=REPO, check=True, stdout=subprocess.PIPE)
    self.run = next((self.root / "runs").glob("*")).name
    self.hosts = folder / "hosts"
    name = f"nmoe-{self.run}"
    self.hosts.write_text(f"127.0.0.1 localhost {name}-node-0-0.{name}\n")

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self.pod is not None and self.pod.poll() is None:
      os.kill(self.first(), signal.SIGKILL)
      self.pod.wait(30)
    wait_until(lambda: not list(processes(self.run)), 30, "its processes are gone")

  def start(self, restart: int) -> None:
    """The pod, as the controller makes it for its `restart`th try."""
    made = json.loads((Root(self.root).prod(self.run) / "jobset.json").read_text())
    spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    env = self.env | {"RESTART": str(restart), "JOB_COMPLETION_INDEX": "0"}
    enter = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
    bind = f'mount --bind {self.hosts} /etc/hosts && exec "$@"'
    self.pod = subprocess.Popen([*enter, bind, "sh", *container["command"]], env=env, cwd=REPO)

  def first(self) -> int:
    """The pod's process 1, as this host numbers it."""
    children = Path(f"/proc/{self.pod.pid}/task/{self.pod.pid}/children").read_text()
    return int(children.split()[0])

  def wait_for(self, step: int, attempt: int) -> None:
    def reached() -> bool:
      beat = beat_of(self.root, self.run)
      return beat is not None and (beat.attempt, beat.entry.step) >= (attempt, step)

    wait_until(reached, 60, f"attempt {attempt}, step {step}")

  def status(self, limit_s: float, what: str) -> int:
    wait_until(lambda: self.pod.poll() is not None, limit_s, what)
    assert ranks_of(self.run) == []
    return self.pod.returncode

  def outcomes(self) -> list[str]:
    return [attempt.outcome for attempt in attempts_of(self.root, self.run)]


def test_an_evicted_pod_saves(tmp_path, undisturbed):
  """SIGTERM to its process 1; evicted before the first attempt began, it counted that restart."""
  with Pods(tmp_path) as pods:
    pods.start(1)
    pods.wait_for(30, attempt=2)
    os.kill(pods.first(), signal.SIGTERM)
    assert pods.status(15, "saved and left") == 75
    (stop,) = (e for e in events_of(pods.root, pods.run) if e.kind == "stop")
    assert stop.step in checkpoint.steps(Root(pods.root).checkpoints(pods.run))
    pods.start(2)
    assert pods.status(60, "the pod ends") == 0
    assert [attempt.number for attempt in attempts_of(pods.root, pods.run)] == [2, 3]
    assert pods.outcomes() == ["preempted", "completed"]
    assert same_bits(state_of(pods.root, pods.run), undisturbed)
    pods.start(3)  # a restart of what is completed: never again
    assert pods.status(15, "nothing is left to do") == 76


def test_a_killed_rank_and_a_killed_agent(tmp_path, undisturbed):
  """The first is replaced within the pod; the second ends it, to be tried again."""
  with Pods(tmp_path) as pods:
    pods.start(0)
    pods.wait_for(30, attempt=1)
    os.kill(ranks_of(pods.run)[0], signal.SIGKILL)
    wait_until(lambda: kinds(events_of(pods.root, pods.run)) == ["launch", "restart"], 15, "again")
    os.kill(agent_of(pods.run), signal.SIGKILL)
    assert pods.status(15, "the pod ends with its agent") == 75
    text = (Root(pods.root).prod(pods.run) / "jobset.json").read_text()
    assert re.search(r"RESTART \+ 1\)", text)
    pods.start(1)
    assert pods.status(60, "the pod ends") == 0
    assert pods.outcomes() == ["crashed", "completed"]
    assert same_bits(state_of(pods.root, pods.run), undisturbed)
