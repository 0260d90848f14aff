"""What a rank tells the others, and how it waits for them: the counts, the signals, the deadline.

A signal is the number of the last trip (kernels.exchange) of which a rank's writes are
complete, one for each kind and rank. A kernel adds `mHigher`, which is in the device's memory, to
the trip that it is told: a CUDA graph, which repeats what it was told, goes on with new numbers.
Whoever signals fences at system scope and stores with release.sys, which is cumulative; whoever
waits loads with acquire.sys (kernels.cuda.exchange).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from kernels.buffers import COUNTS, Buffers
from kernels.cuda.jit import cached, compile_kernel, fake
from kernels.cuda.rows import pointer, put
from kernels.sizes import SIGNAL_STRIDE

THREADS = 512  # of the one block: ranks at most

COUNT, ROW, GATE, ORIGIN, BACK, BACK_GATE, SIGNAL = range(7)  # rows of the address table


@dsl_user_op
def _trap(*, loc=None, ip=None) -> None:
  llvm.inline_asm(
    None,
    [],
    "trap;",
    "",
    has_side_effects=True,
    is_align_stack=False,
    asm_dialect=llvm.AsmDialect.AD_ATT,
    loc=loc,
    ip=ip,
  )


@cute.jit
def _signal(mTable: cute.Tensor, kind: Int32, rank: Int32, trip: Int64) -> None:
  """Thread r stores `trip` as this rank's signal on rank r, after all that it saw before."""
  peer, _, _ = cute.arch.thread_idx()
  ranks = mTable.shape[1]
  if peer < ranks:
    cute.arch.fence_acq_rel_sys()
    address = mTable[SIGNAL, peer] + (Int64(kind) * ranks + rank) * (8 * SIGNAL_STRIDE)
    cute.arch.store(pointer(Int64, address, 8), trip, sem="release", scope="sys")


class Signal:
  """One block: tell every rank that this rank's trip is complete."""

  @cute.jit
  def __call__(
    self, mTable: cute.Tensor, mHigher: cute.Tensor, kind: Int32, rank: Int32, trip: Int64, stream
  ):
    self.kernel(mTable, mHigher, kind, rank, trip).launch(
      grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self, mTable: cute.Tensor, mHigher: cute.Tensor, kind: Int32, rank: Int32, trip: Int64
  ):
    _signal(mTable, kind, rank, trip + mHigher[0])


class PostCounts:
  """One block: the counts into every rank's count[rank], then the signal."""

  @cute.jit
  def __call__(
    self,
    mCount: cute.Tensor,
    mTable: cute.Tensor,
    mHigher: cute.Tensor,
    rank: Int32,
    trip: Int64,
    stream,
  ):
    self.kernel(mCount, mTable, mHigher, rank, trip).launch(
      grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self, mCount: cute.Tensor, mTable: cute.Tensor, mHigher: cute.Tensor, rank: Int32, trip: Int64
  ):
    tidx, _, _ = cute.arch.thread_idx()
    experts, ranks = mCount.shape[0], mTable.shape[1]
    for i in cutlass.range(tidx, ranks * experts, THREADS):
      peer, expert = i // experts, i % experts
      put(Int32, mTable[COUNT, peer] + (Int64(rank) * experts + expert) * 4, mCount[expert])
    cute.arch.fence_acq_rel_sys()
    cute.arch.sync_threads()
    _signal(mTable, Int32(COUNTS), rank, trip + mHigher[0])


class Wait:
  """Thread r spins until rank r's signal reaches `trip`; past the deadline it records and traps."""

  @cute.jit
  def __call__(
    self,
    mSignal: cute.Tensor,
    mRecord: cute.Tensor,
    mHigher: cute.Tensor,
    kind: Int32,
    trip: Int64,
    deadline_ns: Int64,
    stream,
  ):
    self.kernel(mSignal, mRecord, mHigher, kind, trip, deadline_ns).launch(
      grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self,
    mSignal: cute.Tensor,
    mRecord: cute.Tensor,
    mHigher: cute.Tensor,
    kind: Int32,
    told: Int64,
    deadline_ns: Int64,
  ):
    peer, _, _ = cute.arch.thread_idx()
    trip = told + mHigher[0]
    seen, waiting = trip, peer < mSignal.shape[1]
    signal = mSignal.iterator + (kind * mSignal.shape[1] + peer) * SIGNAL_STRIDE
    begun = cute.arch.globaltimer()
    while waiting:
      seen = cute.arch.load(signal, Int64, sem="acquire", scope="sys")
      waiting = (seen < trip) & (cute.arch.globaltimer() - begun < deadline_ns)
    if seen < trip:
      record = mRecord[0]
      put(Int64, record, Int64(kind))
      put(Int64, record + 8, trip)
      put(Int64, record + 16 + 8 * Int64(peer), Int64(1))
      cute.arch.fence_acq_rel_sys()
    cute.arch.sync_threads()
    if seen < trip:
      _trap()


def address_table():
  return fake(Int64, len(Buffers._fields), None, align=8)


def one_number():
  return fake(Int64, 1, align=8)


@cached
def compile_signal():
  return compile_kernel(Signal(), address_table(), one_number(), Int32(0), Int32(0), Int64(0))


@cached
def compile_post_counts():
  tables = fake(Int32, None, align=4), address_table(), one_number()
  return compile_kernel(PostCounts(), *tables, Int32(0), Int64(0))


@cached
def compile_wait():
  signal = fake(Int64, 3, None, SIGNAL_STRIDE, align=8)
  numbers = one_number(), one_number()
  return compile_kernel(Wait(), signal, *numbers, Int32(0), Int64(0), Int64(0))
