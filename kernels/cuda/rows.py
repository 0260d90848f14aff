"""Device code of a row on its way between ranks: as it is, or as MXFP8 (kernels.buffers).

A warp has a row.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr

from kernels.buffers import MXFP8_BLOCK
from kernels.cuda import minifloat as mf
from kernels.cuda.jit import load_vector

CODES = 16  # elements of an MXFP8 row that a lane holds: one store; two lanes share a scale


@cute.jit
def pointer(dtype: cutlass.Constexpr[type], address: Int64, align: cutlass.Constexpr[int]):
  return cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)


@cute.jit
def put(dtype: cutlass.Constexpr[type], address: Int64, value) -> None:
  """Store one element at an address of its own alignment."""
  cute.make_tensor(pointer(dtype, address, dtype.width // 8), cute.make_layout(1))[0] = value


@cute.jit
def put_vector(rX: cute.Tensor, address: Int64) -> None:
  """Store 16 bytes of registers."""
  target = pointer(rX.element_type, address, 16)
  cute.autovec_copy(rX, cute.make_tensor(target, cute.make_layout(cute.size(rX))))


@cute.jit
def copy_row(mX: cute.Tensor, row: Int64, targets: list, width: cutlass.Constexpr[int]) -> None:
  """A warp copies a row to each of the addresses that is not 0."""
  dim, size = const_expr(mX.shape[1]), const_expr(mX.element_type.width // 8)
  for column in cutlass.range(cute.arch.lane_idx() * width, dim, 32 * width, unroll=4):
    rX = load_vector(mX, row * dim + column, width)
    for k in cutlass.range_constexpr(len(targets)):
      if targets[k] != 0:
        put_vector(rX, targets[k] + column * size)


@cute.jit
def pack_row(mX: cute.Tensor, row: Int64, targets: list) -> None:
  """A warp stores a row as MXFP8 at each of the addresses that is not 0."""
  dim = const_expr(mX.shape[1])
  for start in cutlass.range(0, dim, 32 * CODES):
    column = start + cute.arch.lane_idx() * CODES
    rX = cute.make_rmem_tensor(CODES, Float32)
    rX.fill(0.0)
    if column < dim:
      rX.store(load_vector(mX, row * dim + column, CODES).load().to(Float32))
    rCode, scale = mf.mxfp8_encode(rX, MXFP8_BLOCK)
    for k in cutlass.range_constexpr(len(targets)):
      if targets[k] != 0 and column < dim:
        put_vector(rCode, targets[k] + column)
        if column % MXFP8_BLOCK == 0:
          put(Uint8, targets[k] + dim + column // MXFP8_BLOCK, Uint8(scale))


@cute.jit
def unpack(mRow: cute.Tensor, row: Int64, column: Int32, dim: cutlass.Constexpr[int]):
  """CODES elements of an MXFP8 row in fp32."""
  start = mRow.iterator.toint() + row * mRow.shape[1]
  rCode = cute.make_rmem_tensor(CODES // 4, Uint32)
  source = pointer(Uint32, start + column, CODES)
  cute.autovec_copy(cute.make_tensor(source, cute.make_layout(CODES // 4)), rCode)
  return mf.mxfp8_decode(rCode, Int32(mRow[row, dim + column // MXFP8_BLOCK]))
