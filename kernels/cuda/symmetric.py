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

from kernels.ops import KernelError, check

LIBRARY = "3.8.0"  # the NVSHMEM that the kernels were compiled against


def allocate(nbytes: int, group: dist.ProcessGroup) -> list[Tensor]:
  """Zeroed uint8 [nbytes] of every rank of the group, by rank, all mapped here. Collective.

  torch's current CUDA device is bound to this process. Raises KernelError where a rank's memory
  cannot be mapped, or the library is another version.
  """
  found = nvshmem.get_version().libnvshmem_version
  check(found == LIBRARY, f"NVSHMEM {found} is loaded, {LIBRARY} is needed; reinstall nmoe[cuda]")
  rank, ranks = group.rank(), group.size()
  device = Device(torch.cuda.current_device())
  device.set_current()
  uid = nvshmem.get_unique_id(empty=rank != 0)
  told = [uid._data.tobytes()]
  dist.broadcast_object_list(told, group_src=0, group=group)
  uid._data.view(np.uint8).reshape(-1)[:] = np.frombuffer(told[0], np.uint8)
  nvshmem.init(device=device, uid=uid, rank=rank, nranks=ranks, initializer_method="uid")
  mine = nvshmem.tensor((nbytes,), dtype=torch.uint8)
  mine.zero_()
  torch.cuda.synchronize()
  dist.barrier(group)
  return [mine if peer == rank else _mapped(mine, rank, peer) for peer in range(ranks)]


def _mapped(mine: Tensor, rank: int, peer: int) -> Tensor:
  try:
    return nvshmem.get_peer_tensor(mine, peer)
  except (nvshmem.NvshmemError, nvshmem.NvshmemInvalid) as error:
    raise KernelError(
      f"rank {rank} cannot map the memory of rank {peer} ({error}); ranks must be on one NVLink or "
      "PCIe domain"
    ) from error


def release() -> None:
  """Free the blocks and leave NVSHMEM. Collective; no tensor of `allocate` may be used after."""
  torch.cuda.synchronize()
  nvshmem.finalize()
