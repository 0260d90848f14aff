"""NVSHMEM's symmetric memory: one block per rank, mapped on the ranks that NVLink or PCIe reaches.

Ranks meet through a gloo group (NVSHMEM's uid bootstrap); neither MPI nor NCCL is involved.
"""

from __future__ import annotations

import numpy as np
import nvshmem.core as nvshmem
import torch
import torch.distributed as dist
from cuda.core import Device
from torch import Tensor

from kernels.cuda.exchange import Exchange
from kernels.ops import KernelError, check

__all__ = ["Exchange", "allocate", "release"]

LIBRARY = "3.8.0"  # of NVSHMEM; torch brings an older one


def allocate(nbytes: int, group: dist.ProcessGroup) -> list[Tensor]:
  """Zeroed uint8 [nbytes] of every rank of the group, by rank, all mapped here. Collective.

  Raises KernelError where a rank's memory cannot be mapped, or the library is another version.
  """
  mine, rank = own_block(nbytes, group), group.rank()
  return [mine if peer == rank else _mapped(mine, rank, peer) for peer in range(group.size())]


def own_block(nbytes: int, group: dist.ProcessGroup) -> Tensor:
  """Zeroed uint8 [nbytes] at the same symmetric address on every rank. Collective.

  The first call joins the ranks and binds torch's current CUDA device to this process.
  """
  found = nvshmem.get_version().libnvshmem_version  # loads the library
  pip = f"pip install --no-deps nvidia-nvshmem-cu13=={LIBRARY}"
  check(found == LIBRARY, f"NVSHMEM {found} is loaded, {LIBRARY} is needed; run `{pip}`")
  if nvshmem.init_status() < nvshmem.InitStatus.STATUS_IS_INITIALIZED:
    _join(group)
  mine = nvshmem.tensor((nbytes,), dtype=torch.uint8)
  mine.zero_()
  torch.cuda.synchronize()
  dist.barrier(group)
  return mine


def release(mine: Tensor) -> None:
  """Free this rank's block of `allocate`. Collective; no block may be used after."""
  torch.cuda.synchronize()
  nvshmem.free_tensor(mine)


def _join(group: dist.ProcessGroup) -> None:
  rank = group.rank()
  device = Device(torch.cuda.current_device())
  device.set_current()
  uid = nvshmem.get_unique_id(empty=rank != 0)
  told = [uid._data.tobytes()]
  dist.broadcast_object_list(told, group_src=0, group=group)
  uid._data.view(np.uint8)[:] = np.frombuffer(told[0], np.uint8)
  nvshmem.init(device=device, uid=uid, rank=rank, nranks=group.size(), initializer_method="uid")


def _mapped(mine: Tensor, rank: int, peer: int) -> Tensor:
  try:
    return nvshmem.get_peer_tensor(mine, peer)
  except (nvshmem.NvshmemError, nvshmem.NvshmemInvalid) as error:
    raise KernelError(
      f"rank {rank} cannot map the memory of rank {peer} ({error}); put the ranks on one NVLink or "
      "PCIe domain, or set rdep.peer_access = false"
    ) from error
