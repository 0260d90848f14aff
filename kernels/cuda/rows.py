"""Device code of a row on its way between ranks: as it is, or packed (kernels.buffers).

A warp has a row. Of a packed one a lane holds CODES elements at a time: in MXFP8 16 bytes of codes
and half a block, in NVFP4 8 bytes and a whole one. NVFP4 reads the row twice, first for its largest
magnitude; the second time it comes from the cache. NVFP4 is compiled for both architectures and not
run.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr

from kernels.cuda import minifloat as mf
from kernels.cuda.jit import VECTOR_BYTES, load_vector
from kernels.sizes import BLOCK, row_parts

CODES = 16  # elements of a packed row that a lane holds
AHEAD = 8  # vectors of a row that a lane loads before it stores the first of them


@cute.jit
def pointer(dtype: cutlass.Constexpr[type], address: Int64, align: cutlass.Constexpr[int]):
  return cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)


@cute.jit
def put(dtype: cutlass.Constexpr[type], address: Int64, value) -> None:
  """Store one element at an address of its own alignment."""
  cute.make_tensor(pointer(dtype, address, dtype.width // 8), cute.make_layout(1))[0] = value


@cute.jit
def put_vector(rX: cute.Tensor, address: Int64) -> None:
  """Store registers at a multiple of their bytes, or of 16 when they are more."""
  size = const_expr(cute.size(rX))
  align = const_expr(min(size * rX.element_type.width // 8, VECTOR_BYTES))
  target = pointer(rX.element_type, address, align)
  cute.autovec_copy(rX, cute.make_tensor(target, cute.make_layout(size)))


@cute.jit
def copy_row(mX: cute.Tensor, row: Int64, targets: list, width: cutlass.Constexpr[int]) -> None:
  """A warp copies a row to each of the addresses that is not 0.

  A load may not pass a store to what could be the same place, so several come before the stores.
  """
  dim, size = const_expr(mX.shape[1]), const_expr(mX.element_type.width // 8)
  lane = cute.arch.lane_idx() * width
  for first in cutlass.range_constexpr(0, dim, 32 * width * AHEAD):
    rX = []
    for column in cutlass.range_constexpr(first, min(dim, first + 32 * width * AHEAD), 32 * width):
      x = cute.make_rmem_tensor(width, mX.element_type)
      if column + lane < dim:
        x.store(load_vector(mX, row * dim + column + lane, width).load())
      rX.append(x)
    for i in cutlass.range_constexpr(len(rX)):
      column = first + 32 * width * i + lane
      for k in cutlass.range_constexpr(len(targets)):
        if targets[k] != 0 and column < dim:
          put_vector(rX[i], targets[k] + column * size)


@cute.jit
def pack_row(mX: cute.Tensor, row: Int64, targets: list, format: cutlass.Constexpr[str]) -> None:
  """A warp stores a row as MXFP8 or NVFP4 at each of the addresses that is not 0."""
  dim, block = const_expr(mX.shape[1]), const_expr(BLOCK[format])
  codes, own, _ = const_expr(row_parts(dim, format))
  factor = Float32(1.0)
  if const_expr(format == "nvfp4"):
    row_code = mf.nvfp4_row_code(_amax_bits(mX, row))
    factor = mf.e8m0_factor(row_code)
    for k in cutlass.range_constexpr(len(targets)):
      if targets[k] != 0 and cute.arch.lane_idx() == 0:
        put(Float32, targets[k] + codes, mf.e8m0_value(row_code))
  for start in cutlass.range(0, dim, 32 * CODES):
    column = start + cute.arch.lane_idx() * CODES
    rX = cute.make_rmem_tensor(CODES, Float32)
    rX.fill(0.0)
    if column < dim:
      rX.store(load_vector(mX, row * dim + column, CODES).load().to(Float32))
    if const_expr(format == "nvfp4"):
      rCode, scale = mf.nvfp4_block_encode(rX, factor)
    else:
      rCode, scale = mf.mxfp8_encode(rX, block)
    for k in cutlass.range_constexpr(len(targets)):
      if targets[k] != 0 and column < dim:
        put_vector(rCode, targets[k] + column // const_expr(dim // codes))
        if column % block == 0:
          put(Uint8, targets[k] + const_expr(codes + own) + column // block, Uint8(scale))


@cute.jit
def _amax_bits(mX: cute.Tensor, row: Int64) -> Int32:
  """The bits of the largest magnitude in a row, in every lane of its warp."""
  dim, amax = const_expr(mX.shape[1]), Int32(0)
  for column in cutlass.range(cute.arch.lane_idx() * CODES, dim, 32 * CODES):
    rX = load_vector(mX, row * dim + column, CODES)
    for e in cutlass.range_constexpr(CODES):
      amax = cutlass.max(amax, mf.magnitude_bits(rX[e].to(Float32)))
  cute.arch.sync_warp()
  return cute.arch.warp_redux_sync(amax, "max")


@cute.jit
def unpack(
  mRow: cute.Tensor,
  row: Int64,
  column: Int32,
  dim: cutlass.Constexpr[int],
  format: cutlass.Constexpr[str],
):
  """CODES elements of a packed row in fp32, from a multiple of CODES on."""
  codes, own, _ = const_expr(row_parts(dim, format))
  per_byte = const_expr(dim // codes)
  words = const_expr(CODES // (4 * per_byte))
  start = mRow.iterator.toint() + row * mRow.shape[1]
  rCode = cute.make_rmem_tensor(words, Uint32)
  source = pointer(Uint32, start + column // per_byte, 4 * words)
  cute.autovec_copy(cute.make_tensor(source, cute.make_layout(words)), rCode)
  scale = mRow[row, const_expr(codes + own) + column // const_expr(BLOCK[format])]
  if const_expr(format == "nvfp4"):
    row_scale = cute.make_tensor(pointer(Float32, start + codes, 4), cute.make_layout(1))[0]
    return mf.nvfp4_block_decode(rCode, Uint32(scale), row_scale)
  else:
    return mf.mxfp8_decode(rCode, Int32(scale))
