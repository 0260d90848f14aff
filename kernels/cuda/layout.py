"""The expert-sorted order of a routing: by expert, then token, then k. Stable, without sort or host
sync.

The N = T·K entries are cut into at most 128 blocks and each block into 8 contiguous pieces, one per
warp.
  1. `Histogram`: each block counts its entries per expert -> count[block, expert]: sums of
     integers.
  2. `Place`: each block adds up the counts of all blocks (for the experts' offsets) and of those
     before it, counts again per warp, and then every warp walks its piece in order, 32 entries at a
     time:
       row = offset[e] + entries of e in earlier blocks, warps and rounds + those in lower lanes
       (match.any).
Every position is a sum of integer counts, so it doesn't depend on timing. Reads expert_TK twice,
writes row_TK and source_N: 16·N bytes in all; two launches, their latency dominates (196,608
entries are 3 MB).

It takes a fifth of the time of a stable sort with searchsorted (kernels/RESULTS.md).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, const_expr
from cutlass.memory import SmemAllocator
from torch import Tensor

from kernels.cuda.jit import cached, check_device, compile_kernel, fake
from kernels.ops import Layout, check

THREADS = 256
WARPS = THREADS // 32
MAX_BLOCKS = 128  # all run at once, and a block can afford to read all blocks' counts
MAX_EXPERTS = 1024


def num_blocks(entries: int) -> int:
  """Blocks that N entries are cut into."""
  return max(1, min(MAX_BLOCKS, -(-entries // THREADS)))


@cute.jit
def _piece(entries: Int32, blocks: Int32):
  """(first entry, end) of this warp's piece; pieces are multiples of 32 but for the last."""
  bidx, _, _ = cute.arch.block_idx()
  size = cute.ceil_div(entries, blocks * THREADS) * 32
  start = (bidx * WARPS + cute.arch.warp_idx()) * size
  return start, min(start + size, entries)


@cute.jit
def _count_piece(mExpert: cute.Tensor, sCount: cute.Tensor, start: Int32, end: Int32):
  """Add one to sCount[expert] for each entry of the piece."""
  for i in cutlass.range(start + cute.arch.lane_idx(), end, 32, unroll=4):
    cute.arch.atomic_add(sCount.iterator + mExpert[i], Int32(1))


class Histogram:
  """count[block, e] = entries of expert e in the block."""

  def __init__(self, num_experts: int):
    self.num_experts = num_experts

  @cute.jit
  def __call__(self, mExpert: cute.Tensor, mCount: cute.Tensor, stream):
    self.kernel(mExpert, mCount).launch(
      grid=[mCount.shape[0], 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mExpert: cute.Tensor, mCount: cute.Tensor):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    sCount = SmemAllocator().allocate_tensor(Int32, cute.make_layout(self.num_experts), 16)
    for e in cutlass.range(tidx, self.num_experts, THREADS):
      sCount[e] = 0
    cute.arch.sync_threads()
    start, end = _piece(mExpert.shape[0], mCount.shape[0])
    _count_piece(mExpert, sCount, start, end)
    cute.arch.sync_threads()
    for e in cutlass.range(tidx, self.num_experts, THREADS):
      mCount[bidx, e] = sCount[e]


class Place:
  """Offsets from the blocks' counts, then the row of each entry and the entry of each row."""

  def __init__(self, num_experts: int):
    self.num_experts = num_experts
    self.padded = -(-num_experts // 32) * 32

  @cute.jit
  def __call__(self, mExpert, mCount, mOffset, mRow, mSource, stream):
    self.kernel(mExpert, mCount, mOffset, mRow, mSource).launch(
      grid=[mCount.shape[0], 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mExpert, mCount, mOffset, mRow, mSource):
    tidx, _, _ = cute.arch.thread_idx()
    smem = SmemAllocator()
    sTotal = smem.allocate_tensor(Int32, cute.make_layout(self.padded), 16)
    sBefore = smem.allocate_tensor(Int32, cute.make_layout(self.padded), 16)
    sNext = smem.allocate_tensor(
      Int32, cute.make_layout((WARPS, self.padded), stride=(self.padded, 1)), 16
    )
    for e in cutlass.range(tidx, self.padded, THREADS):
      sTotal[e] = 0
      sBefore[e] = 0
      for w in cutlass.range_constexpr(WARPS):
        sNext[w, e] = 0
    cute.arch.sync_threads()
    self.sum_blocks(mCount, sTotal, sBefore)
    start, end = _piece(mExpert.shape[0], mCount.shape[0])
    _count_piece(mExpert, sNext[cute.arch.warp_idx(), None], start, end)
    cute.arch.sync_threads()
    self.scan_experts(sTotal, mOffset)
    cute.arch.sync_threads()
    for e in cutlass.range(tidx, self.num_experts, THREADS):
      following = sTotal[e] + sBefore[e]
      for w in cutlass.range_constexpr(WARPS):
        counted = sNext[w, e]
        sNext[w, e] = following
        following += counted
    cute.arch.sync_threads()
    self.place(mExpert, sNext[cute.arch.warp_idx(), None], mRow, mSource, start, end)

  @cute.jit
  def sum_blocks(self, mCount: cute.Tensor, sTotal: cute.Tensor, sBefore: cute.Tensor):
    """sTotal[e] = entries of e in all blocks, sBefore[e] = in the blocks before this one."""
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    lanes = const_expr(min(self.padded, THREADS))
    groups = const_expr(THREADS // lanes)
    group = tidx // lanes
    if group < groups:
      for e in cutlass.range(tidx % lanes, self.num_experts, lanes):
        total, before = Int32(0), Int32(0)
        for b in cutlass.range(group, mCount.shape[0], groups, unroll=8):
          count = mCount[b, e]
          total += count
          before += count if b < bidx else 0
        cute.arch.atomic_add(sTotal.iterator + e, total)
        cute.arch.atomic_add(sBefore.iterator + e, before)

  @cute.jit
  def scan_experts(self, sTotal: cute.Tensor, mOffset: cute.Tensor):
    """The first warp turns sTotal into its exclusive prefix sum; block 0 writes the offsets."""
    bidx, _, _ = cute.arch.block_idx()
    lane = cute.arch.lane_idx()
    if cute.arch.warp_idx() == 0:
      carry = Int32(0)
      for first in cutlass.range(0, self.padded, 32):
        e = first + lane
        value = sTotal[e]
        inclusive = value
        for step in cutlass.range_constexpr(5):
          below = cute.arch.shuffle_sync_up(inclusive, 1 << step, mask_and_clamp=0)
          if lane >= 1 << step:
            inclusive += below
        sTotal[e] = carry + inclusive - value
        if bidx == 0 and e < self.num_experts:
          mOffset[e + 1] = carry + inclusive
        carry += cute.arch.shuffle_sync(inclusive, 31)
      if bidx == 0 and lane == 0:
        mOffset[0] = 0

  @cute.jit
  def place(self, mExpert, sNext: cute.Tensor, mRow, mSource, start: Int32, end: Int32):
    """Walk the warp's piece in order; sNext[e] is the row of its next entry of expert e."""
    lane = cute.arch.lane_idx()
    for first in cutlass.range(start, end, 32):
      i = first + lane
      expert = Int32(-1)
      if i < end:
        expert = mExpert[i]
      peers = Int32(cute.arch.match_sync(0xFFFFFFFF, expert))
      below = cute.arch.popc(peers & Int32(cute.arch.lanemask_lt()))
      if i < end:
        row = sNext[expert] + below
        mRow[i] = row
        mSource[row] = i
      cute.arch.sync_warp()
      if i < end and below == 0:
        sNext[expert] += cute.arch.popc(peers)
      cute.arch.sync_warp()


@cached
def compile_histogram(num_experts: int):
  expert, count = fake(Int32, None, align=4), fake(Int32, None, num_experts, align=4)
  return compile_kernel(Histogram(num_experts), expert, count)


@cached
def compile_place(num_experts: int):
  expert, count = fake(Int32, None, align=4), fake(Int32, None, num_experts, align=4)
  offset = fake(Int32, num_experts + 1, align=4)
  row, source = fake(Int32, None, align=4), fake(Int32, None, align=4)
  return compile_kernel(Place(num_experts), expert, count, offset, row, source)


def layout(expert_TK: Tensor, num_experts: int) -> Layout:
  """See kernels.ops.Ops.layout. expert_TK int32 in [0, E), E up to 1024, N below 2^31."""
  check_device(expert_TK.device)
  check(expert_TK.dtype == torch.int32, f"expert is {expert_TK.dtype}; need torch.int32")
  check(0 < num_experts <= MAX_EXPERTS, f"num_experts is {num_experts}; need 1 to {MAX_EXPERTS}")
  entries = expert_TK.numel()
  check(
    entries < 2**31 - THREADS * MAX_BLOCKS, f"{entries} rows do not fit 32 bits; route fewer tokens"
  )
  expert_N = expert_TK.reshape(-1)
  offset_E1 = (
    expert_N.new_zeros(num_experts + 1) if entries == 0 else expert_N.new_empty(num_experts + 1)
  )
  row_TK, source_N = torch.empty_like(expert_N), torch.empty_like(expert_N)
  if entries:
    count = expert_N.new_empty(num_blocks(entries), num_experts)
    compile_histogram(num_experts)(expert_N, count)
    compile_place(num_experts)(expert_N, count, offset_E1, row_TK, source_N)
  return Layout(offset_E1, row_TK.view(expert_TK.shape), source_N)
