"""`nmoe prod launch` of a small configuration in a process of its own, on this host or on pretended
ones, and what it leaves: the end of an undisturbed run is what every fault's end is compared with.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from labs import Lab, open_lab, write_variant
from torch import Tensor

from nmoe.config import file as configs
from nmoe.records import checkpoint, manifests, metrics
from nmoe.records.attempts import Attempt, Event, History
from nmoe.records.root import Root
from nmoe.records.unpickling import read_metadata
from nmoe.train.progress import Heartbeat
from stages.launch import local
from stages.launch.local import Job, Launcher

SLACK = float(os.environ.get("SLACK", "2"))  # limits are those of two quiet cores
FAULTS = Path(__file__).parent / "faults"
REPO = FAULTS.parents[1]
LOGGED = ("train/loss", "train/bpb", "val/", "grad_norm/", "lr/", "moe/")  # of equal runs equal
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
  """`nmoe prod launch` of a configuration: by default the lab's, with LONG and `body` on top.

  prefix: a command that the launch is an argument of, such as one that enters another host.
  """

  def __init__(
    self,
    folder: Path,
    body: str = "",
    prefix: Sequence[str] = (),
    file: Path | None = None,
    **env: str,
  ):
    if file is None:
      self.lab = Lab(folder)
      file = write_variant(self.lab.file, "long", LONG)
    self.file = write_variant(file, "changed", body) if body else file
    self.root = Path(configs.load(self.file, env={}).run.root)
    path = os.pathsep.join(filter(None, (str(FAULTS), os.environ.get("PYTHONPATH"))))
    self.env = dict(os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    self.begun = time.monotonic()
    self.process = self.start(prefix)

  def start(self, prefix: Sequence[str] = (), **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "stages.cli", "prod", "launch", str(self.file)]
    return subprocess.Popen(
      [*prefix, *command, "--without-evidence", "a test"],
      env=self.env | env,
      cwd=REPO,
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
      beat = beat_of(self.root, self.run_id()) if self.run_id() else None
      if beat is not None and beat.entry.step >= step:
        return beat
      time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")

  def rank(self, number: int) -> int:
    """The process of a rank."""
    place = b"RANK=%d" % number
    for pid in ranks_of(self.run_id()):
      if place in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        return pid
    raise AssertionError(f"rank {number} is not there")

  def end(self) -> tuple[int, str]:
    """(exit status, what it printed)."""
    out, _ = self.process.communicate(timeout=120 * SLACK)
    assert ranks_of(self.run_id()) == [], "a rank outlives the launch"
    return self.process.returncode, out

  def events(self) -> list[Event]:
    return events_of(self.root, self.run_id())

  def attempts(self) -> list[Attempt]:
    return attempts_of(self.root, self.run_id())

  def state(self) -> dict[str, Tensor]:
    return state_of(self.root, self.run_id())


def beat_of(root: Path, run_id: str) -> Heartbeat | None:
  return Heartbeat.read(Root(root).heartbeat(run_id))


def events_of(root: Path, run_id: str) -> list[Event]:
  with closing(History(root)) as records:
    aside = ("override", "submit", "permanent")
    return [event for event in records.events(run_id) if event.kind not in aside]


def attempts_of(root: Path, run_id: str) -> list[Attempt]:
  with closing(History(root)) as records:
    return records.attempts(run_id)


def state_of(root: Path, run_id: str, steps: int = STEPS) -> dict[str, Tensor]:
  """At the end."""
  return checkpoint.read(Root(root).checkpoints(run_id) / f"step_{steps:08d}")


def files_of(root: Path, run_id: str) -> dict[str, Any]:
  """The files of the newest checkpoint: name -> hash, as read now and as its manifest says.

  The description of the tensors, which names its run, is what it says of them and their places.
  """
  folder = Root(root).checkpoints(run_id)
  path = folder / f"step_{Root(root).checkpoint_steps(run_id)[-1]:08d}"
  told = {name: file["sha256"] for name, file in manifests.manifest(path)["files"].items()}
  read = {name: _sha256(path / name) for name in told}
  assert read == told
  described = read_metadata(path)
  return read | {".metadata": (described.state_dict_metadata, described.storage_data)}


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def logged_of(root: Path, run_id: str) -> dict[str, tuple[list[int], bytes]]:
  """tag -> steps and the bits of their values, of all that runs of equal bits log alike."""
  series = metrics.read(root, run_id)
  return {
    tag: (steps.tolist(), values.tobytes())
    for tag, (steps, _, values) in series.items()
    if tag.startswith(LOGGED)
  }


def ranks_of(run_id: str) -> list[int]:
  """The processes that train a run."""
  return [pid for pid, command in processes(run_id) if b"nmoe.train.loop" in command]


def agent_of(run_id: str) -> int:
  """The process of torch's agent, where there is one host."""
  agents = (
    pid
    for pid, command in processes(run_id)
    if b"stages.launch.agent" in command and b"nmoe.train.loop" not in command
  )
  return next(agents)


def processes(run_id: str) -> Iterator[tuple[int, list[bytes]]]:
  """What speaks of a run in its command, but zombies, which have none."""
  for entry in Path("/proc").glob("[0-9]*"):
    try:
      command = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
      continue
    if run_id.encode() in command:
      yield int(entry.name), command


def wait_until(true: Callable[[], object], limit_s: float, what: str) -> float:
  """The seconds until it is true, printed and held against the limit on two quiet cores."""
  begun = time.monotonic()
  while not true():
    assert time.monotonic() - begun < limit_s * SLACK, f"{what}: not within {limit_s} s x {SLACK}"
    time.sleep(0.1)
  within(begun, limit_s, what)
  return time.monotonic() - begun


def within(begun: float, limit_s: float, what: str) -> None:
  """Print and check the seconds since `begun` (time.monotonic) against a limit."""
  within_seconds(time.monotonic() - begun, limit_s, what)


def within_seconds(took: float, limit_s: float, what: str) -> None:
  """Print and check seconds against a limit."""
  sys.stdout.write(f"{what}: {took:.1f} s of {limit_s:g}\n")
  assert took < limit_s * SLACK, f"{what}: {took:.1f} s, limit {limit_s} s x {SLACK}"


def kinds(events: Sequence[Event]) -> list[str]:
  return [event.kind for event in events]


def undisturbed(folder: Path, steps: int = STEPS, **values: Any) -> dict[str, Tensor]:
  """The final state of the same run without agents and faults. values: other keys, "." as "__"."""
  with open_lab(folder) as lab:
    keys = {"launch__ranks": 2, "schedule__batch_tokens": 1024, "train__checkpoint_every": 20}
    keys |= {"schedule__total_tokens": steps * 1024} | values
    run = lab.record(**keys)
    config = configs.loads(lab.run(run).toml, "undisturbed", env={})
    handle = local.run(Launcher(lab.root), Job(run, config))
    assert handle.poll() == 0, handle.tail()
    return lab.state(run, steps)
