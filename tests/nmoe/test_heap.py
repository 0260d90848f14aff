"""The symmetric heap: one layout, shared pages, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from kernels.buffers import Buffers, views
from kernels.ops import KernelError
from kernels.reference import symmetric
from kernels.sizes import ALIGNMENT, BufferLayout
from nmoe.distributed.heap import Heap
from nmoe.errors import CommError

LAYOUT = BufferLayout(ranks=2, experts=4, capacity=10, rows=6, dim=8, dtype="bf16")

sizes = {
  "ranks": st.integers(1, 16),
  "experts": st.integers(1, 256),
  "capacity": st.integers(1, 1000),
  "rows": st.integers(1, 1000),
}
layouts = st.builds(
  BufferLayout,
  **sizes,
  dim=st.integers(1, 300),
  dtype=st.sampled_from(["bf16", "fp32"]),
) | st.builds(
  BufferLayout,
  **sizes,
  dim=st.integers(1, 10).map(lambda blocks: 32 * blocks),
  dtype=st.just("bf16"),
  payload=st.sampled_from(["mxfp8", "nvfp4"]),
)


@given(layouts)
def test_buffers_are_aligned_disjoint_and_fit(layout: BufferLayout) -> None:
  assert tuple(layout.fields) == Buffers._fields
  end = 0
  for name, start in sorted(layout.offsets.items(), key=lambda item: item[1]):
    assert start % ALIGNMENT == 0
    assert start >= end
    end = start + layout.sizes[name]
  assert end <= layout.nbytes < end + ALIGNMENT
  assert layout.nbytes % ALIGNMENT == 0


def test_views_cover_the_block_without_overlap() -> None:
  memory = torch.zeros(LAYOUT.nbytes + ALIGNMENT, dtype=torch.uint8)
  start = -memory.data_ptr() % ALIGNMENT
  block = memory[start : start + LAYOUT.nbytes]
  buffers = views(LAYOUT, block)
  for i, view in enumerate(buffers):
    block.zero_()
    view.view(torch.uint8).fill_(1)
    assert int(block.sum()) == view.numel() * view.element_size()
    assert all(not other.view(torch.uint8).any() for j, other in enumerate(buffers) if j != i)


def test_wrong_memory_and_too_many_rows_are_refused() -> None:
  with pytest.raises(KernelError, match="needs uint8"):
    views(LAYOUT, torch.zeros(LAYOUT.nbytes - 1, dtype=torch.uint8))
  with pytest.raises(KernelError, match="lower train.micro_batch"):
    BufferLayout(16, 64, 8, 2**27, 8, "bf16")


def exchange_bytes(group) -> tuple[list[list[float]], list[str]]:
  heap = Heap(LAYOUT, symmetric, group)
  mine = group.rank()
  for rank, peer in enumerate(heap.peers):
    peer.gate_C[mine] = 10.0 * mine + rank
  dist.barrier(group)
  names = [p.name for p in symmetric.FOLDER.glob(f"nmoe-{os.getpid()}-*")]
  return [peer.gate_C[:2].tolist() for peer in heap.peers], names


def test_every_rank_writes_into_every_block() -> None:
  for blocks, names in ranks.run(exchange_bytes, 2):
    assert blocks == [[0.0, 10.0], [1.0, 11.0]]
    assert names == []


def test_names_of_dead_runs_are_removed_and_of_live_ones_kept() -> None:
  child = subprocess.Popen([sys.executable, "-c", "pass"])
  child.wait()
  dead = symmetric.FOLDER / f"nmoe-{child.pid}-00000000"
  live = symmetric.FOLDER / f"nmoe-{os.getpid()}-00000000"
  other = symmetric.FOLDER / "nmoe-notes"
  try:
    for path in (dead, live, other):
      path.write_bytes(b"x")
    assert dead.name in symmetric.remove_leftovers()
    assert not dead.exists() and live.exists() and other.exists()
  finally:
    for path in (dead, live, other):
      path.unlink(missing_ok=True)


def killed_while_mapped(group, told: str) -> None:
  Heap(LAYOUT, symmetric, group)
  Path(told, str(os.getpid())).touch()
  time.sleep(0.05)
  os.kill(os.getpid(), 9)


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
  found = ranks.outcomes(killed_while_mapped, 2, str(tmp_path))
  assert [o.exitcode for o in found] == [-9, -9]
  pids = [p.name for p in tmp_path.iterdir()]
  assert len(pids) == 2
  assert not [p for pid in pids for p in symmetric.FOLDER.glob(f"nmoe-{pid}-*")]


def without_room(group) -> str:
  room = os.statvfs(symmetric.FOLDER)
  rows = room.f_blocks * room.f_frsize // 2**20
  layout = BufferLayout(2, 4, rows, 8, 2**19, "bf16")  # two blocks of all the pages there are
  with pytest.raises(CommError) as caught:
    Heap(layout, symmetric, group)
  return str(caught.value)


def test_no_room_is_told_to_every_rank() -> None:
  for rank, message in enumerate(ranks.run(without_room, 2)):
    assert message.startswith(f"rank {rank} of 2: /dev/shm cannot hold")
    assert "lower rdep.capacity" in message
