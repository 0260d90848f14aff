"""Block-scale quantization, bit-equal to kernels.reference.blockscale, in one pass over the tensor.

`Rows` quantizes along the last dimension: a thread owns 8 neighbouring elements (one 16-byte access
of bf16); 4 lanes (MXFP8), 2 lanes (NVFP4) or a warp (16 x 16 blocks) share a block and find its
largest magnitude by shuffles. `Columns` quantizes along the dimension before: a thread owns two
columns of a block, a warp's rows are contiguous. NVFP4 without a given tensor_amax first runs the
same kernel for the largest magnitude alone (an integer maximum).

Scales are written as plain rows, or `blocked` as tensor cores read them: atoms of 128 rows by 4
blocks, 512 bytes,
  byte (r mod 32) · 16 + (r div 32 mod 4) · 4 + b mod 4 of atom (r div 128, b div 4),
where r counts the operand's rows and b its blocks along the summed dimension. With expert offsets
each expert's rows begin a new atom, e at row tile offset[e] div 128 + e. Padding bytes are 0.

Bytes moved per bf16 element: MXFP8 2 + 1 + 1/32, NVFP4 2 + 1/2 + 1/16, and 2 more for the tensor's
amax.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint8, Uint16, Uint32, const_expr
from torch import Tensor

from kernels.cuda import minifloat as mf
from kernels.cuda.jit import (
  DTYPES,
  cached,
  check_device,
  compile_kernel,
  contiguous,
  fake,
  load_vector,
)
from kernels.ops import check
from kernels.reference.blockscale import BLOCK, BlockScaled, derive, signs

THREADS = 256
WIDTH = 8  # elements of a row that a thread owns
PAIR = 2  # columns that a thread owns
ATOM_ROWS, ATOM_BLOCKS, ATOM_BYTES = 128, 4, 512


class Mode(NamedTuple):
  """What a kernel is compiled for."""

  dtype: torch.dtype
  format: str
  columns: int
  square: bool
  stochastic: bool
  hadamard: bool
  amax_only: bool
  blocked: bool
  grouped: bool  # blocked, with expert offsets


class Randomness(NamedTuple):
  """Keys of the stochastic rounding and the rotation's signs as bits; zeros where unused."""

  key0: int
  key1: int
  signs: int


@cute.jit
def _store_words(mData: cute.Tensor, offset: Int64, rWords: cute.Tensor):
  """Store words at a byte offset that is a multiple of all their bytes."""
  count = const_expr(cute.size(rWords))
  align = const_expr(count * rWords.element_type.width // 8)
  address = mData.iterator.toint() + offset
  pointer = cute.make_ptr(rWords.element_type, address, cute.AddressSpace.gmem, assumed_align=align)
  cute.autovec_copy(rWords, cute.make_tensor(pointer, cute.make_layout(count)))


class _Quantize:
  """What both directions share: the block's scale and where it goes."""

  def __init__(self, mode: Mode):
    self.mode = mode
    self.size = BLOCK[mode.format]

  @cute.jit
  def scale_of(self, amax_bits: Int32, mAmax, mTensorScale):
    """(scale code, factor of the elements); the first thread writes the tensor's scale."""
    if const_expr(self.mode.format == "fp8"):
      code = mf.e8m0_code(amax_bits)
      return Uint32(code), mf.e8m0_factor(code)
    else:
      encode = mf.nvfp4_encode(mAmax[0])
      tensor_scale = mf.divide(1.0, encode)
      tidx, _, _ = cute.arch.thread_idx()
      bidx, _, _ = cute.arch.block_idx()
      if bidx == 0 and tidx == 0:
        mTensorScale[0] = tensor_scale
      return mf.nvfp4_scale(amax_bits, encode, tensor_scale)

  @cute.jit
  def blocked_offset(self, batch, row, block, rows, blocks: Int32, mOffset) -> Int64:
    """The byte of a scale in the 128 x 4 layout of an operand of rows x blocks scales."""
    tile, local = row // ATOM_ROWS, row
    if const_expr(self.mode.grouped):
      low, high = Int32(0), Int32(mOffset.shape[0] - 1)
      while high - low > 1:
        middle = (low + high) // 2
        if mOffset[middle] <= row:
          low = middle
        else:
          high = middle
      local = row - mOffset[low]
      tile = mOffset[low] // ATOM_ROWS + low + local // ATOM_ROWS
    across = cute.ceil_div(blocks, ATOM_BLOCKS)
    atom = (Int64(batch) * cute.ceil_div(rows, ATOM_ROWS) + tile) * across + block // ATOM_BLOCKS
    inside = (local % 32) * 16 + (local // 32 % 4) * 4 + block % ATOM_BLOCKS
    return atom * ATOM_BYTES + inside

  @cute.jit
  def reduce_amax(self, amax_bits: Int32, mAmaxBits):
    """Raise the tensor's largest magnitude to the warp's: an integer maximum, in any order."""
    largest = cute.arch.warp_redux_sync(amax_bits, "max")
    if cute.arch.lane_idx() == 0:
      cute.arch.atomic_max(mAmaxBits.iterator, largest)


class Rows(_Quantize):
  """Blocks along the last dimension, or 16 x 16."""

  @cute.jit
  def __call__(self, mX, mData, mScale, mAmax, mTensorScale, mOffset, rows: Int32, random, stream):
    per_row = const_expr(-(-self.mode.columns // self.size) * (self.size // WIDTH))
    if const_expr(self.mode.square):
      batches = mX.shape[0] // rows
      threads = batches * cute.ceil_div(rows, 16) * per_row * 16
    else:
      threads = mX.shape[0] * per_row
    self.kernel(mX, mData, mScale, mAmax, mTensorScale, mOffset, rows, random).launch(
      grid=[cute.ceil_div(threads, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mX, mData, mScale, mAmax, mTensorScale, mOffset, rows: Int32, random):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    mode = self.mode
    lanes = const_expr(32 if mode.square else self.size // WIDTH)
    blocks = const_expr(-(-mode.columns // self.size))
    index = Int64(bidx) * THREADS + tidx
    block = Int32(index // lanes % blocks)
    if const_expr(mode.square):
      tiles = cute.ceil_div(rows, 16)
      tile = Int32(index // (lanes * blocks))
      batch, local = tile // tiles, tile % tiles * 16 + tidx % 32 // 2
      inside = local < rows and batch < mX.shape[0] // rows
      row = batch * rows + local
      column = block * 16 + tidx % 2 * WIDTH
    else:
      row = Int32(index // (lanes * blocks))
      batch, local = row // rows, row % rows
      inside = row < mX.shape[0]
      column = block * self.size + Int32(index % lanes) * WIDTH
    valid = inside and column < mode.columns
    start = Int64(row) * mode.columns + column
    rX = cute.make_rmem_tensor(WIDTH, Float32)
    rX.fill(0.0)
    if valid:
      rX.store(load_vector(mX, start, WIDTH).load().to(Float32))
    if const_expr(mode.hadamard):
      self.rotate(rX, random)
    amax = mf.magnitude_bits(rX[0])
    for i in cutlass.range_constexpr(1, WIDTH):
      amax = cutlass.max(amax, mf.magnitude_bits(rX[i]))
    if const_expr(mode.amax_only):
      self.reduce_amax(amax, mAmax)
    else:
      step = const_expr(1)
      for _ in cutlass.range_constexpr(lanes.bit_length() - 1):
        amax = cutlass.max(amax, cute.arch.shuffle_sync_bfly(amax, step))
        step = const_expr(step * 2)
      code, factor = self.scale_of(amax, mAmax, mTensorScale)
      if valid:
        self.store(rX, mData, start, factor, random)
      if inside and column % self.size == 0:
        if const_expr(mode.blocked):
          offset = self.blocked_offset(batch, local, block, rows, Int32(blocks), mOffset)
          mScale[offset] = Uint8(code)
        elif const_expr(mode.square):
          if local % 16 == 0:
            tile_row = batch * cute.ceil_div(rows, 16) + local // 16
            mScale[Int64(tile_row) * blocks + block] = Uint8(code)
        else:
          mScale[Int64(row) * blocks + block] = Uint8(code)

  @cute.jit
  def rotate(self, rX: cute.Tensor, random):
    """Groups of 16 lie in lane pairs: distances 1 to 4 inside a thread, 8 across the pair."""
    upper = cute.arch.lane_idx() % 2
    signs_here = random.signs >> Uint32(upper * WIDTH)
    for i in cutlass.range_constexpr(WIDTH):
      rX[i] = mf.flip(rX[i], signs_here, i)
    mf.butterflies(rX, 0, WIDTH, 1)
    for i in cutlass.range_constexpr(WIDTH):
      mine, other = rX[i], cute.arch.shuffle_sync_bfly(rX[i], 1)
      mixed = mf.subtract(other, mine) if upper == 1 else mf.add(mine, other)
      rX[i] = mf.multiply(mixed, Float32(0.25))

  @cute.jit
  def store(self, rX: cute.Tensor, mData, start: Int64, factor: Float32, random):
    """Encode the 8 elements and store their 8 or 4 bytes."""
    if const_expr(self.mode.format == "fp8"):
      rWords = cute.make_rmem_tensor(2, Uint32)
      for w in cutlass.range_constexpr(2):
        word = Uint32(0)
        for i in cutlass.range_constexpr(0, 4, 2):
          codes = mf.e4m3_codes(rX[4 * w + i], rX[4 * w + i + 1], factor, factor)
          word = word | (codes << (8 * i))
        rWords[w] = word
      _store_words(mData, start, rWords)
    else:
      rWords = cute.make_rmem_tensor(1, Uint32)
      word = Uint32(0)
      for i in cutlass.range_constexpr(WIDTH):
        bits = Uint32(0)
        if const_expr(self.mode.stochastic):
          bits = mf.random_bits(Uint32(start) + i, random.key0, random.key1)
        code = mf.e2m1_code(mf.multiply(rX[i], factor), bits, self.mode.stochastic)
        word = word | (code << (4 * i))
      rWords[0] = word
      _store_words(mData, start // 2, rWords)


class Columns(_Quantize):
  """Blocks along the dimension before the last. A thread owns a block's rows of two neighbouring
  columns.
  """

  @cute.jit
  def __call__(self, mX, mData, mScale, mAmax, mTensorScale, mOffset, rows: Int32, random, stream):
    batches = mX.shape[0] // rows
    threads = batches * cute.ceil_div(rows, self.size) * const_expr(self.mode.columns // PAIR)
    self.kernel(mX, mData, mScale, mAmax, mTensorScale, mOffset, rows, random).launch(
      grid=[cute.ceil_div(threads, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mX, mData, mScale, mAmax, mTensorScale, mOffset, rows: Int32, random):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    mode = self.mode
    pairs = const_expr(mode.columns // PAIR)
    blocks = cute.ceil_div(rows, self.size)
    index = Int64(bidx) * THREADS + tidx
    column = Int32(index % pairs) * PAIR
    block, batch = Int32(index // pairs) % blocks, Int32(index // pairs) // blocks
    valid = batch < mX.shape[0] // rows
    first = block * self.size
    rX = cute.make_rmem_tensor(self.size * PAIR, Float32)
    rX.fill(0.0)
    for r in cutlass.range_constexpr(self.size):
      if valid and first + r < rows:
        start = Int64(batch * rows + first + r) * mode.columns + column
        pair = load_vector(mX, start, PAIR)
        for c in cutlass.range_constexpr(PAIR):
          rX[PAIR * r + c] = pair[c].to(Float32)
    if const_expr(mode.hadamard):
      self.rotate(rX, random)
    rAmax = cute.make_rmem_tensor(PAIR, Int32)
    rAmax.fill(0)
    for i in cutlass.range_constexpr(self.size * PAIR):
      rAmax[i % PAIR] = cutlass.max(rAmax[i % PAIR], mf.magnitude_bits(rX[i]))
    if const_expr(mode.amax_only):
      self.reduce_amax(cutlass.max(rAmax[0], rAmax[1]), mAmax)
    elif valid:
      rFactor = cute.make_rmem_tensor(PAIR, Float32)
      for c in cutlass.range_constexpr(PAIR):
        code, factor = self.scale_of(rAmax[c], mAmax, mTensorScale)
        rFactor[c] = factor
        if const_expr(mode.blocked):
          width = const_expr(mode.columns)
          offset = self.blocked_offset(batch, column + c, block, width, blocks, mOffset)
          mScale[offset] = Uint8(code)
        else:
          mScale[Int64(batch * blocks + block) * mode.columns + column + c] = Uint8(code)
      self.store(rX, rFactor, mData, batch, first, rows, column, random)

  @cute.jit
  def rotate(self, rX: cute.Tensor, random):
    for start in cutlass.range_constexpr(0, self.size, 16):
      for c in cutlass.range_constexpr(PAIR):
        for r in cutlass.range_constexpr(16):
          i = const_expr((start + r) * PAIR + c)
          rX[i] = mf.flip(rX[i], random.signs, r)
        mf.butterflies(rX, start * PAIR + c, 16, PAIR)
    for i in cutlass.range_constexpr(self.size * PAIR):
      rX[i] = mf.multiply(rX[i], Float32(0.25))

  @cute.jit
  def store(
    self, rX, rFactor, mData, batch: Int32, first: Int32, rows: Int32, column: Int32, random
  ):
    """E4M3 codes row by row, E2M1 codes of two rows in one byte; the two columns are neighbours."""
    width = const_expr(self.mode.columns)
    together = const_expr(1 if self.mode.format == "fp8" else 2)
    for r in cutlass.range_constexpr(0, self.size, together):
      if first + r < rows:
        row = Int64(batch) * rows + first + r
        rWords = cute.make_rmem_tensor(1, Uint16)
        if const_expr(self.mode.format == "fp8"):
          codes = mf.e4m3_codes(rX[PAIR * r], rX[PAIR * r + 1], rFactor[0], rFactor[1])
        else:
          codes = Uint32(0)
          for n in cutlass.range_constexpr(2):
            for c in cutlass.range_constexpr(PAIR):
              bits = Uint32(0)
              if const_expr(self.mode.stochastic):
                element = (row + n) * width + column + c
                bits = mf.random_bits(Uint32(element), random.key0, random.key1)
              value = mf.multiply(rX[PAIR * (r + n) + c], rFactor[c])
              code = mf.e2m1_code(value, bits, self.mode.stochastic)
              codes = codes | (code << (8 * c + 4 * n))
        rWords[0] = Uint16(codes)
        _store_words(mData, row // together * width + column, rWords)


@cached
def compile_quantize(mode: Mode, axis: int):
  x = fake(DTYPES[mode.dtype], None, mode.columns)
  data = scale = tensor_scale = amax = offset = None
  if mode.amax_only:
    amax = fake(Int32, 1, align=4)
  else:
    data, scale = fake(Uint8, None), fake(Uint8, None, align=1)
    if mode.format == "nvfp4":
      amax, tensor_scale = fake(Float32, 1, align=4), fake(Float32, 1, align=4)
  if mode.grouped:
    offset = fake(Int32, None, align=4)
  random = Randomness(*(Uint32(0) for _ in range(3)))
  kernel = Rows(mode) if axis == -1 else Columns(mode)
  return compile_kernel(kernel, x, data, scale, amax, tensor_scale, offset, Int32(1), random)


class Operand(NamedTuple):
  """A quantized operand of a tensor-core product."""

  data: Tensor  # as BlockScaled.data
  scale: Tensor  # [L, row tiles, block tiles, 32, 4, 4] in the 128 x 4 layout; L is 1 with offsets
  tensor_scale: Tensor | None  # nvfp4: fp32 0-d


def _check(x, format, axis, square, seed, hadamard, offset_E1) -> None:
  check_device(x.device)
  check(format in BLOCK, f'quantize: format {format!r} is unknown; use "fp8" or "nvfp4"')
  check(axis in (-1, -2), f"quantize: axis {axis} must be -1 or -2")
  check(x.dtype in DTYPES, f"quantize: x is {x.dtype}; use torch.bfloat16 or torch.float32")
  check(x.ndim >= 2, f"quantize: x {tuple(x.shape)} needs two dimensions at least")
  check(x.shape[-1] % WIDTH == 0, f"quantize: rows of {x.shape[-1]} elements; need a multiple of 8")
  check(
    format == "nvfp4" or not (square or seed is not None),
    "quantize: square blocks and stochastic rounding are for nvfp4 only",
  )
  length, pack = x.shape[axis], 16 if hadamard is not None else 2 if format == "nvfp4" else 1
  check(
    length % pack == 0, f"quantize: axis {axis} has {length} elements; need a multiple of {pack}"
  )
  check(not square or hadamard is None, "quantize: square blocks are not rotated")
  check(
    seed is None or x.numel() < 2**32,
    f"quantize: {x.numel()} elements exceed the 2^32 - 1 random counters",
  )
  check(
    offset_E1 is None or (offset_E1.dtype == torch.int32 and axis == -1 and x.ndim == 2),
    "quantize: expert offsets must be int32, and go with axis -1 of a matrix",
  )


def _scale_shape(x: Tensor, mode: Mode, axis: int, offset_E1: Tensor | None) -> tuple[int, ...]:
  size = BLOCK[mode.format]
  rows, columns = x.shape[-2:]
  if not mode.blocked:
    block = (size, size) if mode.square else (1, size) if axis == -1 else (size, 1)
    return (*x.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
  rows, length = (rows, columns) if axis == -1 else (columns, rows)
  tiles, batch = -(-rows // ATOM_ROWS), x.shape[:-2].numel()
  if offset_E1 is not None:
    tiles += offset_E1.numel() - 2
  return (batch, tiles, -(-length // (size * ATOM_BLOCKS)), 32, 4, 4)


def _run(
  x: Tensor,
  format: str,
  axis: int,
  tensor_amax: Tensor | None,
  square: bool,
  seed: int | None,
  hadamard: int | None,
  blocked: bool,
  offset_E1: Tensor | None,
) -> Operand:
  _check(x, format, axis, square, seed, hadamard, offset_E1)
  x = x.detach().contiguous()
  contiguous(x=x)
  rows, columns = x.shape[-2:]
  mode = Mode(
    x.dtype,
    format,
    columns,
    square,
    seed is not None,
    hadamard is not None,
    False,
    blocked,
    offset_E1 is not None,
  )
  keys = (0, 0) if seed is None else (derive(seed), derive(seed, 1))
  bits = 0 if hadamard is None else sum((s < 0) << i for i, s in enumerate(signs(hadamard)))
  random = Randomness(*keys, bits)
  flat, nv = x.view(-1, columns), format == "nvfp4"
  if nv and tensor_amax is None:
    tensor_amax = x.new_zeros(1, dtype=torch.float32)
    if x.numel():
      run = compile_quantize(
        mode._replace(amax_only=True, stochastic=False, blocked=False, grouped=False), axis
      )
      run(flat, None, None, tensor_amax.view(torch.int32), None, None, rows, random)
  shape = list(x.shape)
  shape[axis] //= 2 if nv else 1
  data = x.new_empty(shape, dtype=torch.uint8)
  new = x.new_zeros if blocked else x.new_empty
  scale = new(_scale_shape(x, mode, axis, offset_E1), dtype=torch.uint8)
  tensor_scale = x.new_ones(1, dtype=torch.float32) if nv else None
  if x.numel():
    amax = tensor_amax.reshape(1).float() if nv else None
    run = compile_quantize(mode, axis)
    run(flat, data.view(-1), scale.view(-1), amax, tensor_scale, offset_E1, rows, random)
  data = data if nv else data.view(torch.float8_e4m3fn)
  scale = scale.view(torch.float8_e4m3fn if nv else torch.float8_e8m0fnu)
  return Operand(data, scale, tensor_scale.view(()) if nv else None)


def quantize(
  x: Tensor,
  format: str,
  *,
  axis: int = -1,
  tensor_amax: Tensor | None = None,
  square: bool = False,
  seed: int | None = None,
  hadamard: int | None = None,
) -> BlockScaled:
  """See kernels.reference.blockscale.quantize: the same bits. x bf16 or fp32, whole rows of 8."""
  out = _run(x, format, axis, tensor_amax, square, seed, hadamard, False, None)
  size = BLOCK[format]
  block = (size, size) if square else (1, size) if axis == -1 else (size, 1)
  return BlockScaled(format, *out, axis, block)


def quantize_operand(
  x: Tensor,
  format: str,
  *,
  axis: int = -1,
  tensor_amax: Tensor | None = None,
  square: bool = False,
  seed: int | None = None,
  hadamard: int | None = None,
  offset_E1: Tensor | None = None,
) -> Operand:
  """`quantize` with the scales in the tensor cores' layout; `axis` is the dimension that is summed.

  With offset_E1 the rows of x are sorted by expert and each expert's scales begin a new row tile.
  A square block's scale is repeated for each of its rows.
  """
  return _run(x, format, axis, tensor_amax, square, seed, hadamard, True, offset_E1)
