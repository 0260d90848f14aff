"""kernels.places in one kernel: what a rank does between the counts and its first row.

One block. A thread per expert sums the counts of all ranks; then it sums the padded totals of its
owner's experts before it, from shared memory, and writes the places of all ranks' rows for it.
Integers only. R · E counts in, 2 · R · E places out: latency is all that matters, and in torch the
same is a dozen launches. A rank with more rows than its buffer holds is told to the host in memory
that it can read without waiting in the layer.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64
from cutlass.memory import SmemAllocator
from torch import Tensor

from kernels.cuda.jit import cached, check_device, compile_kernel, fake
from kernels.cuda.rows import put
from kernels.ops import check
from kernels.places import Places

THREADS = 256


class PlacesKernel:
  def __init__(self, num_experts: int):
    self.num_experts = num_experts

  @cute.jit
  def __call__(self, mCount, mCopy, mBase, mEdge, mFull, alignment: Int32, capacity: Int64, stream):
    self.kernel(mCount, mCopy, mBase, mEdge, mFull, alignment, capacity).launch(
      grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mCount, mCopy, mBase, mEdge, mFull, alignment: Int32, capacity: Int64):
    tidx, _, _ = cute.arch.thread_idx()
    ranks = mCount.shape[0]
    held = self.num_experts // ranks
    sPadded = SmemAllocator().allocate_tensor(Int32, cute.make_layout(self.num_experts), 16)
    for e in cutlass.range(tidx, self.num_experts, THREADS):
      total = Int32(0)
      for r in cutlass.range(ranks):
        total += mCount[r, e]
      sPadded[e] = (total + alignment - 1) // alignment * alignment
    cute.arch.sync_threads()
    for e in cutlass.range(tidx, self.num_experts, THREADS):
      owner = e // held
      first = owner * held
      place = Int64(0)
      for before in cutlass.range(first, e):
        place += Int64(sPadded[before])
      mEdge[owner, e - first] = place
      if e - first == held - 1:
        mEdge[owner, held] = place + Int64(sPadded[e])
        if place + Int64(sPadded[e]) > capacity:
          put(Int64, mFull[0], Int64(1))
      for r in cutlass.range(ranks):
        count = Int64(mCount[r, e])
        mCopy[r, e] = count
        mBase[r, e] = place
        place += count


@cached
def compile_places(num_experts: int):
  count = fake(Int32, None, num_experts, align=4)
  copy, base = (fake(Int64, None, num_experts, align=8) for _ in range(2))
  edge = fake(Int64, None, None, align=8)
  full = fake(Int64, 1, align=8)
  kernel = PlacesKernel(num_experts)
  return compile_kernel(kernel, count, copy, base, edge, full, Int32(1), Int64(0))


def places(count_RE: Tensor, alignment: int, capacity: int, full: Tensor) -> tuple[Tensor, Places]:
  """(count_RE in int64, see kernels.places.places). count_RE int32; R divides E.

  full: int64 [1], the address of an int64 that becomes 1 if a rank has more than `capacity` rows.
  """
  check_device(count_RE.device)
  ranks, experts = count_RE.shape
  check(experts % ranks == 0, f"{experts} experts cannot lie on {ranks} ranks alike")
  copy, base = count_RE.new_empty((2, ranks, experts), dtype=torch.int64).unbind()
  edge = copy.new_empty(ranks, experts // ranks + 1)
  compile_places(experts)(count_RE, copy, base, edge, full, alignment, capacity)
  return copy, Places(base, edge)
