"""Rows of a grouped product, each stored at an address of its own: on this GPU or on a peer.

  *address[n] = a[n] · w[e]ᵀ   row n of expert e, bf16; address 0 drops it

QuACK's grouped kernel with another epilogue, which stores from registers. An accumulator gives a
lane four bytes of a row (sm_90a), or 32 rows 16 bytes each to one store of a warp (sm_100a), so
quads exchange values until a store covers 64 bytes of a row. The sums are those of `gemms.rows`,
bit for bit, and so is their rounding.

Compiled for moonlet (tile 192 x 128, and 256 x 256): sm_90a 2024 instructions, 168 registers,
`gemms.rows` 1640 and 168; sm_100a 2888 and 65, `gemms.rows` 2344 and 60; no spills. Sending rows
from shared memory by cp.async.bulk takes 1808 and 3120, but one warp issues it one lane after the
other, 384 and 1024 times a tile.

All stores are complete when the kernel ends: a kernel that is launched after it may announce them.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float32, Int32, Int64, const_expr
from quack.compile_utils import make_fake_tensor
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import EpiOp
from quack.gemm_runtime.host import FakeArgCtx, run_gemm_epi_plan
from quack.gemm_tvm_ffi_utils import (
  compile_gemm_kernel,
  make_fake_gemm_tensors,
  make_fake_scheduler_args,
  make_fake_varlen_args,
)
from quack.rounding import RoundingMode
from torch import Tensor

from kernels.cuda import gemms
from kernels.cuda.jit import ARCH, cached, check_device, compile_kernel, compiling, fake
from kernels.ops import check, check_same_device

THREADS = 256
COLUMNS = 32  # of a row, in one store of a quad; tiles are multiples of it


@cute.jit
def _transpose(rX: cute.Tensor, words: cutlass.Constexpr[int]) -> None:
  """Between the four lanes of a quad: item p of lane q becomes item q of lane p.

  rX holds four items of so many 32-bit words.
  """
  for bit in cutlass.range_constexpr(2):
    step = const_expr(1 << bit)
    low = cute.arch.lane_idx() & step == 0
    for i in cutlass.range_constexpr(4 * words):
      if const_expr(i // words & step == 0):
        mine, theirs = rX[i], rX[i + step * words]
        sent = theirs if low else mine
        other = cute.arch.shuffle_sync_bfly(sent, offset=step)
        rX[i] = mine if low else other
        rX[i + step * words] = other if low else theirs


class RowStore(EpiOp):
  """A sink of the epilogue: bf16 rows to the addresses of an int64 table, one for each row.

  A thread's fragment comes in groups of 32 columns. On sm_90a a group is one row in the registers
  of a quad, each lane holding two of every 8 columns; transposed, lane q holds columns 8q : 8q + 8.
  On sm_100a it is a row of each lane; transposed, lane q holds columns 8q : 8q + 8 of all four
  rows. Then a store of 16 bytes by each lane covers 64 bytes of each of 8 rows.
  """

  fn_port = "sink"

  def host_arg_key(self, value):
    return None if value is None else (Int64, value.ndim)

  def host_fake_arg(self, key, fctx: FakeArgCtx):
    return make_fake_tensor(Int64, (fctx.m,), leading_dim=0, divisibility=1)

  def param_fields(self):
    return [(self.name, object, None)]

  def to_params(self, gemm, args):
    return {self.name: getattr(args, self.name)}

  def _groups(self, gemm, coordinates: cute.Tensor) -> list[tuple[int, list[int]]]:
    """(which of the thread's rows, index of the first element of each of 4 items) of each group."""
    shape, layout = gemm.cta_tile_shape_mnk[:2], coordinates.layout
    axes = [
      cute.composition(cute.make_layout(shape, stride=s), layout) for s in ((1, 0), (0, 1))
    ]  # of an element's row and column relative to the first one's
    size = cute.size(layout)
    index = {tuple(int(cute.crd2idx(i, axis)) for axis in axes): i for i in range(size)}
    rows, width = sorted({row for row, _ in index}), 8 if gemm.arch == 100 else 2
    groups, found = [], set()
    for start in range(0, size // len(rows) * 8 // width, COLUMNS):
      for number, row in enumerate(rows):
        items = [index[row, start + 8 * item] for item in range(4)]
        places = [(row, start + 8 * item + i) for item in range(4) for i in range(width)]
        assert [index[place] for place in places] == [at + i for at in items for i in range(width)]
        found.update(places)
        groups.append((number, items))
    assert found == set(index), "RowStore: the accumulator's layout is not the one described"
    return groups

  @cute.jit
  def begin(self, gemm, param, smem_tensor, ctx):
    """(coordinates, addresses of the rows that this thread stores, first column, columns)."""
    expert, manager = ctx.batch_idx, ctx.varlen_manager
    mAddress = cute.domain_offset((manager.params.cu_seqlens_m[expert],), param)
    row0, column0 = ctx.tile_coord_mnkl[0] * ctx.tile_M, ctx.tile_coord_mnkl[1] * ctx.tile_N
    whole = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
    rows = []
    for m in cutlass.range_constexpr(cute.size(whole, mode=[3])):
      part = whole[None, None, None, m, 0]
      first = {}
      for row, items in self._groups(gemm, part):
        first.setdefault(row, items[0])
      if const_expr(gemm.arch == 100):
        rows += [part[0][0] - cute.arch.lane_idx() % 4 + i for i in range(4)]
      else:
        rows += [part[at][0] for at in first.values()]
    rAddress = cute.make_rmem_tensor(len(rows), Int64)
    rAddress.fill(0)
    for i in cutlass.range_constexpr(len(rows)):
      if row0 + rows[i] < manager.len_m(expert):
        rAddress[i] = mAddress[row0 + rows[i]]
    return whole, rAddress, column0, manager.len_n()

  def begin_loop(self, gemm, state, epi_coord):
    whole, rAddress, column0, width = state
    m, n = epi_coord
    each = cute.size(rAddress) // cute.size(whole, mode=[3])
    addresses = [rAddress[m * each + i] for i in range(each)]
    return whole[None, None, None, m, n], addresses, column0, width

  @cute.jit
  def fn_sink_flush(self, gemm, state, frag):
    coordinates, addresses, column0, width = state
    groups = self._groups(gemm, coordinates)
    words, lead = const_expr((4, 8) if gemm.arch == 100 else (1, 6))
    rValue = cute.make_rmem_tensor(frag.layout.shape, BFloat16)
    rValue.store(frag.load().to(BFloat16))
    rWord = cute.recast_tensor(rValue, Int32)
    for g in cutlass.range_constexpr(len(groups)):
      row, items = groups[g]
      rX = cute.make_rmem_tensor(4 * words, Int32)
      for i in cutlass.range_constexpr(4 * words):
        rX[i] = rWord[items[i // words] // 2 + i % words]
      _transpose(rX, words)
      column = column0 + coordinates[items[0]][1] + cute.arch.lane_idx() % 4 * lead
      if column < width:
        for i in cutlass.range_constexpr(words):
          address = addresses[row * words + i]
          if address != 0:
            target = address + Int64(column) * (BFloat16.width // 8)
            pointer = cute.make_ptr(Int32, target, cute.AddressSpace.gmem, assumed_align=16)
            rRow = cute.make_rmem_tensor(4, Int32)
            for j in cutlass.range_constexpr(4):
              rRow[j] = rX[4 * i + j]
            cute.autovec_copy(rRow, cute.make_tensor(pointer, cute.make_layout(4)))


@gemm_epilogue(outs={"address": RowStore("address")})
def scatter_epilogue(acc):
  return {"address": acc}


def _class():
  """QuACK's kernel class with this epilogue."""
  key = ((), ARCH.capability[0], False, False, (), RoundingMode.RN, (), False)
  return scatter_epilogue._mint(*key)


def _key():
  """(operation, compile-time key) of the epilogue's argument."""
  (operation,) = _class()._epi_ops
  return operation, (Int64, 1)


@cached
def compile_scatter(
  tile: tuple[int, int], cluster: tuple[int, int], pingpong: bool, dynamic: bool, major: str
):
  """The kernel for any shape; `major` is "k" or "n", the weights' contiguous dimension."""
  cls, (operation, key) = _class(), _key()
  *tensors, m, n, k, experts = make_fake_gemm_tensors(
    BFloat16, BFloat16, None, None, "k", major, None, None, varlen_m=True
  )
  address = operation.host_fake_arg(key, FakeArgCtx(m, n, k, experts, True, True, False))
  return compile_gemm_kernel(
    cls,
    BFloat16,
    tile,
    (*cluster, 1),
    pingpong,
    True,  # persistent
    False,  # no gather
    dynamic,
    ARCH.capability,
    *tensors,
    cls.EpilogueArguments(address=address),
    make_fake_scheduler_args(False, False, experts),
    make_fake_varlen_args(True, False, False, m),
  )


def rows(a: Tensor, w: Tensor, offset: Tensor, address: Tensor) -> None:
  """Write a [N, I] · w[e]ᵀ, w [E, O, I] (a transposed view serves), row n to address[n].

  a and w bf16, offset int32 [E + 1], address int64 [N]: multiples of 16 that the GPU can write O
  elements at, or 0. Rows beyond offset[-1] are not written. The addresses must stay what they are
  until what is launched next has ended (gemms.weight_grad).
  """
  gemms.check_operands(a=a, w=w)
  num_rows, width = a.shape[0], w.shape[1]
  check(
    address.dtype == torch.int64 and address.shape == (num_rows,) and width % gemms.ALIGNMENT == 0,
    f"scatter: address is {address.dtype} {tuple(address.shape)} for {num_rows} rows of {width}; "
    f"need int64 ({num_rows},) and rows of a multiple of {gemms.ALIGNMENT}",
  )
  if num_rows == 0:
    return
  tile = gemms.rows_config("scatter", num_rows, width, offset)
  shape, cluster = (tile.tile_m, tile.tile_n), (tile.cluster_m, tile.cluster_n)
  major = "k" if w.stride(-1) == 1 else "n"
  compiled = compile_scatter(shape, cluster, tile.pingpong, tile.is_dynamic_persistent, major)
  if compiling():
    return
  plan = gemms.epilogue_plan(_class(), compiled, tile, [_key()])
  run_gemm_epi_plan(plan, a, w, None, None, {"address": address}, cu_seqlens_m=offset)


class Addresses:
  """A thread per row: where the row came from, and its gate gradient stored there."""

  def __init__(self, gates: bool):
    self.gates = gates

  @cute.jit
  def __call__(
    self, mOrigin, mBack, mBackGate, mGate, mAddress, items: Int32, row_bytes: Int32, stream
  ):
    self.kernel(mOrigin, mBack, mBackGate, mGate, mAddress, items, row_bytes).launch(
      grid=[cute.ceil_div(mOrigin.shape[0], THREADS), 1, 1],
      block=[THREADS, 1, 1],
      stream=stream,
    )

  @cute.kernel
  def kernel(self, mOrigin, mBack, mBackGate, mGate, mAddress, items: Int32, row_bytes: Int32):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    row = Int64(bidx) * THREADS + tidx
    if row < mOrigin.shape[0]:
      origin = mOrigin[row]
      address = Int64(0)
      if origin >= 0:
        source, item = origin // items, Int64(origin % items)
        address = mBack[source] + item * row_bytes
        if const_expr(self.gates):
          target = mBackGate[source] + item * (Float32.width // 8)
          pointer = cute.make_ptr(Float32, target, cute.AddressSpace.gmem, assumed_align=4)
          cute.make_tensor(pointer, cute.make_layout(1))[0] = mGate[row]
      mAddress[row] = address


@cached
def compile_addresses(gates: bool):
  origin, gate = fake(Int32, None, align=4), fake(Float32, None, align=4) if gates else None
  back, back_gate, address = (fake(Int64, None, align=8) for _ in range(3))
  kernel = Addresses(gates)
  return compile_kernel(kernel, origin, back, back_gate, gate, address, Int32(0), Int32(0))


def addresses(
  origin_C: Tensor,
  back_R: Tensor,
  back_gate_R: Tensor,
  gate_C: Tensor | None,
  items: int,
  row_bytes: int,
  address_C: Tensor,
) -> None:
  """Into address_C int64 [C]: where the rows of these origins go back to, 0 for origin -1.

  Each row's gate is stored where it came from.

  origin int32 is rank · items + item; back_R and back_gate_R int64 are the ranks' addresses of item
  0's row and of its fp32 gate gradient; gate_C fp32 [C] or None.
  """
  check_device(check_same_device(origin_C, back_R, back_gate_R, address_C))
  check(address_C.shape == origin_C.shape, f"addresses of {origin_C.shape}: {address_C.shape}")
  if origin_C.numel():
    run = compile_addresses(gate_C is not None)
    run(origin_C, back_R, back_gate_R, gate_C, address_C, items, row_bytes)
