"""Symmetric memory of processes on one host: one POSIX shared-memory file, mapped by every rank.

Rank 0 reserves the file's pages, every rank maps it, and its name is removed at once: the memory
lives until the last rank leaves, even one that is killed, and nothing is left behind. Only a run
killed between the two (some milliseconds) leaves a name; the next run removes it, because the name
holds its creator's process id.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import secrets
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.ops import KernelError, check
from kernels.reference.exchange import Exchange

__all__ = ["Exchange", "allocate", "release"]

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"nmoe-(\d+)-[0-9a-f]{8}")


def allocate(nbytes: int, group: dist.ProcessGroup) -> list[Tensor]:
  """Zeroed uint8 [nbytes] of every rank of the group, by rank, all mapped here. Collective.

  Each block starts on a page. Other processes see a store after the stores before it (x86-64's
  order), which the signals of `exchange` rely on. The memory is freed when the last process has
  dropped its tensors. Raises KernelError, on every rank.
  """
  machine = platform.machine()
  check(
    machine in ("x86_64", "AMD64"),
    f"shared-memory ranks rely on x86-64's store order, this is {machine}; use launch.ranks = 1",
  )
  stride = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
  rank, ranks = group.rank(), group.size()
  told = [_create(stride * ranks) if rank == 0 else None]
  dist.broadcast_object_list(told, group_src=0, group=group)
  name, error = told[0]
  check(not error, error)
  path = FOLDER / name
  try:
    whole = _map(path, stride * ranks)
  finally:
    dist.barrier(group)
    if rank == 0:
      path.unlink(missing_ok=True)
  return [whole[r * stride : r * stride + nbytes] for r in range(ranks)]


def release(mine: Tensor) -> None:
  """The counterpart of `allocate`: nothing to do, the pages go with their last tensor."""


def remove_leftovers() -> list[str]:
  """Unlink files of runs whose creator is dead; returns their names."""
  removed = []
  for path in FOLDER.glob("nmoe-*"):
    match = _NAME.fullmatch(path.name)
    if match and not Path(f"/proc/{match[1]}").exists():
      path.unlink(missing_ok=True)
      removed.append(path.name)
  return removed


def _create(nbytes: int) -> tuple[str, str]:
  """The name of a new file of reserved, zeroed pages, and "" or the reason why there is none."""
  remove_leftovers()
  path = FOLDER / f"nmoe-{os.getpid()}-{secrets.token_hex(4)}"
  try:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
      os.posix_fallocate(descriptor, 0, nbytes)
    finally:
      os.close(descriptor)
  except OSError as error:
    path.unlink(missing_ok=True)
    return path.name, (
      f"{FOLDER} cannot hold {nbytes / 2**20:.1f} MiB for the ranks' buffers ({error.strerror}); "
      "lower rdep.capacity or train.micro_batch, or give the container more --shm-size"
    )
  return path.name, ""


def _map(path: Path, nbytes: int) -> Tensor:
  try:
    with path.open("r+b") as file:
      memory = mmap.mmap(file.fileno(), nbytes)
  except OSError as error:
    raise KernelError(
      f"{path} of rank 0 cannot be mapped ({error}); ranks of the cpu target must share one host "
      f"and one {FOLDER}"
    ) from error
  return torch.frombuffer(memory, dtype=torch.uint8)
