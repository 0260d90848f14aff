"""The symmetric heap: every rank's buffers, mapped on every rank that can reach them.

What lies where is kernels.sizes.BufferLayout; how memory is shared is the target's (the module
`symmetric` of its kernels: POSIX shared memory on the cpu, NVSHMEM on GPUs).
"""

from __future__ import annotations

import torch.distributed as dist

from kernels.buffers import Buffers, views
from kernels.exchange import Memory
from kernels.ops import KernelError
from kernels.sizes import BufferLayout
from nmoe.errors import CommError


class Heap:
  """All ranks' blocks, of `nbytes` each: `peers[r]` are the buffers of rank r, `mine` its own.

  Collective over `group` (gloo). An Rdep owns it. Raises CommError if the memory cannot be had.
  """

  def __init__(self, layout: BufferLayout, symmetric: Memory, group: dist.ProcessGroup):
    self._release = symmetric.release
    try:
      blocks = symmetric.allocate(layout.nbytes, group)
    except KernelError as error:
      raise CommError(f"rank {group.rank()} of {group.size()}: {error}") from error
    self._mine = blocks[group.rank()]
    self.nbytes = layout.nbytes
    self.peers: list[Buffers] = [views(layout, block) for block in blocks]
    self.mine = self.peers[group.rank()]

  def close(self) -> None:
    """Give the memory back; the buffers may not be used after. Collective."""
    del self.peers, self.mine
    self._release(self._mine)
