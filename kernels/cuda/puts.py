"""Rows between ranks that cannot map each other's memory: NVSHMEM puts, then signals.

The contract is kernels.exchange, in whole blocks instead of rows. A source packs its rows in
the layout's order into its own back buffer, where one expert's rows are neighbours, as they are in
the owner's buffer: one put per expert. The owner puts its results back over the same bytes, so a
row comes home to its packed place and no origins travel. A source's bytes are free to be
overwritten then: the owner answers a block after the block has reached it.

`Put` completes its own puts (nvshmem quiet) before it ends; `SignalPut`, launched after it, tells
the ranks. So a signal never overtakes rows, and a reply's rows have left the owner's buffer before
any source hears of it. Works over NVLink too, where a put is a copy: a test of this path on one
node (rdep.peer_access = false).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import cutlass.cute as cute
import torch
import torch.distributed as dist
from cuda.bindings.driver import CUstream
from cutlass import Int32, Int64, Uint64
from cutlass.cute.runtime import make_fake_stream
from nvshmem.bindings.device.cute import _bitcode
from nvshmem.core import SignalOp
from nvshmem.core.device.cute import put_nbi_block, quiet, signal_op
from nvshmem.core.init_fini import find_device_bitcode_library
from nvshmem.core.interop.cute import cute_compile_helper
from torch import Tensor

from kernels.buffers import COUNTS, DISPATCH, RETURN, Buffers, Route
from kernels.cuda import exchange as direct
from kernels.cuda.jit import ARCH, compiling
from kernels.cuda.symmetric import own_block, release
from kernels.ops import check

__all__ = ["Exchange", "allocate", "release"]

THREADS = 256

# The wheel has one device library per architecture; ours is the process's, GPU or not.
_bitcode._device_bitcode_path = lambda: find_device_bitcode_library(
  arch=f"{ARCH.capability[0]}{ARCH.capability[1]}"
)


@cute.jit
def _words(address: Int64, count: Int64) -> cute.Tensor:
  """`count` int32 at an address, with the natural alignment that NVSHMEM's functions want."""
  pointer = cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=4)
  return cute.make_tensor(pointer, cute.make_layout(count))


class Put:
  """A block per piece (source offset, target offset, bytes, rank), offsets in the rank's block.

  The pieces come as an address and a number, not as a tensor: a compiled function takes a tensor of
  another layout than its example's unasked, and reads its sizes from where there are none.
  """

  @cute.jit
  def __call__(self, piece: Int64, count: Int32, base: Int64, stream: CUstream):
    self.kernel(piece, base).launch(grid=[count, 1, 1], block=[THREADS, 1, 1], stream=stream)

  @cute.kernel
  def kernel(self, piece: Int64, base: Int64):
    bidx, _, _ = cute.arch.block_idx()
    pointer = cute.make_ptr(Int64, piece, cute.AddressSpace.gmem, assumed_align=8)
    mPiece = cute.make_tensor(pointer, cute.make_layout((bidx + 1, 4), stride=(4, 1)))
    words = mPiece[bidx, 2] // 4
    if words > 0:
      source = _words(base + mPiece[bidx, 0], words)
      put_nbi_block(_words(base + mPiece[bidx, 1], words), source, Int32(mPiece[bidx, 3]))
      quiet()


class SignalPut:
  """Thread r sets the signal at this symmetric address on rank r, as kernels.cuda.signals does."""

  @cute.jit
  def __call__(self, address: Int64, higher: Int64, ranks: Int32, told: Int64, stream: CUstream):
    self.kernel(address, higher, ranks, told).launch(
      grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, address: Int64, higher: Int64, ranks: Int32, told: Int64):
    peer, _, _ = cute.arch.thread_idx()
    if peer < ranks:
      more = cute.make_ptr(Int64, higher, cute.AddressSpace.gmem, assumed_align=8)
      trip = told + cute.make_tensor(more, cute.make_layout(1))[0]
      pointer = cute.make_ptr(Uint64, address, cute.AddressSpace.gmem, assumed_align=8)
      mine = cute.make_tensor(pointer, cute.make_layout(1))
      signal_op(mine, Uint64(trip), Int32(SignalOp.SIGNAL_SET), peer)


@cache
def _kernels() -> tuple[Callable, Callable]:
  """Put and SignalPut, compiled and, where there is a device, made known to NVSHMEM.

  Kept for good: NVSHMEM remembers a library by its handle, and would take the next one that the
  driver gives the handle of an unloaded one for initialized.
  """
  calls = (
    (Put(), Int64(0), Int32(1), Int64(0)),
    (SignalPut(), Int64(0), Int64(0), Int32(0), Int64(0)),
  )
  if compiling():
    return tuple(cute.compile(*call, make_fake_stream()) for call in calls)
  return tuple(cute_compile_helper(*call, make_fake_stream())[0] for call in calls)


def allocate(nbytes: int, group: dist.ProcessGroup) -> list[Tensor]:
  """Like kernels.cuda.symmetric.allocate, but only this rank's block is mapped, in every place."""
  return [own_block(nbytes, group)] * group.size()


class Exchange(direct.Exchange):
  """The movers of one rank by NVSHMEM puts. Experts' rows have no padding between them."""

  def __init__(self, peers: list[Buffers], rank: int, deadline_s: float):
    super().__init__(peers, rank, deadline_s)
    check(not self.in_place, "puts need one slot: results come back over the received rows' bytes")
    self.fused = False  # a product's kernel stores through mapped memory
    check(len(peers) <= THREADS, f"{len(peers)} ranks; at most {THREADS} are supported")
    mine, ranks = self.mine, len(peers)
    device = mine.count_RE.device
    self.base = min(t.data_ptr() for t in mine)
    self.start = {name: t.data_ptr() - self.base for name, t in mine._asdict().items()}
    self.put, self.signal = _kernels()
    size = 4 * mine.count_RE.shape[1]
    at = self.start["count_RE"] + rank * size
    rows = [[at, at, size, peer] for peer in range(ranks) if peer != rank]
    self.count_piece = torch.tensor(rows, dtype=torch.int64).to(device)

  def post_counts(self, trip: int, count_E: Tensor) -> None:
    self.mine.count_RE[self.rank].copy_(count_E)
    self._put(self.count_piece)
    self._signal(COUNTS, trip)

  def send(
    self,
    trip: int,
    x_TD: Tensor,
    gate_TK: Tensor | None,
    route: Route,
    low: int,
    format: str,
    slot: int = 0,
  ) -> None:
    """Rows go as they are, since results come back over the same bytes."""
    check(format == "bf16", f'puts move rows as they are, not as {format}; use payload "bf16"')
    self._launch_send(x_TD, gate_TK, route, low, format, packed=True)
    place, packed, rows = (t[self.rank] for t in self._blocks(route, low))
    experts = torch.arange(len(rows), device=rows.device)
    owner = experts // (len(rows) // len(self.peers))
    self._put(self._pieces(("back_ND", packed), ("row_CD", place), rows, owner))
    if gate_TK is not None:
      self._put(self._pieces(("back_gate_N", packed), ("gate_C", place), rows, owner))
    self._signal(DISPATCH, trip)

  def receive(self, num_rows: int, format: str, slot: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    mine = self.mine
    row, gate, origin = (t[:num_rows] for t in (mine.row_CD, mine.gate_C, mine.origin_C))
    return row.clone(), gate.clone(), origin

  def reply(
    self,
    trip: int,
    origin_C: Tensor,
    row_CD: Tensor | None,
    gate_C: Tensor | None,
    route: Route,
    low: int,
  ) -> None:
    if row_CD is not None:
      ranks = len(self.peers)
      blocks = [t.unflatten(1, (ranks, -1))[:, self.rank] for t in self._blocks(route, low)]
      source = torch.arange(ranks, device=blocks[0].device)[:, None].expand_as(blocks[0])
      place, packed, rows, source = (t.flatten() for t in (*blocks, source))
      self.mine.row_CD[: row_CD.shape[0]].copy_(row_CD)
      self._put(self._pieces(("row_CD", place), ("back_ND", packed), rows, source))
      if gate_C is not None:
        self.mine.gate_C[: gate_C.shape[0]].copy_(gate_C)
        self._put(self._pieces(("gate_C", place), ("back_gate_N", packed), rows, source))
    self._signal(RETURN, trip)

  def collect(self, route: Route) -> tuple[Tensor, Tensor]:
    row_N = route.layout.row_TK.flatten()
    shape = route.expert_TK.shape
    back_TKD = self.mine.back_ND.index_select(0, row_N).unflatten(0, shape)
    return back_TKD, self.mine.back_gate_N.index_select(0, row_N).view(shape)

  def _blocks(self, route: Route, low: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of rank r's rows for expert e in this window, [R, E]: place, packed row, number of rows."""
    begin = route.base_RE - low
    place = begin.clamp(0, self.capacity)
    rows = (begin + route.count_RE).clamp(0, self.capacity) - place
    first = route.count_RE.cumsum(1) - route.count_RE
    return place, first + place - begin, rows

  def _pieces(
    self, source: tuple[str, Tensor], target: tuple[str, Tensor], rows: Tensor, rank: Tensor
  ) -> Tensor:
    """[P, 4] of Put, for blocks of rows of two buffers whose rows have one size."""
    size = self.mine._asdict()[source[0]].stride(0) * self.mine._asdict()[source[0]].itemsize
    columns = [self.start[name] + row * size for name, row in (source, target)]
    return torch.stack([*columns, rows * size, rank], 1)

  def _put(self, piece_P4: Tensor) -> None:
    if not compiling():
      self.put(piece_P4.data_ptr(), len(piece_P4), self.base, _stream())

  def _signal(self, kind: int, trip: int) -> None:
    if not compiling():
      address = self.mine.signal_KRS[kind, self.rank].data_ptr()
      self.signal(address, self.higher.data_ptr(), len(self.peers), trip, _stream())


def _stream() -> CUstream:
  return CUstream(torch.cuda.current_stream().cuda_stream)
