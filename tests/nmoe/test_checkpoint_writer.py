"""Checkpoints written beside the steps: what the steps wait for, and what failures and kills do."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from labs import STEPS, same_bits
from torch import Tensor

from nmoe.errors import CheckpointError, CommError, DataError, DiskFullError, FencedError
from nmoe.records import checkpoint, metrics
from nmoe.records.checkpoint import Writer
from nmoe.train import loop as train


def a_state(seed: int, numbers: int = 8) -> dict[str, Tensor]:
  w13 = torch.arange(2.0 * numbers).view(2, numbers) + seed
  return {"layers.1.moe.experts.w13": w13, "embed.weight": torch.full((numbers,), float(seed))}


def stored(folder: Path, step: int) -> dict[str, Tensor]:
  return checkpoint.read(folder / f"step_{step:08d}")


def save(writer: Writer, step: int) -> None:
  writer.copy(a_state(step))
  writer.start(step, {})


class Gate:
  """Holds every write before its manifest until opened; it may then fail."""

  def __init__(self, monkeypatch):
    self.opened, self.reached, self.error = threading.Event(), threading.Event(), None
    seal = checkpoint._seal

    def held(path, meta, written):
      self.reached.set()
      assert self.opened.wait(60)
      if self.error is not None:
        raise self.error
      seal(path, meta, written)

    monkeypatch.setattr(checkpoint, "_seal", held)


@pytest.fixture
def gate(monkeypatch):
  return Gate(monkeypatch)


FULL = OSError(28, "No space left on device")


def test_the_state_may_change_once_it_is_copied(tmp_path, monkeypatch):
  changed, dcp_save = threading.Event(), checkpoint.dcp.save

  def late(*args, **kwargs):
    assert changed.wait(60)
    dcp_save(*args, **kwargs)

  monkeypatch.setattr(checkpoint.dcp, "save", late)
  with Writer(tmp_path, 2) as writer:
    state = a_state(1)
    writer.copy(state)
    writer.start(1, {})
    for x in state.values():
      x.fill_(-1)
    changed.set()
    writer.copy(state)  # into the same memory, so it waits
    writer.start(2, {})
  assert same_bits(stored(tmp_path, 1), checkpoint.split_experts(a_state(1), 0))
  assert same_bits(stored(tmp_path, 2), checkpoint.split_experts(state, 0))


def test_the_newest_are_kept(tmp_path):
  with Writer(tmp_path, 2) as writer:
    for step in (1, 2, 3):
      save(writer, step)
  assert checkpoint.steps(tmp_path) == [2, 3]


def test_steps_go_on_while_it_is_written(tmp_path, gate):
  with Writer(tmp_path, 2) as writer:
    save(writer, 1)
    assert gate.reached.wait(60)
    assert not writer.failed
    assert checkpoint.steps(tmp_path) == []
    gate.opened.set()
    writer.wait()
    assert checkpoint.steps(tmp_path) == [1]
    writer.wait()


def test_a_failed_write_is_told_and_raised_once(tmp_path, gate):
  gate.error = FULL
  with Writer(tmp_path, 2) as writer:
    save(writer, 1)
    assert not writer.failed
    gate.opened.set()
    while not writer.failed:
      time.sleep(0.01)
    with pytest.raises(DiskFullError, match="step 1 was not written .*No space left on device"):
      writer.wait()
    assert not writer.failed
    gate.error = None
    save(writer, 2)
  assert checkpoint.steps(tmp_path) == [2]


def a_small_disk(monkeypatch, folder: Path, room: int) -> None:
  """Manifests find no space while there are more than `room` checkpoints."""
  seal = checkpoint._seal

  def sealed(*arguments):
    if len(checkpoint.steps(folder)) > room:
      raise FULL
    seal(*arguments)

  monkeypatch.setattr(checkpoint, "_seal", sealed)


def test_on_a_full_disk_all_but_the_newest_give_way(tmp_path, monkeypatch):
  """And permanent ones, once; where none can, the error is raised and all stay."""
  with Writer(tmp_path, 4) as writer:
    writer.copy(a_state(0))
    writer.start(0, {"permanent": "every 9 tokens"})
    for step in (1, 2, 3):
      save(writer, step)
    writer.wait()
    a_small_disk(monkeypatch, tmp_path, 2)
    save(writer, 4)
    writer.wait()
    assert checkpoint.steps(tmp_path) == [0, 3, 4]
    assert writer.pruned[0][0] == 4 and "No space left on device" in writer.pruned[0][1]
    a_small_disk(monkeypatch, tmp_path, 1)
    save(writer, 5)
    with pytest.raises(DiskFullError, match="step 5 was not written"):
      writer.wait()
    assert checkpoint.steps(tmp_path) == [0, 4] and len(writer.pruned) == 1
    save(writer, 6)
    with pytest.raises(DiskFullError, match="step 6 was not written"):
      writer.wait()
  assert checkpoint.steps(tmp_path) == [0, 4]


def test_a_fenced_attempt_deletes_nothing(tmp_path, monkeypatch):
  asked = []

  def check():
    asked.append(0)
    if len(asked) > 2:
      raise FencedError("attempt 1 writes no more")

  with Writer(tmp_path, 3, fence=checkpoint.Fence(1, check)) as writer:
    for step in (1, 2):
      save(writer, step)
    writer.wait()
    a_small_disk(monkeypatch, tmp_path, 1)
    save(writer, 3)
    with pytest.raises(FencedError):
      writer.wait()
  assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_failed_write_is_raised_at_the_end(tmp_path, gate):
  gate.error = FULL
  gate.opened.set()
  with pytest.raises(CheckpointError, match="No space left"), Writer(tmp_path, 2) as writer:
    save(writer, 1)


def test_another_error_comes_first_and_waits(tmp_path, gate):
  gate.error = FULL
  with pytest.raises(DataError, match="gone") as caught, Writer(tmp_path, 2) as writer:
    save(writer, 1)
    threading.Timer(0.2, gate.opened.set).start()
    raise DataError("a shard is gone")
  assert "checkpoint step 1 was not written" in caught.value.__notes__[0]


@pytest.mark.faults
def test_lost_ranks_are_not_waited_for(tmp_path, gate):
  with pytest.raises(CommError), Writer(tmp_path, 2) as writer:
    save(writer, 1)
    raise CommError("rank 1 is late")
  assert checkpoint.steps(tmp_path) == []
  gate.opened.set()


def test_the_stall_is_shorter_than_the_write(tmp_path):
  """64 MiB of state, copied into memory that the first save has allocated."""
  shares = []
  with Writer(tmp_path, 1) as writer:
    for step in range(1, 5):
      state = {"w": torch.full((1 << 24,), float(step))}
      begun = time.perf_counter()
      writer.copy(state)
      writer.start(step, {})
      stalled = time.perf_counter()
      writer.wait()
      shares.append((stalled - begun) / (time.perf_counter() - begun))
  assert min(shares[1:]) < 0.5


def killed_while_writing(group, folder: str) -> str:
  """Rank 0 is killed by its own thread while step 2 is written; the others say what they saw."""
  with Writer(Path(folder), 2, 2 * group.rank(), group) as writer:
    save(writer, 1)
    writer.wait()
    if group.rank() == 0:
      checkpoint._seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(writer, 2)
    try:
      while not writer.failed:
        time.sleep(0.01)
      writer.wait()
    except CheckpointError as error:
      return str(error)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_while_writing(tmp_path, num_ranks):
  found = ranks.outcomes(killed_while_writing, num_ranks, str(tmp_path), timeout_s=30.0)
  assert found[0].exitcode == -signal.SIGKILL
  assert all("checkpoint step 2 was not written" in other.value for other in found[1:])
  assert checkpoint.steps(tmp_path) == [1]
  names = {f"layers.1.moe.experts.{e}.w13" for e in range(2 * num_ranks)}
  assert stored(tmp_path, 1).keys() == names | {"embed.weight"}
  with Writer(tmp_path, 2) as writer:
    save(writer, 2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def fails_on_rank_0(group, folder: str) -> str:
  def full(*_):
    raise OSError(28, "No space left on device")

  checkpoint._seal = full
  try:
    with Writer(Path(folder), 2, 2 * group.rank(), group) as writer:
      save(writer, 1)
  except CheckpointError as error:
    return str(error)
  return ""


def gives_way(group, folder: str) -> list[tuple[int, str]]:
  """Rank 0's disk is full while there are two checkpoints."""
  patch = pytest.MonkeyPatch()
  with Writer(Path(folder), 3, 2 * group.rank(), group) as writer:
    save(writer, 1)
    save(writer, 2)
    writer.wait()
    a_small_disk(patch, Path(folder), 1)
    save(writer, 3)
    writer.wait()
    return writer.pruned


def test_all_ranks_try_once_more(tmp_path):
  found = ranks.run(gives_way, 2, str(tmp_path))
  assert [pruned[0][0] for pruned in found] == [3, 3]
  assert checkpoint.steps(tmp_path) == [2, 3]
  assert len(stored(tmp_path, 3)) == 5


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
  said = ranks.run(fails_on_rank_0, 2, str(tmp_path))
  assert all("No space left on device" in error for error in said)
  assert list(tmp_path.iterdir()) == []


class Failing:
  """Of a run: the write of one step fails, and a later step waits until it has."""

  def __init__(self, monkeypatch, step: int):
    self.steps: list[int] = []
    seal, start, failing = checkpoint._seal, Writer.start, self

    def spoiled(path, meta, written):
      if meta["step"] == step:
        raise FULL
      seal(path, meta, written)

    def noted(writer, at, meta):
      failing.steps.append(at)
      start(writer, at, meta)
      if at == step:
        writer._write.exception(60)

    monkeypatch.setattr(checkpoint, "_seal", spoiled)
    monkeypatch.setattr(Writer, "start", noted)


def test_a_run_fails_at_the_next_step_and_goes_on_bit_exactly(lab):
  run, whole = lab.record(), lab.record()
  with pytest.MonkeyPatch.context() as patch:
    failing = Failing(patch, 6)
    with pytest.raises(CheckpointError, match="step 6 was not written"):
      lab.attempt(run)
    assert failing.steps == [3, 6]
  assert (lab.run(run).status, checkpoint.steps(lab.checkpoints(run))) == ("failed", [3])
  assert lab.logged(run)["train/loss"][-1][0] == 6
  assert lab.attempt(run) == lab.attempt(whole) == 0
  assert same_bits(lab.state(run), lab.state(whole))
  assert lab.logged(run) == lab.logged(whole)


def test_a_run_logs_its_stalls(lab):
  run = lab.record()
  assert lab.attempt(run) == 0
  series = metrics.read(lab.root, run)
  steps, _, stall_s = series["checkpoint/stall_s"]
  assert steps.tolist() == [3, 6, 9, STEPS]
  assert np.all(stall_s > 0)
  assert stall_s[:3].sum() <= series["time/checkpoint_s"][2].sum()


def test_a_run_that_stops_ends_its_write(lab, monkeypatch):
  """SIGTERM while a checkpoint is written: this one, and that of the last step, are finished."""
  seal = checkpoint._seal

  def slow(path, meta, written):
    if meta["step"] == 3:
      lab.terminate()
      time.sleep(0.3)
    seal(path, meta, written)

  monkeypatch.setattr(checkpoint, "_seal", slow)
  run = lab.record()
  assert lab.attempt(run) == train.INTERRUPTED
  found = checkpoint.steps(lab.checkpoints(run))
  assert len(found) == 2 or found == [3]
  assert found[0] == 3
