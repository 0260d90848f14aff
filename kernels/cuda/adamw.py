"""AdamW (arXiv 1711.05101 Algorithm 2), one kernel per tensor, everything in fp32 registers:

  g = grad · grad_scale;  m += (1 - β1)(g - m);  v = β2 v + (1 - β2) g²
  master = (1 - lr λ) master - lr / (1 - β1^t) · m / (sqrt(v) / sqrt(1 - β2^t) + ε)
  param = bf16(master)
Each thread owns 8 neighbouring elements. With fp32 moments and a bf16 gradient and parameter an
element moves 28 bytes (reads 14, writes 14); with bf16 moments 20. A NaN grad_scale leaves
everything as it is, decided on the device.

A weight whose MXFP8 operands are kept gets them written by the same kernel. Per element, with fp32
moments and gradient: 30 + 2 · (1 + 1/32) = 32.06 bytes. The step and then the quantizer move 40.06:
2 + 1 + 1/32 along rows, 2 + 2 for a transposed bf16 copy, and 2 + 1 + 1/32 again. On one H100 the
operands equal the quantizer's bit for bit; on sm_100a, which alone multiplies them, it is compiled
and not run. NVFP4's operands need the tensor's largest magnitude first: the step finds it, and a
second launch (kernels.cuda.squares) writes both from one reading of the weight, in all 30 + 2 +
2 · (1/2 + 1/16) = 33.1 bytes; the step and then the quantizer 43.1.

It runs at 0.95 of a copy's rate on one H200 (kernels/RESULTS.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.memory import SmemAllocator
from torch import Tensor

from kernels.copies import Copies, Key
from kernels.cuda import minifloat as mf
from kernels.cuda.blockscale import (
  ATOM_BLOCKS,
  ATOM_BYTES,
  ATOM_ROWS,
  atom_byte,
  raise_amax,
  store_words,
)
from kernels.cuda.jit import (
  DTYPES,
  cached,
  check_device,
  compile_kernel,
  contiguous,
  fake,
  load_vector,
  store_vector,
)
from kernels.cuda.quantization import Operand
from kernels.cuda.squares import write_squares
from kernels.ops import check, check_lists, check_same_device, check_scale
from kernels.sizes import BLOCK

THREADS = 256
WIDTH = 8
SIZE = BLOCK["fp8"]
LEGS = ("fprop_w", "dgrad_w")  # whose operands are the weight's
EDGE = ATOM_ROWS  # of a tile: also ATOM_BLOCKS blocks


@cute.jit
def _update(
  mParam,
  mGrad,
  mMaster,
  mM,
  mV,
  scale: Float32,
  factors: tuple,
  start: Int64,
  width: cutlass.Constexpr[int],
):
  """The step of elements start : start + width; returns them before they are rounded."""
  one_minus_beta1, beta2, one_minus_beta2, decay, size, inverse_root, eps = factors
  grad = load_vector(mGrad, start, width).load().to(Float32) * scale
  m = load_vector(mM, start, width).load().to(Float32)
  v = load_vector(mV, start, width).load().to(Float32)
  master = load_vector(mMaster, start, width).load()
  m = m + one_minus_beta1 * (grad - m)
  v = beta2 * v + one_minus_beta2 * (grad * grad)
  master = decay * master - size * (m / (cute.math.sqrt(v) * inverse_root + eps))
  store_vector(mM, start, m)
  store_vector(mV, start, v)
  store_vector(mMaster, start, master)
  if const_expr(mParam is not None):
    store_vector(mParam, start, master)
  return master


class AdamW:
  """One tensor's step. mParam is None when the parameter is its own master.

  mAmax, where given, is raised to the bits of the new parameter's largest magnitude; whole vectors
  then.
  """

  @cute.jit
  def __call__(self, mParam, mGrad, mMaster, mM, mV, mAmax, mScale, factors: tuple, stream):
    threads = cute.ceil_div(mMaster.shape[0], WIDTH)
    self.kernel(mParam, mGrad, mMaster, mM, mV, mAmax, mScale, factors).launch(
      grid=[cute.ceil_div(threads, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mParam, mGrad, mMaster, mM, mV, mAmax, mScale, factors: tuple):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    scale = mScale[0]
    start = (Int64(bidx) * THREADS + tidx) * WIDTH
    if scale == scale:
      if const_expr(mAmax is not None):
        largest = Int32(0)
        if start + WIDTH <= mMaster.shape[0]:
          master = _update(mParam, mGrad, mMaster, mM, mV, scale, factors, start, WIDTH)
          rX = cute.make_rmem_tensor(WIDTH, Float32)
          rX.store(master.to(mParam.element_type).to(Float32))
          largest = mf.largest_bits(rX)
        raise_amax(largest, mAmax)
      elif start + WIDTH <= mMaster.shape[0]:
        _update(mParam, mGrad, mMaster, mM, mV, scale, factors, start, WIDTH)
      else:
        for i in cutlass.range(start, Int64(mMaster.shape[0])):
          _update(mParam, mGrad, mMaster, mM, mV, scale, factors, i, 1)


class AdamWMxfp8:
  """The step of bf16 matrices, and their MXFP8 operands along rows and along columns.

  A thread block owns 128 x 128 elements: an atom of scales of the matrix and one of its transpose.
  It updates them and quantizes along rows in registers, four lanes to a block; then each thread
  takes blocks of columns from the bf16 tile in shared memory. Sides are multiples of 32. An operand
  is (data, scales).
  """

  @cute.jit
  def __call__(
    self,
    mParam,
    mGrad,
    mMaster,
    mM,
    mV,
    mScale,
    operand: tuple,
    transposed: tuple,
    rows: Int32,
    columns: Int32,
    factors: tuple,
    stream,
  ):
    state = (mParam, mGrad, mMaster, mM, mV, mScale)
    tiles = cute.ceil_div(rows, EDGE) * cute.ceil_div(columns, EDGE)
    self.kernel(*state, operand, transposed, rows, columns, factors).launch(
      grid=[mMaster.shape[0] // (rows * columns) * tiles, 1, 1],
      block=[THREADS, 1, 1],
      stream=stream,
    )

  @cute.kernel
  def kernel(
    self,
    mParam,
    mGrad,
    mMaster,
    mM,
    mV,
    mScale,
    operand: tuple,
    transposed: tuple,
    rows: Int32,
    columns: Int32,
    factors: tuple,
  ):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    mData, mDataScale = operand
    mTransposed, mTransposedScale = transposed
    down, across = cute.ceil_div(rows, EDGE), cute.ceil_div(columns, EDGE)
    matrix, tile = bidx // (down * across), bidx % (down * across)
    first_row, first_column = tile // across * EDGE, tile % across * EDGE
    smem = SmemAllocator()
    tile_layout = cute.make_layout((EDGE, EDGE // WIDTH, WIDTH), stride=(EDGE, WIDTH, 1))
    sX = smem.allocate_tensor(BFloat16, tile_layout, 16)
    sDataScale = smem.allocate_tensor(Uint8, cute.make_layout(ATOM_BYTES), 16)
    sTransposedScale = smem.allocate_tensor(Uint8, cute.make_layout(ATOM_BYTES), 16)
    scale = mScale[0]
    if scale == scale:
      for i in cutlass.range(EDGE * EDGE // WIDTH // THREADS, unroll=1):
        slot = i * THREADS + tidx
        row, vector = slot // (EDGE // WIDTH), slot % (EDGE // WIDTH)
        column = vector * WIDTH
        inside = first_row + row < rows and first_column + column < columns
        start = (Int64(matrix) * rows + first_row + row) * columns + first_column + column
        rX = cute.make_rmem_tensor(WIDTH, BFloat16)
        rX.fill(0.0)
        if inside:
          master = _update(mParam, mGrad, mMaster, mM, mV, scale, factors, start, WIDTH)
          rX.store(master.to(BFloat16))
        cute.autovec_copy(rX, sX[row, vector, None])
        rWide = cute.make_rmem_tensor(WIDTH, Float32)
        rWide.store(rX.load().to(Float32))
        rCode, code = mf.mxfp8_encode(rWide, SIZE)
        if inside:
          store_words(mData, start, rCode)
        if column % SIZE == 0:
          sDataScale[atom_byte(row, column // SIZE)] = Uint8(code)
      cute.arch.sync_threads()
      for i in cutlass.range(EDGE * ATOM_BLOCKS // THREADS, unroll=1):
        slot = i * THREADS + tidx
        column, block = slot % EDGE, slot // EDGE
        row = block * SIZE
        rBlock = cute.make_rmem_tensor(SIZE, Float32)
        for r in cutlass.range_constexpr(SIZE):
          rBlock[r] = sX[row + r, column // WIDTH, column % WIDTH].to(Float32)
        rCode, code = mf.mxfp8_encode(rBlock, SIZE)
        if first_row + row < rows and first_column + column < columns:
          start = (Int64(matrix) * columns + first_column + column) * rows + first_row + row
          store_words(mTransposed, start, rCode)
        sTransposedScale[atom_byte(column, block)] = Uint8(code)
      cute.arch.sync_threads()
      if tidx < ATOM_BYTES // 4:
        self.store_atom(sDataScale, mDataScale, bidx, tidx)
        atom = (matrix * across + tile % across) * down + tile // across
        self.store_atom(sTransposedScale, mTransposedScale, atom, tidx)

  @cute.jit
  def store_atom(self, sScale, mScale, atom: Int32, tidx: Int32):
    """Write the thread's four bytes of an atom."""
    rWord = cute.make_rmem_tensor(1, Uint32)
    rWord[0] = cute.recast_tensor(sScale, Uint32)[tidx]
    store_words(mScale, Int64(atom) * ATOM_BYTES + tidx * 4, rWord)


@cached
def compile_adamw(param, grad, moment, amax=False):
  """Dtypes of the parameter (None: it is the master), the gradient and the moments; whether the
  parameter's largest magnitude is found.
  """
  master, scale = fake(Float32, None), fake(Float32, 1, align=4)
  mParam = None if param is None else fake(DTYPES[param], None)
  moments = (fake(DTYPES[moment], None) for _ in range(2))
  state = mParam, fake(DTYPES[grad], None), master, *moments
  mAmax = fake(Int32, 1, align=4) if amax else None
  return compile_kernel(AdamW(), *state, mAmax, scale, (Float32(0.0),) * 7)


@cached
def compile_adamw_mxfp8(grad, moment):
  """Dtypes of the gradient and the moments."""
  master, scale = fake(Float32, None), fake(Float32, 1, align=4)
  moments = (fake(DTYPES[moment], None) for _ in range(2))
  operands = ((fake(Uint8, None), fake(Uint8, None)) for _ in range(2))
  return compile_kernel(
    AdamWMxfp8(),
    fake(BFloat16, None),
    fake(DTYPES[grad], None),
    master,
    *moments,
    scale,
    *operands,
    Int32(1),
    Int32(1),
    (Float32(0.0),) * 7,
  )


class State(NamedTuple):
  """One parameter and what its step reads and writes. A parameter may be its own master."""

  param: Tensor
  grad: Tensor
  master: Tensor
  exp_avg: Tensor
  exp_avg_sq: Tensor

  def checked(self, scale: Tensor) -> State:
    """Detached, the gradient contiguous. Raises KernelError for what the kernels cannot take."""
    state = State(*(t.detach() for t in self))
    param, grad, master, m, v = state
    check_device(check_same_device(*state, scale))
    check(master.dtype == torch.float32, f"adamw: a master is {master.dtype}; need torch.float32")
    check(
      m.dtype == v.dtype and {param.dtype, grad.dtype, m.dtype} <= set(DTYPES),
      f"adamw: parameter {param.dtype}, gradient {grad.dtype}, moments {m.dtype} and {v.dtype}; "
      "need torch.bfloat16 or torch.float32, moments alike",
    )
    shapes = {tuple(t.shape) for t in state}
    check(len(shapes) == 1, f"adamw: shapes {sorted(shapes)} of one parameter must agree")
    state = state._replace(grad=grad.contiguous())
    contiguous(parameter=param, gradient=state.grad, master=master, exp_avg=m, exp_avg_sq=v)
    return state

  @property
  def own_master(self) -> bool:
    return self.param.dtype == self.master.dtype and self.param.data_ptr() == self.master.data_ptr()

  @property
  def flat(self) -> list[Tensor]:
    return [t.view(-1) for t in self]


def _plain(state: State, scale: Tensor, factors: tuple, _: list[Operand]) -> None:
  param, *rest = state.flat
  kind = None if state.own_master else param.dtype
  run = compile_adamw(kind, state.grad.dtype, state.exp_avg.dtype)
  run(None if state.own_master else param, *rest, None, scale, factors)


def _mxfp8(state: State, scale: Tensor, factors: tuple, operands: list[Operand]) -> None:
  run = compile_adamw_mxfp8(state.grad.dtype, state.exp_avg.dtype)
  parts = [tuple(t.view(torch.uint8).view(-1) for t in q[:2]) for q in operands]
  run(*state.flat, scale, *parts, *state.param.shape[-2:], factors)


def _nvfp4(state: State, scale: Tensor, factors: tuple, operands: list[Operand]) -> None:
  amax = torch.zeros_like(scale)
  run = compile_adamw(state.param.dtype, state.grad.dtype, state.exp_avg.dtype, True)
  run(*state.flat, amax.view(torch.int32), scale, factors)
  write_squares(state.param, amax, scale, operands)


STEPS = {"": _plain, "fp8": _mxfp8, "nvfp4": _nvfp4}  # by the format of the operands that are kept


def _kept(copies: Copies | None, param: Tensor) -> dict[Key, Operand]:
  """The current operands of tensor cores, along rows and then columns: both, of one format, or
  none.
  """
  current = {} if copies is None else copies.current(param)
  for format in BLOCK:
    found = {key.leg: key for key in current if (key.format, key.emulate) == (format, False)}
    if found.keys() == set(LEGS):
      return {found[leg]: current[found[leg]] for leg in LEGS}
  return {}


@torch.no_grad()
def adamw(
  params: list[Tensor],
  grads: list[Tensor],
  masters: list[Tensor],
  exp_avgs: list[Tensor],
  exp_avg_sqs: list[Tensor],
  *,
  step: int,
  lr: float,
  betas: tuple[float, float],
  eps: float,
  weight_decay: float,
  grad_scale: Tensor,
  copies: list[Copies | None] | None = None,
) -> None:
  """See kernels.ops.Ops.adamw. Tensors contiguous; one launch each, and one for the NVFP4 operands
  of each weight that keeps some; bit-identical results.
  """
  check(step >= 1, f"adamw: step {step} must count from 1")
  check_lists("adamw", (params, grads, masters, exp_avgs, exp_avg_sqs))
  check_scale("adamw", grad_scale)
  beta1, beta2 = betas
  size, inverse_root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
  factors = (1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, size, inverse_root, eps)
  scale = grad_scale.view(1)
  copies = [None] * len(params) if copies is None else copies
  kept = [_kept(own, param) for own, param in zip(copies, params, strict=True)]
  tensors = zip(params, grads, masters, exp_avgs, exp_avg_sqs, strict=True)
  for one, operands in zip(tensors, kept, strict=True):
    state = State(*one).checked(scale)
    format = next((key.format for key in operands), "")
    if state.master.numel():
      STEPS[format](state, scale, factors, list(operands.values()))
  torch.autograd.graph.increment_version(params)  # the kernel's writes are not torch's
  for own, param, operands in zip(copies, params, kept, strict=True):
    if operands:
      own.renew(operands, param)
