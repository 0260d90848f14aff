"""Kernels of kernels.cuda.quantization: bit-equal to kernels.reference.blockscale, in one pass.

`Rows` quantizes along the last dimension: a thread block owns 128 rows by 4 blocks, a thread 8
neighbouring elements at a time (one 16-byte access of bf16); 4 lanes (MXFP8), 2 lanes (NVFP4) or a
warp (16 x 16 blocks) share a block and find its largest magnitude by shuffles. `Columns` quantizes
along the dimension before: a thread owns two columns of a block, a warp's rows are contiguous.
NVFP4 without a given tensor_amax first runs the same kernel for the largest magnitude alone (an
integer maximum).

Scales are written as plain rows, or `blocked` as tensor cores read them: atoms of 128 rows by 4
blocks, 512 bytes,
  byte (r mod 32) · 16 + (r div 32 mod 4) · 4 + b mod 4 of atom (r div 128, b div 4),
where r counts the operand's rows and b its blocks along the summed dimension. With expert offsets
each expert's rows begin a new atom, e at row tile offset[e] div 128 + e. Padding bytes are 0.

Bytes moved per bf16 element: MXFP8 2 + 1 + 1/32, NVFP4 2 + 1/2 + 1/16, and 2 more for the tensor's
amax.

MXFP8 along rows runs at 0.85 of a copy's rate on one H200; NVFP4 is limited by its arithmetic
(kernels/RESULTS.md). sm_100a has an instruction for NVFP4's rounding to nearest; that path is
compiled, not run.

One file: `Rows` and `Columns` are one quantizer in two directions and share its scales and codes.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint8, Uint16, Uint32, const_expr
from cutlass.memory import SmemAllocator

from kernels.cuda import minifloat as mf
from kernels.cuda.jit import (
  DTYPES,
  cached,
  compile_kernel,
  fake,
  load_vector,
  vector_at,
)
from kernels.sizes import BLOCK

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
def store_words(mData: cute.Tensor, offset: Int64, rWords: cute.Tensor):
  """Store words at a byte offset that is a multiple of all their bytes."""
  count = const_expr(cute.size(rWords))
  align = const_expr(count * rWords.element_type.width // 8)
  address = mData.iterator.toint() + offset
  pointer = cute.make_ptr(rWords.element_type, address, cute.AddressSpace.gmem, assumed_align=align)
  cute.autovec_copy(rWords, cute.make_tensor(pointer, cute.make_layout(count)))


@cute.jit
def raise_amax(amax_bits: Int32, mAmaxBits: cute.Tensor):
  """Raise the tensor's largest magnitude to the warp's: an integer maximum, in any order."""
  largest = cute.arch.warp_redux_sync(amax_bits, "max")
  if cute.arch.lane_idx() == 0 and largest > mAmaxBits[0]:
    cute.arch.atomic_max(mAmaxBits.iterator, largest)


def atom_byte(row, block):
  """Where a row's block has its scale in the atom that holds it."""
  return row % 32 * 16 + row // 32 % 4 * 4 + block % ATOM_BLOCKS


class _Quantize:
  """What both directions share: the scales and the tensor's largest magnitude."""

  def __init__(self, mode: Mode):
    self.mode = mode
    self.size = BLOCK[mode.format]

  @cute.jit
  def tensor_factors(self, mAmax, mTensorScale):
    """NVFP4's (encode, tensor_scale); the first thread stores the latter."""
    encode, tensor_scale = Float32(1.0), Float32(1.0)
    if const_expr(self.mode.format == "nvfp4" and not self.mode.amax_only):
      encode = mf.nvfp4_encode(mAmax[0])
      tensor_scale = mf.divide(1.0, encode)
      tidx, _, _ = cute.arch.thread_idx()
      bidx, _, _ = cute.arch.block_idx()
      if bidx == 0 and tidx == 0:
        mTensorScale[0] = tensor_scale
    return encode, tensor_scale

  @cute.jit
  def scale_of(self, amax_bits: Int32, factors):
    """(scale code, what the elements are multiplied by) of a block."""
    if const_expr(self.mode.format == "fp8"):
      code = mf.e8m0_code(amax_bits)
      return Uint32(code), mf.e8m0_factor(code)
    else:
      encode, tensor_scale = factors
      return mf.nvfp4_scale(amax_bits, encode, tensor_scale)

  @cute.jit
  def codes(self, low, high, low_factor, high_factor, low_index, high_index, random) -> Uint32:
    """The codes of two elements that share a byte (NVFP4) or are neighbours (MXFP8)."""
    if const_expr(self.mode.format == "fp8"):
      return mf.e4m3_codes(low, high, low_factor, high_factor)
    else:
      low, high = mf.multiply(low, low_factor), mf.multiply(high, high_factor)
      if const_expr(self.mode.stochastic):
        bits = [
          mf.random_bits(Uint32(i), random.key0, random.key1) for i in (low_index, high_index)
        ]
        return mf.e2m1_stochastic(low, bits[0]) | (mf.e2m1_stochastic(high, bits[1]) << 4)
      else:
        return mf.e2m1_pair(low, high)


class Rows(_Quantize):
  """Blocks along the last dimension, or 16 x 16. A thread block owns one atom of scales."""

  def __init__(self, mode: Mode):
    super().__init__(mode)
    self.lanes = self.size // WIDTH
    self.per_row = ATOM_BLOCKS * self.lanes
    self.rounds = ATOM_ROWS * self.per_row // THREADS
    self.blocks = -(-mode.columns // self.size)
    self.across = -(-self.blocks // ATOM_BLOCKS)

  @cute.jit
  def __call__(self, mX, mData, mScale, mAmax, mTensorScale, mOffset, rows: Int32, random, stream):
    if const_expr(self.mode.grouped):
      tiles = cute.ceil_div(rows, ATOM_ROWS) + mOffset.shape[0] - 2
    else:
      tiles = mX.shape[0] // rows * cute.ceil_div(rows, ATOM_ROWS)
    self.kernel(mX, mData, mScale, mAmax, mTensorScale, mOffset, rows, random).launch(
      grid=[tiles * self.across, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.jit
  def tile_rows(self, tile: Int32, rows: Int32, mOffset):
    """(first row, number of rows, tile of its batch) of a row tile; the number may be 0 or less."""
    if const_expr(self.mode.grouped):
      low, high = Int32(0), Int32(mOffset.shape[0] - 1)
      while high - low > 1:
        middle = (low + high) // 2
        if mOffset[middle] // ATOM_ROWS + middle <= tile:
          low = middle
        else:
          high = middle
      start = (tile - mOffset[low] // ATOM_ROWS - low) * ATOM_ROWS
      first = mOffset[low] + start
      return first, mOffset[low + 1] - first
    else:
      tiles = cute.ceil_div(rows, ATOM_ROWS)
      start = tile % tiles * ATOM_ROWS
      return tile // tiles * rows + start, rows - start

  def place(self, i: int, tidx):
    """(row, block, first element) inside the atom of the thread's i-th 8 elements."""
    slot = i * THREADS + tidx
    if self.mode.square:
      tile, lane = slot // 32, slot % 32
      return tile // 4 * 16 + lane // 2, tile % 4, tile % 4 * 16 + lane % 2 * WIDTH
    lane = slot % self.per_row
    return slot // self.per_row, lane // self.lanes, lane * WIDTH

  @cute.kernel
  def kernel(self, mX, mData, mScale, mAmax, mTensorScale, mOffset, rows: Int32, random):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    mode = self.mode
    tile, atom = bidx // self.across, bidx % self.across
    first, count = self.tile_rows(tile, rows, mOffset)
    sScale = SmemAllocator().allocate_tensor(Uint8, cute.make_layout(ATOM_BYTES), 16)
    rAll = cute.make_rmem_tensor((WIDTH, self.rounds), DTYPES[mode.dtype])
    rAll.fill(0.0)
    left = const_expr(ATOM_BLOCKS * self.size)
    for i in cutlass.range_constexpr(self.rounds):
      row, _, column = self.place(i, tidx)
      if row < count and atom * left + column < mode.columns:
        start = Int64(first + row) * mode.columns + atom * left + column
        cute.autovec_copy(vector_at(mX, start, WIDTH), rAll[None, i])
    factors = self.tensor_factors(mAmax, mTensorScale)
    largest = Int32(0)
    for i in cutlass.range_constexpr(self.rounds):
      row, block, column = self.place(i, tidx)
      rX = cute.make_rmem_tensor(WIDTH, Float32)
      rX.store(rAll[None, i].load().to(Float32))
      if const_expr(mode.hadamard):
        self.rotate(rX, random)
      amax = mf.largest_bits(rX)
      if const_expr(mode.amax_only):
        largest = cutlass.max(largest, amax)
      else:
        code, factor = self.scale_of(self.share(amax), factors)
        if row < count and atom * left + column < mode.columns:
          start = Int64(first + row) * mode.columns + atom * left + column
          self.store(rX, mData, start, factor, random)
        if column % self.size == 0:
          inside = row < count and atom * ATOM_BLOCKS + block < self.blocks
          sScale[atom_byte(row, block)] = Uint8(code if inside else Uint32(0))
    if const_expr(mode.amax_only):
      raise_amax(largest, mAmax)
    else:
      cute.arch.sync_threads()
      self.store_scales(sScale, mScale, tile, atom, first, count, rows)

  @cute.jit
  def share(self, amax: Int32) -> Int32:
    """The largest over the lanes of a block."""
    lanes = const_expr(32 if self.mode.square else self.lanes)
    for step in cutlass.range_constexpr(lanes.bit_length() - 1):
      amax = cutlass.max(amax, cute.arch.shuffle_sync_bfly(amax, 1 << step))
    return amax

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
    per_word = const_expr(4 if self.mode.format == "fp8" else 8)
    rWords = cute.make_rmem_tensor(WIDTH // per_word, Uint32)
    for w in cutlass.range_constexpr(WIDTH // per_word):
      word = Uint32(0)
      for i in cutlass.range_constexpr(0, per_word, 2):
        e = const_expr(w * per_word + i)
        index = Uint32(start) + e
        codes = self.codes(rX[e], rX[e + 1], factor, factor, index, index + 1, random)
        word = word | (codes << (32 // per_word * i))
      rWords[w] = word
    store_words(mData, start * 4 // per_word, rWords)

  @cute.jit
  def store_scales(self, sScale, mScale, tile, atom, first, count, rows: Int32):
    """Write the atom's scales: as they lie, or each row's four into plain rows."""
    tidx, _, _ = cute.arch.thread_idx()
    if tidx < ATOM_ROWS:
      if const_expr(self.mode.blocked):
        rWords = cute.make_rmem_tensor(1, Uint32)
        rWords[0] = cute.recast_tensor(sScale, Uint32)[tidx]
        offset = (Int64(tile) * self.across + atom) * ATOM_BYTES + tidx * 4
        store_words(mScale, offset, rWords)
      else:
        plain_row, writes = Int64(first) + tidx, tidx < count
        if const_expr(self.mode.square):
          tiles = cute.ceil_div(rows, 16)
          plain_row = Int64(first // rows) * tiles + (first % rows + tidx) // 16
          writes = writes and tidx % 16 == 0
        for b in cutlass.range_constexpr(ATOM_BLOCKS):
          block = atom * ATOM_BLOCKS + b
          if writes and block < self.blocks:
            mScale[plain_row * self.blocks + block] = sScale[atom_byte(tidx, b)]


class Columns(_Quantize):
  """Blocks along the dimension before the last, or 16 x 16. A thread owns two columns of one."""

  def __init__(self, mode: Mode):
    super().__init__(mode)
    self.pairs = -(-mode.columns // 16) * 8 if mode.square else mode.columns // PAIR

  @cute.jit
  def __call__(self, mX, mData, mScale, mAmax, mTensorScale, mOffset, rows: Int32, random, stream):
    batches = mX.shape[0] // rows
    threads = batches * cute.ceil_div(rows, self.size) * self.pairs
    self.kernel(mX, mData, mScale, mAmax, mTensorScale, rows, random).launch(
      grid=[cute.ceil_div(threads, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mX, mData, mScale, mAmax, mTensorScale, rows: Int32, random):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    mode = self.mode
    blocks = cute.ceil_div(rows, self.size)
    index = Int64(bidx) * THREADS + tidx
    column = Int32(index % self.pairs) * PAIR
    block, batch = Int32(index // self.pairs) % blocks, Int32(index // self.pairs) // blocks
    valid = batch < mX.shape[0] // rows and column < mode.columns
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
    if const_expr(mode.square):
      amax = cutlass.max(rAmax[0], rAmax[1])
      for step in cutlass.range_constexpr(3):
        amax = cutlass.max(amax, cute.arch.shuffle_sync_bfly(amax, 1 << step))
      rAmax.fill(amax)
    factors = self.tensor_factors(mAmax, mTensorScale)
    if const_expr(mode.amax_only):
      raise_amax(cutlass.max(rAmax[0], rAmax[1]), mAmax)
    elif valid:
      rFactor = cute.make_rmem_tensor(PAIR, Float32)
      for c in cutlass.range_constexpr(PAIR):
        code, factor = self.scale_of(rAmax[c], factors)
        rFactor[c] = factor
        self.store_scale(mScale, Uint8(code), batch, block, blocks, column + c)
      self.store(rX, rFactor, mData, batch, first, rows, column, random)

  @cute.jit
  def store_scale(self, mScale, code: Uint8, batch, block, blocks: Int32, column: Int32):
    """A column is a row of the transposed operand that the blocked layout describes."""
    if const_expr(self.mode.blocked):
      tiles = const_expr(-(-self.mode.columns // ATOM_ROWS))
      across = cute.ceil_div(blocks, ATOM_BLOCKS)
      atom = (Int64(batch) * tiles + column // ATOM_ROWS) * across + block // ATOM_BLOCKS
      mScale[atom * ATOM_BYTES + atom_byte(column, block)] = code
    elif const_expr(self.mode.square):
      width = const_expr(-(-self.mode.columns // 16))
      if column % 16 == 0:
        mScale[Int64(batch * blocks + block) * width + column // 16] = code
    else:
      mScale[Int64(batch * blocks + block) * self.mode.columns + column] = code

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
        if const_expr(self.mode.format == "fp8"):
          x, y = rX[PAIR * r], rX[PAIR * r + 1]
          word = self.codes(x, y, rFactor[0], rFactor[1], 0, 0, random)
        else:
          word = Uint32(0)
          for c in cutlass.range_constexpr(PAIR):
            x, y = rX[PAIR * r + c], rX[PAIR * r + PAIR + c]
            index = Uint32(row * width + column + c)
            byte = self.codes(x, y, rFactor[c], rFactor[c], index, index + width, random)
            word = word | (byte << (8 * c))
        rWords = cute.make_rmem_tensor(1, Uint16)
        rWords[0] = Uint16(word)
        store_words(mData, row // together * width + column, rWords)


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
