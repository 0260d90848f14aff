"""Both NVFP4 operands of a weight from one reading of it: as it is and transposed.

Squares of 16 x 16 elements have the same scales and the same codes in both, rounded to nearest; so
the weight is quantized once, and what is transposed are codes of 4 bits, in shared memory. The
results are those of `kernels.cuda.quantization.quantize_operand`, bit for bit, given the tensor's
largest magnitude (kernels.cuda.adamw finds it while it writes the weight).

Per element 2 bytes are read and 2 · (1/2 + 1/16) written. The tensor cores that multiply these
operands are sm_100a's: there it is compiled, not run.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.memory import SmemAllocator
from torch import Tensor

from kernels.cuda import minifloat as mf
from kernels.cuda.blockscale import (
  ATOM_BLOCKS,
  ATOM_BYTES,
  ATOM_ROWS,
  THREADS,
  WIDTH,
  atom_byte,
  store_words,
)
from kernels.cuda.jit import cached, compile_kernel, contiguous, fake, load_vector
from kernels.cuda.quantization import Operand
from kernels.ops import check
from kernels.sizes import BLOCK

SIZE = BLOCK["nvfp4"]
EDGE = ATOM_ROWS  # of a tile
SPAN = ATOM_BLOCKS * SIZE  # elements of a row that one atom of scales describes: half a tile's
ACROSS = EDGE // SIZE  # squares in a tile's row
PITCH = EDGE // WIDTH + 1  # words of codes from row to row: no bank conflicts in either direction
ALIGNMENT = 2 * SIZE  # of both sides: 16 bytes of codes are inside or outside


class Squares:
  """Operands (data, scales, tensor's scale) of matrices. A thread block owns 128 x 128 elements.

  A warp quantizes a square at a time; then a thread writes half a row of the tile, and half a row
  of its transpose. A NaN mScale leaves everything as it is.
  """

  @cute.jit
  def __call__(
    self,
    mX,
    mAmax,
    mScale,
    operand: tuple,
    transposed: tuple,
    rows: Int32,
    columns: Int32,
    stream,
  ):
    tiles = cute.ceil_div(rows, EDGE) * cute.ceil_div(columns, EDGE)
    self.kernel(mX, mAmax, mScale, operand, transposed, rows, columns).launch(
      grid=[mX.shape[0] // (rows * columns) * tiles, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self, mX, mAmax, mScale, operand: tuple, transposed: tuple, rows: Int32, columns: Int32
  ):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    down, across = cute.ceil_div(rows, EDGE), cute.ceil_div(columns, EDGE)
    matrix, tile = bidx // (down * across), bidx % (down * across)
    tile_row, tile_column = tile // across, tile % across
    smem = SmemAllocator()
    code_layout = cute.make_layout((EDGE, EDGE // WIDTH), stride=(PITCH, 1))
    sCode = smem.allocate_tensor(Uint32, code_layout, 16)
    sScale = smem.allocate_tensor(Uint8, cute.make_layout((ACROSS, ACROSS), stride=(ACROSS, 1)), 16)
    scale = mScale[0]
    if scale == scale:
      encode = mf.nvfp4_encode(mAmax[0])
      tensor_scale = mf.divide(1.0, encode)
      for i in cutlass.range(ACROSS * ACROSS * 32 // THREADS, unroll=1):
        square = i * (THREADS // 32) + warp
        row = square // ACROSS * SIZE + lane // 2
        column = square % ACROSS * SIZE + lane % 2 * WIDTH
        rX = cute.make_rmem_tensor(WIDTH, BFloat16)
        rX.fill(0.0)
        if tile_row * EDGE + row < rows and tile_column * EDGE + column < columns:
          start = (Int64(matrix) * rows + tile_row * EDGE + row) * columns
          rX.store(load_vector(mX, start + tile_column * EDGE + column, WIDTH).load())
        word, code = self.encode(rX, encode, tensor_scale)
        sCode[row, column // WIDTH] = word
        if lane == 0:
          sScale[square // ACROSS, square % ACROSS] = Uint8(code)
      cute.arch.sync_threads()
      line, half = tidx % EDGE, tidx // EDGE
      self.write(sCode, sScale, operand, (matrix, tile_row, tile_column), rows, columns, line, half)
      place = (matrix, tile_column, tile_row)
      self.write(sCode, sScale, transposed, place, columns, rows, line, half, True)
      if bidx == 0 and tidx == 0:
        operand[2][0], transposed[2][0] = tensor_scale, tensor_scale

  @cute.jit
  def encode(self, rX: cute.Tensor, encode: Float32, tensor_scale: Float32):
    """(codes of the lane's 8 elements, code of the scale) of the square that a warp holds."""
    rWide = cute.make_rmem_tensor(WIDTH, Float32)
    rWide.store(rX.load().to(Float32))
    amax = cute.arch.warp_redux_sync(mf.largest_bits(rWide), "max")
    code, factor = mf.nvfp4_scale(amax, encode, tensor_scale)
    return mf.e2m1_words(rWide, factor)[0], code

  @cute.jit
  def write(
    self,
    sCode: cute.Tensor,
    sScale: cute.Tensor,
    operand: tuple,
    place: tuple,
    rows: Int32,
    columns: Int32,
    line: Int32,
    half: Int32,
    transpose: cutlass.Constexpr[bool] = False,
  ):
    """Write half of a tile's row, a half of which is one row of an atom of scales.

    place: of the tile, (matrix, row, column); with `transpose` all is the transpose's, and the
    codes of a row lie in a column.
    """
    mData, mDataScale, _ = operand
    matrix, tile_row, tile_column = place
    row, column = tile_row * EDGE + line, tile_column * EDGE + half * SPAN
    for quarter in cutlass.range_constexpr(SPAN // ALIGNMENT):
      rWord = cute.make_rmem_tensor(ALIGNMENT // WIDTH, Uint32)
      for w in cutlass.range_constexpr(ALIGNMENT // WIDTH):
        first = half * SPAN + const_expr(quarter * ALIGNMENT + w * WIDTH)
        if const_expr(transpose):
          word = Uint32(0)
          for e in cutlass.range_constexpr(WIDTH):
            nibble = (sCode[first + e, line // WIDTH] >> Uint32(line % WIDTH * 4)) & 0xF
            word = word | (nibble << (4 * e))
          rWord[w] = word
        else:
          rWord[w] = sCode[line, first // WIDTH]
      start = column + const_expr(quarter * ALIGNMENT)
      if row < rows and start < columns:
        store_words(mData, ((Int64(matrix) * rows + row) * columns + start) // 2, rWord)
    rScale = cute.make_rmem_tensor(1, Uint32)
    rScale[0] = Uint32(0)
    for b in cutlass.range_constexpr(ATOM_BLOCKS):
      block = half * ATOM_BLOCKS + b
      code = sScale[block, line // SIZE] if const_expr(transpose) else sScale[line // SIZE, block]
      rScale[0] = rScale[0] | (Uint32(code) << (8 * b))
    if column < columns:
      atom = (matrix * cute.ceil_div(rows, EDGE) + tile_row) * cute.ceil_div(columns, SPAN)
      offset = Int64(atom + tile_column * (EDGE // SPAN) + half) * ATOM_BYTES
      store_words(mDataScale, offset + atom_byte(line, 0), rScale)


@cached
def compile_squares():
  operands = ((fake(Uint8, None), fake(Uint8, None), fake(Float32, 1, align=4)) for _ in range(2))
  one = (fake(Float32, 1, align=4) for _ in range(2))
  return compile_kernel(Squares(), fake(BFloat16, None), *one, *operands, Int32(1), Int32(1))


def write_squares(w: Tensor, amax: Tensor, grad_scale: Tensor, operands: list[Operand]) -> None:
  """Overwrite the operands of bf16 w [..., R, C] and of its transpose, unless grad_scale is NaN.

  amax and grad_scale fp32 [1], amax the largest magnitude in w. R and C are multiples of 32. The
  operands are as `quantize_operand` makes them of w and w.mT with `square`.
  """
  rows, columns = w.shape[-2:]
  check(
    w.dtype == torch.bfloat16 and rows % ALIGNMENT == 0 and columns % ALIGNMENT == 0,
    f"write_squares: {w.dtype} matrices of {rows} by {columns}; need torch.bfloat16 and multiples "
    f"of {ALIGNMENT}",
  )
  contiguous(w=w)
  parts = [
    (q.data.view(-1), q.scale.view(torch.uint8).view(-1), q.tensor_scale.view(1)) for q in operands
  ]
  compile_squares()(w.view(-1), amax, grad_scale, *parts, rows, columns)
