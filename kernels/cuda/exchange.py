"""Rows between ranks, stored straight through the peers' mapped memory (NVLink), with signals.

The contract is kernels.exchange; all work is queued on the current stream and nothing waits for the
host.

  post_counts  one block writes [E] counts into every peer's count[rank], then signals
  send         a warp reads a token's row (NVFP4: twice) and stores it at its K places, as it is or
               packed, those on this GPU and those on others by different blocks; then one signals
  wait         one block, a thread per peer, spins on this rank's own signals, with a deadline
  receive      a thread copies a row's gate and origin; with a single slot a warp copies the row out
               too, dequantized, or zeros where none arrived
  multiply     the rows of a product; with `fused` its kernel stores them at their origins
               (kernels.cuda.scatter), and no reply reads and writes them again
  reply        a warp stores a row at its origin; then one block signals

A product that returns its rows takes 1.05 (y) to 1.07 (dx) of the product alone, where memory is
one GPU's (kernels/RESULTS.md).

Memory order: a kernel's stores, its epilogue's among them, are performed when it ends, and happen
before the signalling block, which comes later on the stream. That block fences at system scope and
stores its signals with release.sys, which is cumulative: it publishes all that happened before it,
not its own thread's stores alone. The waiting thread loads the signals with acquire.sys, and what
is launched after it reads the rows. So the stores themselves can be plain ones.

Bytes moved: send at most D·(2 + K) elements a token, receive (of one slot) and reply 2·D a row, all
in 16-byte accesses. Of the bytes of bf16 a row has on its way 33/64 as MXFP8, and 9/32 and 4 bytes
as NVFP4, whose codes move in 8-byte accesses; scales are stored as bytes, 16 or 32 neighbours by a
warp. Packed rows of either format lie at one stride, the longer one's. A wait that misses its
deadline writes what it saw into pinned host memory and traps, so nothing after it runs.

One file: the kernels of a trip rest on one argument about the order of stores and signals.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint8, const_expr
from torch import Tensor

from kernels.buffers import DISPATCH, RETURN, Buffers, Route
from kernels.cuda import gemms, scatter
from kernels.cuda.jit import (
  DTYPES,
  cached,
  check_device,
  compile_kernel,
  contiguous,
  fake,
  vector_at,
  vector_width,
)
from kernels.cuda.places import places
from kernels.cuda.rows import CODES, copy_row, pack_row, put, put_vector, unpack
from kernels.cuda.signals import (
  BACK,
  BACK_GATE,
  GATE,
  ORIGIN,
  ROW,
  address_table,
  compile_post_counts,
  compile_signal,
  compile_wait,
)
from kernels.ops import Product, check
from kernels.places import Places
from kernels.sizes import row_bytes

THREADS = 512
WARPS = THREADS // 32
BLOCKS = 32  # of send and reply at most: the SMs that communication takes from GEMMs beside it
COPY_BLOCKS = 528  # of receive, which runs alone
FUSED = True  # whether products return their rows themselves; `nmoe bench rdep` measures both


class Send:
  """A warp per token and kind of place: a read of the row, stores to its owners, origin and gate.

  Of the blocks, blocks // ranks store the rows that stay on their GPU and the others those that
  leave: on an SM that stores both, rows that stay seem to wait behind rows that leave. With one
  rank, or fewer blocks than ranks, each stores both. `packed` stores all in this rank's own back
  buffer instead, in the layout's order.
  """

  def __init__(self, width: int, top_k: int, packed: bool, format: str, stride: int):
    self.width, self.top_k, self.packed, self.format = width, top_k, packed, format
    self.stride = stride  # bytes from row to row

  @cute.jit
  def __call__(
    self,
    mX: cute.Tensor,
    mGate,
    mExpert: cute.Tensor,
    mRow: cute.Tensor,
    mOffset: cute.Tensor,
    mBase: cute.Tensor,
    mTable: cute.Tensor,
    low: Int64,
    capacity: Int64,
    start: Int64,
    rank: Int32,
    rows: Int32,
    most: Int32,
    stream,
  ):
    kinds = const_expr(1 if self.packed else 2)
    blocks = cutlass.min(most, kinds * cute.ceil_div(mX.shape[0], WARPS))
    scalars = (low, capacity, start, rank, rows)
    self.kernel(mX, mGate, mExpert, mRow, mOffset, mBase, mTable, *scalars).launch(
      grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self,
    mX: cute.Tensor,
    mGate,
    mExpert: cute.Tensor,
    mRow: cute.Tensor,
    mOffset: cute.Tensor,
    mBase: cute.Tensor,
    mTable: cute.Tensor,
    low: Int64,
    capacity: Int64,
    start: Int64,
    rank: Int32,
    rows: Int32,
  ):
    lane = cute.arch.lane_idx()
    bidx, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    ranks = mTable.shape[1]
    held = mBase.shape[0] // ranks
    here, away = True, True
    if const_expr(not self.packed):
      staying = blocks // ranks
      if ranks > 1 and staying > 0:
        here, away = bidx < staying, bidx >= staying
        blocks = staying if here else blocks - staying
        bidx = bidx if here else bidx - staying
    for token in cutlass.range(bidx * WARPS + cute.arch.warp_idx(), mX.shape[0], blocks * WARPS):
      target, found = [], Int32(0)
      for first in cutlass.range_constexpr(0, self.top_k, 32):
        address = Int64(0)  # lane k finds that of slot first + k
        if first + lane < self.top_k:
          item = token * self.top_k + first + lane
          expert = mExpert[item]
          place = mBase[expert] + mRow[item] - mOffset[expert] - low
          if place >= 0 and place < capacity:
            if const_expr(self.packed):
              row = Int64(mRow[item])
              address = mTable[BACK, rank] + row * self.stride
              if const_expr(mGate is not None):
                put(Float32, mTable[BACK_GATE, rank] + row * 4, mGate[item])
            else:
              owner = expert // held
              if here if owner == rank else away:
                address = mTable[ROW, owner] + (start + place) * self.stride
                put(Int32, mTable[ORIGIN, owner] + place * 4, rank * rows + Int32(item))
                if const_expr(mGate is not None):
                  put(Float32, mTable[GATE, owner] + place * 4, mGate[item])
        found |= cute.arch.vote_ballot_sync(address != 0)
        for k in cutlass.range_constexpr(min(32, self.top_k - first)):
          target.append(cute.arch.shuffle_sync(address, k))
      if found != 0:
        if const_expr(self.format == "bf16"):
          copy_row(mX, Int64(token), target, self.width)
        else:
          pack_row(mX, Int64(token), target, self.format)


class Receive:
  """A warp per row: a copy, or zeros where nothing arrived; the buffer's origin is reset."""

  def __init__(self, dtype: type, width: int, dim: int, format: str):
    self.dtype, self.width, self.dim, self.format = dtype, width, dim, format

  @cute.jit
  def __call__(self, mRow, mGate, mOrigin, mOutRow, mOutGate, mOutOrigin, stream):
    blocks = cutlass.min(COPY_BLOCKS, cute.ceil_div(mOutRow.shape[0], WARPS))
    self.kernel(mRow, mGate, mOrigin, mOutRow, mOutGate, mOutOrigin).launch(
      grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mRow, mGate, mOrigin, mOutRow, mOutGate, mOutOrigin):
    lane = cute.arch.lane_idx()
    bidx, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    for row in cutlass.range(bidx * WARPS + cute.arch.warp_idx(), mOutRow.shape[0], blocks * WARPS):
      origin = mOrigin[row]
      cute.arch.sync_warp()
      if lane == 0:
        mOutOrigin[row] = origin
        mOutGate[row] = mGate[row]
        mOrigin[row] = Int32(-1)
      for column in cutlass.range(lane * self.width, self.dim, 32 * self.width, unroll=4):
        rX = cute.make_rmem_tensor(self.width, self.dtype)
        if const_expr(self.format == "bf16"):
          cute.autovec_copy(vector_at(mRow, Int64(row) * self.dim + column, self.width), rX)
        else:
          values = unpack(mRow, Int64(row), column, self.dim, self.format)
          rX.store(values.load().to(self.dtype))
        if origin < 0:
          rX.fill(self.dtype(0.0))
        bytes_per = const_expr(self.dtype.width // 8)
        out = mOutRow.iterator.toint() + (Int64(row) * self.dim + column) * bytes_per
        put_vector(rX, out)


class Settle:
  """A thread per row that stays where it is: its gate and origin out, the buffer's origin reset."""

  @cute.jit
  def __call__(self, mGate, mOrigin, mOutGate, mOutOrigin, stream):
    blocks = cute.ceil_div(mOutOrigin.shape[0], THREADS)
    self.kernel(mGate, mOrigin, mOutGate, mOutOrigin).launch(
      grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mGate, mOrigin, mOutGate, mOutOrigin):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    row = bidx * THREADS + tidx
    if row < mOutOrigin.shape[0]:
      mOutOrigin[row] = mOrigin[row]
      mOutGate[row] = mGate[row]
      mOrigin[row] = Int32(-1)


class Reply:
  """A warp per row: stored at t·K + k of the rank that it came from, with its gate gradient."""

  def __init__(self, dtype: type, width: int, dim: int, gates: bool):
    self.dtype, self.width, self.dim, self.gates = dtype, width, dim, gates

  @cute.jit
  def __call__(
    self,
    mRow: cute.Tensor,
    mGate,
    mOrigin: cute.Tensor,
    mTable: cute.Tensor,
    items: Int32,
    most: Int32,
    stream,
  ):
    blocks = cutlass.min(most, cute.ceil_div(mRow.shape[0], WARPS))
    self.kernel(mRow, mGate, mOrigin, mTable, items).launch(
      grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self, mRow: cute.Tensor, mGate, mOrigin: cute.Tensor, mTable: cute.Tensor, items: Int32
  ):
    lane = cute.arch.lane_idx()
    bidx, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    for row in cutlass.range(bidx * WARPS + cute.arch.warp_idx(), mRow.shape[0], blocks * WARPS):
      origin = mOrigin[row]
      if origin >= 0:
        source, item = origin // items, Int64(origin % items)
        if const_expr(self.gates):
          if lane == 0:
            put(Float32, mTable[BACK_GATE, source] + item * 4, mGate[row])
        back = mTable[BACK, source] + item * const_expr(self.dim * self.dtype.width // 8)
        copy_row(mRow, Int64(row), [back], self.width)


@cached
def compile_send(dtype, dim: int, top_k: int, gates: bool, packed: bool, format: str, stride: int):
  x = fake(DTYPES[dtype], None, dim)
  gate = fake(Float32, None, align=4) if gates else None
  expert, row, offset = (fake(Int32, None, align=4) for _ in range(3))
  base = fake(Int64, None, align=8)
  kernel = Send(vector_width(dtype, dim, "x"), top_k, packed, format, stride)
  scalars = (Int64(0), Int64(0), Int64(0), Int32(0), Int32(0), Int32(1))
  return compile_kernel(kernel, x, gate, expert, row, offset, base, address_table(), *scalars)


@cached
def compile_receive(dtype, dim: int, format: str, stride: int):
  out = fake(DTYPES[dtype], None, dim)
  row = fake(DTYPES[dtype], None, dim) if format == "bf16" else fake(Uint8, None, stride)
  gate, out_gate = fake(Float32, None, align=4), fake(Float32, None, align=4)
  origin, out_origin = fake(Int32, None, align=4), fake(Int32, None, align=4)
  width = vector_width(dtype, dim, "rows") if format == "bf16" else CODES
  kernel = Receive(DTYPES[dtype], width, dim, format)
  return compile_kernel(kernel, row, gate, origin, out, out_gate, out_origin)


@cached
def compile_settle():
  gate, out_gate = fake(Float32, None, align=4), fake(Float32, None, align=4)
  origin, out_origin = fake(Int32, None, align=4), fake(Int32, None, align=4)
  return compile_kernel(Settle(), gate, origin, out_gate, out_origin)


@cached
def compile_reply(dtype, dim: int, gates: bool):
  row = fake(DTYPES[dtype], None, dim)
  gate = fake(Float32, None, align=4) if gates else None
  kernel = Reply(DTYPES[dtype], vector_width(dtype, dim, "rows"), dim, gates)
  origin = fake(Int32, None, align=4)
  return compile_kernel(kernel, row, gate, origin, address_table(), Int32(0), Int32(1))


class Fetched:
  """A copy into pinned memory. Elements that have not come are -1 there, or of the one before."""

  def __init__(self, x: Tensor):
    self._host = torch.full(x.shape, -1, dtype=x.dtype, pin_memory=True)
    self._ready = torch.cuda.Event()
    self.take(x)

  def take(self, x: Tensor) -> None:
    self._host.copy_(x, non_blocking=True)
    self._ready.record()

  def __call__(self) -> list:
    self._ready.synchronize()
    return self._host.tolist()

  def here(self) -> list | None:
    """After a wait trapped no event can be asked, so the elements are."""
    return None if (self._host < 0).any() else self._host.tolist()


class Exchange:
  """The movers of one rank (kernels.exchange.Exchange)."""

  def __init__(self, peers: list[Buffers], rank: int, deadline_s: float):
    self.peers, self.rank, self.deadline_ns = peers, rank, round(deadline_s * 1e9)
    self.mine = peers[rank]
    self.capacity, self.rows = self.mine.gate_C.shape[0], self.mine.back_ND.shape[0]
    self.in_place = self.mine.row_CD.shape[0] > self.capacity
    self.dtype, self.dim = self.mine.back_ND.dtype, self.mine.back_ND.shape[1]
    self.stride = self.mine.row_CD.shape[1] * self.mine.row_CD.dtype.itemsize
    device = self.mine.row_CD.device
    check_device(device)
    check(len(peers) <= THREADS, f"{len(peers)} ranks; at most {THREADS} are supported")
    addresses = [[t.data_ptr() for t in field] for field in zip(*peers, strict=True)]
    self.table = torch.tensor(addresses, dtype=torch.int64).to(device)
    pinned = device.type == "cuda"
    self.record = torch.zeros(2 + len(peers), dtype=torch.int64, pin_memory=pinned)
    self.record_address = torch.tensor([self.record.data_ptr()]).to(device)
    self.full = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
    self.full_address = torch.tensor([self.full.data_ptr()]).to(device)
    self.placed = torch.cuda.Event(external=True) if pinned else None  # also recorded by replays
    self.marked = False
    self.higher = torch.zeros(1, dtype=torch.int64, device=device)  # by which a replay's trips are
    self.mine.origin_C.fill_(-1)
    self.address_C = torch.empty(self.capacity, dtype=torch.int64, device=device)  # never freed
    self.stream = torch.cuda.Stream(device, priority=-1) if pinned else None
    self.blocks: int | None = BLOCKS
    self.fused = FUSED

  def post_counts(self, trip: int, count_E: Tensor) -> None:
    compile_post_counts()(count_E, self.table, self.higher, self.rank, trip)

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
    self._launch_send(x_TD, gate_TK, route, low, format, slot, packed=False)
    compile_signal()(self.table, self.higher, DISPATCH, self.rank, trip)

  def _launch_send(
    self,
    x_TD: Tensor,
    gate_TK: Tensor | None,
    route: Route,
    low: int,
    format: str,
    slot: int = 0,
    *,
    packed: bool,
  ) -> None:
    self._check_format(format)
    check(
      x_TD.dtype == self.dtype and x_TD.shape[1] == self.dim,
      f"send: x is {x_TD.dtype} {tuple(x_TD.shape)}; need {self.dtype} rows of {self.dim}",
    )
    contiguous(x=x_TD)
    if route.expert_TK.numel():
      gate = None if gate_TK is None else gate_TK.flatten()
      key = x_TD.dtype, self.dim, route.expert_TK.shape[1], gate is not None, packed
      compile_send(*key, format, self.stride)(
        x_TD,
        gate,
        route.expert_TK.flatten(),
        route.layout.row_TK.flatten(),
        route.layout.offset_E1,
        route.base_RE[self.rank],
        self.table,
        low,
        self.capacity,
        slot * self.capacity,
        self.rank,
        self.rows,
        self.blocks,
      )

  def _check_format(self, format: str) -> None:
    """The kernels write rows of this format where the buffer has rows of this stride."""
    kept = self.mine.row_CD.dtype
    fits = kept == self.dtype
    if format != "bf16":
      fits = kept == torch.uint8 and row_bytes(self.dim, format) <= self.stride
    check(fits, f"rows of {self.stride} bytes, {kept}, cannot hold {self.dim} elements as {format}")

  def receive(self, num_rows: int, format: str, slot: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    self._check_format(format)
    mine = self.mine
    gate, origin = mine.gate_C.new_empty(num_rows), mine.origin_C.new_empty(num_rows)
    if self.in_place:
      start = slot * self.capacity
      if num_rows:
        compile_settle()(mine.gate_C, mine.origin_C, gate, origin)
      return mine.row_CD[start : start + num_rows], gate, origin
    row = mine.back_ND.new_empty(num_rows, self.dim)
    if num_rows:
      run = compile_receive(self.dtype, self.dim, format, self.stride)
      run(mine.row_CD, mine.gate_C, mine.origin_C, row, gate, origin)
    return row, gate, origin

  def multiply(
    self, product: Product, origin_C: Tensor, gate_C: Tensor | None = None
  ) -> Tensor | None:
    if not self.fused:
      return gemms.rows(*product)
    back_R, back_gate_R = self.table[BACK], self.table[BACK_GATE]
    row_bytes = self.dim * self.dtype.itemsize
    to = self.address_C[: origin_C.shape[0]]
    scatter.addresses(origin_C, back_R, back_gate_R, gate_C, self.rows, row_bytes, to)
    scatter.rows(*product, to)
    return None

  def reply(
    self,
    trip: int,
    origin_C: Tensor,
    row_CD: Tensor | None,
    gate_C: Tensor | None,
    route: Route,
    low: int,
  ) -> None:
    if row_CD is not None and row_CD.shape[0]:
      contiguous(rows=row_CD)
      run = compile_reply(self.dtype, self.dim, gate_C is not None)
      run(row_CD, gate_C, origin_C, self.table, self.rows, self.blocks)
    compile_signal()(self.table, self.higher, RETURN, self.rank, trip)

  def collect(self, route: Route) -> tuple[Tensor, Tensor]:
    shape = route.expert_TK.shape
    items = shape.numel()
    back_TKD = self.mine.back_ND[:items].unflatten(0, shape)
    return back_TKD, self.mine.back_gate_N[:items].view(shape)

  def wait(self, kind: int, trip: int) -> list[int]:
    numbers = self.record_address, self.higher
    compile_wait()(self.mine.signal_KRS, *numbers, kind, trip, self.deadline_ns)
    return []

  def late(self) -> tuple[int, int, list[int]] | None:
    kind, trip, *ranks = self.record.tolist()
    found = [rank for rank, late in enumerate(ranks) if late]
    return (kind, trip, found) if found else None

  @contextmanager
  def beside(self) -> Iterator[None]:
    """Inside is the exchange's own stream, after what is queued so far."""
    if self.stream is None:
      yield
      return
    current = torch.cuda.current_stream(self.stream.device_index)
    self.stream.wait_stream(current)
    torch.cuda.set_stream(self.stream)  # torch.cuda.stream asks for the device, twice
    try:
      yield
    finally:
      torch.cuda.set_stream(current)

  def leaving(self) -> AbstractContextManager[None]:
    return gemms.leaving(self.blocks or 0)

  def join(self) -> None:
    if self.stream is not None:
      torch.cuda.current_stream(self.stream.device_index).wait_stream(self.stream)

  def places(self, alignment: int) -> tuple[Tensor, Places]:
    self.marked = False
    return places(self.mine.count_RE, alignment, self.capacity, self.full_address)

  def mark(self) -> None:
    if self.placed is not None:
      self.placed.record()
    self.marked = True

  def overflowed(self) -> bool:
    if not self.marked:
      self.mark()
    if self.placed is not None:
      self.placed.synchronize()
    full = bool(self.full)
    self.full.zero_()
    return full

  def fetch(self, x: Tensor, before: Fetched | None = None) -> Fetched:
    if before is None:
      return Fetched(x)
    before.take(x)
    return before

  @contextmanager
  def replayed(self, trips: int) -> Iterator[None]:
    self.higher.fill_(trips)
    yield
    self.higher.zero_()
