"""Faults of storage and of attempts that overlap, on one host: the end is the same bits."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from clusters import host
from labs import same_bits
from productions import (
  SLACK,
  Production,
  agent_of,
  beat_of,
  kinds,
  processes,
  ranks_of,
  wait_until,
  within,
)

from nmoe.records import checkpoint
from nmoe.records.root import Root

pytestmark = [pytest.mark.faults, pytest.mark.kills]


def flip(path: Path) -> None:
  file = next(path.glob("*.distcp"))
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def lose_manifest(path: Path) -> None:
  (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip, lose_manifest])
def test_a_corrupt_newest_checkpoint(tmp_path, undisturbed, damage):
  """The restart sets it aside, says so, and goes on from the one before."""
  production = Production(tmp_path)
  production.wait_for(50)
  agent = agent_of(production.run_id())
  for pid in (agent, *ranks_of(production.run_id())):
    os.kill(pid, signal.SIGSTOP)
  folder = Root(production.root).checkpoints(production.run_id())
  steps = checkpoint.steps(folder)
  damage(folder / f"step_{steps[-1]:08d}")
  os.kill(production.rank(1), signal.SIGKILL)
  for pid in (agent, production.rank(0)):
    os.kill(pid, signal.SIGCONT)
  wait_until(lambda: "restart" in kinds(production.events()), 15, f"{damage.__name__}: restart")
  (corrupt,) = (event for event in production.events() if event.kind == "corrupt")
  assert corrupt.detail["checkpoint"] == f"step_{steps[-1]:08d}"
  assert corrupt.step == steps[-2]
  code, out = production.end()
  assert code == 0, out
  assert (folder / f"step_{steps[-1]:08d}.corrupt").is_dir()
  assert same_bits(production.state(), undisturbed)


@pytest.fixture
def small_disk(tmp_path):
  """16 MiB for checkpoints."""
  disk = tmp_path / "root" / "checkpoints"
  disk.mkdir(parents=True)
  subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
  yield disk
  subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> Path:
  """A file that leaves no byte on a disk."""
  filler = disk / "filler"
  with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
    while file.write(bytes(1 << 12)):
      pass
  return filler


@pytest.mark.netns
def test_a_full_disk_that_older_checkpoints_lie_on(tmp_path, small_disk, undisturbed):
  """They give way, which is an event, and the run goes on to its end."""
  production = Production(tmp_path)
  production.wait_for(50)
  folder = Root(production.root).checkpoints(production.run_id())
  wait_until(lambda: len(checkpoint.steps(folder)) == 2, 10, "two checkpoints")
  fill(small_disk)
  code, out = production.end()
  assert code == 0, out
  events = production.events()
  assert kinds(events)[:2] == ["launch", "pruned"] and set(kinds(events)) == {"launch", "pruned"}
  assert "No space left" in events[1].detail["error"]
  assert same_bits(production.state(), undisturbed)


@pytest.mark.netns
def test_a_full_disk(tmp_path, small_disk, undisturbed):
  """No restart helps: 75, what was saved is whole; with space the same command goes on."""
  production = Production(tmp_path, "[train]\nkeep_checkpoints = 1\n")
  production.wait_for(30)
  filler = fill(small_disk)
  filled = time.monotonic()
  code, out = production.end()
  within(filled, 10, "the launch ends, from the disk's filling")
  assert code == 75 and "disk full: checkpoint step" in out and "No space left" in out
  assert kinds(production.events()) == ["launch", "disk full"]
  folder = Root(production.root).checkpoints(production.run_id())
  (*_, newest) = checkpoint.steps(folder)
  checkpoint.verify(folder / f"step_{newest:08d}")
  assert not list(folder.glob("*.partial*"))
  filler.unlink()
  production.process = production.start()
  code, out = production.end()
  assert code == 0 and f"goes on from step {newest}" in out
  assert same_bits(production.state(), undisturbed)


def test_a_killed_agent(tmp_path, undisturbed):
  """Its ranks die with it; the launch begins the next attempt."""
  production = Production(tmp_path)
  production.wait_for(30)
  ranks = ranks_of(production.run_id())
  os.kill(agent_of(production.run_id()), signal.SIGKILL)
  wait_until(lambda: not set(ranks) & set(ranks_of(production.run_id())), 1, "its ranks are gone")
  code, out = production.end()
  assert code == 0, out
  assert [a.outcome for a in production.attempts()] == ["crashed", "completed"]
  assert same_bits(production.state(), undisturbed)


def test_a_slow_save_is_not_cut(tmp_path, undisturbed):
  """SIGTERM, and a checkpoint that takes 40 s: longer than torch's agent waits by itself."""
  slow = tmp_path / "slow"
  production = Production(tmp_path, FAULT=f"slow: {slow}")
  production.wait_for(30)
  slow.touch()
  told = time.monotonic()
  production.process.terminate()
  code, out = production.end()
  within(told, 60, "saved and left")
  assert time.monotonic() - told > 40
  assert code == 75, out
  stop = production.events()[-1]
  assert stop.kind == "preempted" or kinds(production.events())[1] == "stop"
  slow.unlink()
  production.process = production.start()
  code, out = production.end()
  assert code == 0 and f"goes on from step {stop.step}" in out
  assert same_bits(production.state(), undisturbed)


@pytest.mark.netns
def test_another_host_launches_on_locks_that_do_not_hold(tmp_path, undisturbed):
  """The heartbeat refuses it while it is fresh."""
  production = Production(tmp_path, prefix=host("h0"), FAULT="no locks")
  production.wait_for(30)
  begun = time.monotonic()
  second = production.start(host("h1"))
  out, _ = second.communicate(timeout=60 * SLACK)
  within(begun, 3 + 4, "refused, its imports with it")
  assert second.returncode == 1
  said = " ".join(out.split())
  assert "is launched already by h0, pid" in said and "(attempt 1, heartbeat 0 s ago by h0" in said
  assert production.end()[0] == 0
  assert same_bits(production.state(), undisturbed)


@pytest.mark.netns
def test_a_zombie_attempt(tmp_path, undisturbed):
  """A launch that was frozen, on locks that do not hold, comes back when another host has gone on:
  it finishes no checkpoint and ends with 76; the newer attempt is undisturbed.
  """
  production = Production(tmp_path, "[prod]\nstale_s = 3.0\n", prefix=host("h0"), FAULT="no locks")
  production.wait_for(30)
  frozen = [production.process.pid, *(pid for pid, _ in processes(production.run_id()))]
  for pid in frozen:
    os.kill(pid, signal.SIGSTOP)
  time.sleep(4)
  zombie, production.process = production.process, production.start(host("h1"))
  wait_until(lambda: beat_of(production.root, production.run_id()).attempt == 2, 30, "taken up")
  for pid in frozen:
    os.kill(pid, signal.SIGCONT)
  woken = time.monotonic()
  out, _ = zombie.communicate(timeout=60 * SLACK)
  within(woken, 15, "the zombie ends")
  assert zombie.returncode == 76 and "superseded: attempt 2 has begun" in out, out
  code, out = production.end()
  assert code == 0, out
  assert [a.outcome for a in production.attempts()] == ["superseded", "completed"]
  refused = [e.detail["error"] for e in production.events() if e.kind == "refused"]
  assert refused and "attempt 2 has begun on h1" in refused[0]
  assert same_bits(production.state(), undisturbed)
