"""Muon (arXiv 2502.16982 Eq 2-4): kernels around kernels.cuda.newton_schulz.

  g = grad · grad_scale;  m += (1 - μ)(g - m);  direction = g + μ (m - g)
  O = newton_schulz(direction / (|direction| + 1e-7)), block by block
  master = (1 - lr λ) master - lr · size · O;  param = bf16(master)
With fp32 gradients and momenta an element of a bf16 parameter moves 16 bytes in the first kernel
(reads 8, writes 8), 6 in the division (reads 4, writes 2) and 12 in the last (reads 6, writes 6);
telling experts without tokens reads the gradient once more: 38 around Newton-Schulz's products.
A matrix that is taller than wide is transposed before and after them: 8 more.

Squares are summed row by row and then over a matrix, each in an order of its own shape alone. So
the bits do not depend on how many matrices a call has, which is how many a rank owns. (torch's
norm splits a matrix by their number.) A NaN grad_scale, and an expert whose gradient is zero
throughout, leave everything as it is, decided on the device.

One H200, five layers' 2.42 G elements: 170 ms a step, 127 of it products (kernels/RESULTS.md).
On sm_100a compiled, not run.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

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
from kernels.cuda.newton_schulz import check_sides, newton_schulz
from kernels.ops import Rows, check, check_lists, check_same_device, check_scale

THREADS = 256
LANES = 32
WARPS = THREADS // LANES
WIDTH = 8


@cute.jit
def _moves(mScale, mLive, matrix: Int32):
  """Whether the step changes this matrix of the batch."""
  scale = mScale[0]
  moves = scale == scale
  if const_expr(mLive is not None):
    moves = moves & (mLive[matrix] != 0.0)
  return moves


@cute.jit
def _stored(row: Int32, rows: tuple):
  """Where row `row` of a block lies in the tensor, or of a matrix's block in the matrix."""
  period, first, stop, _ = rows
  span = stop - first
  return row // span * period + first + row % span


@cute.jit
def _count(rows: tuple):
  """The rows of a matrix's block."""
  period, first, stop, whole = rows
  return whole // period * (stop - first)


class Momentum:
  """One tensor's momentum, the direction, and the sum of squares of each row of it.

  Of what stays as it is the direction is zero. A warp owns a row; 8 neighbouring elements a lane.
  rows: of a matrix; vectors: of a row. rest: 1 - momentum.
  """

  @cute.jit
  def __call__(
    self,
    mGrad,
    mMomentum,
    mDirection,
    mSquares,
    mLive,
    mScale,
    rows: Int32,
    vectors: Int32,
    rest: Float32,
    stream,
  ):
    state = (mGrad, mMomentum, mDirection, mSquares, mLive, mScale)
    self.kernel(*state, rows, vectors, rest).launch(
      grid=[cute.ceil_div(mSquares.shape[0], WARPS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self,
    mGrad,
    mMomentum,
    mDirection,
    mSquares,
    mLive,
    mScale,
    rows: Int32,
    vectors: Int32,
    rest: Float32,
  ):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    row, lane = bidx * WARPS + tidx // LANES, tidx % LANES
    if row < mSquares.shape[0]:
      moves = _moves(mScale, mLive, row // rows)
      squares = Float32(0.0)
      for vector in cutlass.range(lane, vectors, LANES):
        start = (Int64(row) * vectors + vector) * WIDTH
        rDirection = cute.make_rmem_tensor(WIDTH, Float32)
        rDirection.fill(0.0)
        if moves:
          grad = load_vector(mGrad, start, WIDTH).load().to(Float32) * mScale[0]
          old = load_vector(mMomentum, start, WIDTH).load().to(Float32)
          average = old + rest * (grad - old)
          store_vector(mMomentum, start, average)
          rDirection.store(average + rest * (grad - average))
        direction = rDirection.load()
        store_vector(mDirection, start, direction)
        squares += (direction * direction).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
      squares = cute.arch.warp_reduction_sum(squares)
      if lane == 0:
        mSquares[row] = squares


class Norm:
  """The Frobenius norm + 1e-7 of one block of every matrix, a warp each.

  rows: the block's `Rows`, then those of a whole matrix.
  """

  @cute.jit
  def __call__(self, mSquares, mNorm, rows: tuple, stream):
    self.kernel(mSquares, mNorm, rows).launch(
      grid=[mNorm.shape[0], 1, 1], block=[LANES, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mSquares, mNorm, rows: tuple):
    lane, _, _ = cute.arch.thread_idx()
    matrix, _, _ = cute.arch.block_idx()
    whole = rows[3]
    total = Float32(0.0)
    for row in cutlass.range(lane, _count(rows), LANES, unroll=4):
      total += mSquares[Int64(matrix) * whole + _stored(row, rows)]
    total = cute.arch.warp_reduction_sum(total)
    if lane == 0:
      mNorm[matrix] = cute.math.sqrt(total) + 1e-7


class Update:
  """One block's rows of a master, by O of the block, and the parameter.

  mParam is None when the parameter is its own master. rows: the block's `Rows`, then those of a
  whole matrix; vectors: of a row. keep: 1 - lr · decay; size: lr · size.
  """

  @cute.jit
  def __call__(
    self,
    mParam,
    mMaster,
    mO,
    mLive,
    mScale,
    rows: tuple,
    vectors: Int32,
    keep: Float32,
    size: Float32,
    stream,
  ):
    threads = mO.shape[0] // WIDTH
    self.kernel(mParam, mMaster, mO, mLive, mScale, rows, vectors, keep, size).launch(
      grid=[cute.ceil_div(threads, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(
    self,
    mParam,
    mMaster,
    mO,
    mLive,
    mScale,
    rows: tuple,
    vectors: Int32,
    keep: Float32,
    size: Float32,
  ):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    whole = rows[3]
    vector = bidx * THREADS + tidx
    source = Int64(vector) * WIDTH
    if source < mO.shape[0]:
      stored = _stored(vector // vectors, rows)
      target = (Int64(stored) * vectors + vector % vectors) * WIDTH
      if _moves(mScale, mLive, stored // whole):
        update = load_vector(mO, source, WIDTH).load().to(Float32)
        master = keep * load_vector(mMaster, target, WIDTH).load() - size * update
        store_vector(mMaster, target, master)
        if const_expr(mParam is not None):
          store_vector(mParam, target, master)


def _live(experts: bool):
  return fake(Float32, None, align=4) if experts else None


@cached
def compile_momentum(grad, momentum, experts):
  """Dtypes of the gradient and the momentum; whether matrices without a gradient stay."""
  state = fake(DTYPES[grad], None), fake(DTYPES[momentum], None), fake(Float32, None)
  squares, scale = fake(Float32, None, align=4), fake(Float32, 1, align=4)
  numbers = Int32(1), Int32(1), Float32(0.0)
  return compile_kernel(Momentum(), *state, squares, _live(experts), scale, *numbers)


@cached
def compile_norm():
  squares, norm = (fake(Float32, None, align=4) for _ in range(2))
  return compile_kernel(Norm(), squares, norm, (Int32(1),) * 4)


@cached
def compile_update(param, experts):
  """Dtype of the parameter (None: it is the master); whether matrices without a gradient stay."""
  mParam = None if param is None else fake(DTYPES[param], None)
  state = mParam, fake(Float32, None), fake(DTYPES[torch.bfloat16], None)
  scale, rows = fake(Float32, 1, align=4), (Int32(1),) * 4
  numbers = rows, Int32(1), Float32(0.0), Float32(0.0)
  return compile_kernel(Update(), *state, _live(experts), scale, *numbers)


@torch.no_grad()
def muon(
  params: list[Tensor],
  grads: list[Tensor],
  masters: list[Tensor],
  momenta: list[Tensor],
  *,
  blocks: Sequence[Rows],
  sizes: Sequence[float],
  steps: int,
  lr: float,
  momentum: float,
  weight_decay: float,
  grad_scale: Tensor,
  experts: bool,
) -> None:
  """See kernels.ops.Ops.muon. Tensors contiguous, blocks' sides multiples of 8; one launch per
  tensor and one per tensor and block, besides the norms' and Newton-Schulz's; bit-identical
  results, however the matrices are spread over calls.
  """
  grads = [grad.contiguous() for grad in grads]
  _check(params, grads, masters, momenta, grad_scale, blocks)
  if not params or not params[0].numel():
    return
  plain = [param.detach() for param in params]
  scale, shape = grad_scale.view(1), params[0].shape
  vectors, whole = shape[-1] // WIDTH, shape[-2]  # of a row, rows of a matrix
  live = [_nonzero(grad) if experts else None for grad in grads]
  direction = masters[0].new_empty(len(masters), *shape)
  squares = masters[0].new_empty(len(masters), *shape[:-1])
  run = compile_momentum(grads[0].dtype, momenta[0].dtype, experts)
  for grad, own, out, sums, moves in zip(grads, momenta, direction, squares, live, strict=True):
    state = (t.view(-1) for t in (grad, own, out, sums))
    run(*state, moves, scale, whole, vectors, 1 - momentum)
  pairs = list(zip(params, masters, strict=True))
  own_master = all((p.dtype, p.data_ptr()) == (m.dtype, m.data_ptr()) for p, m in pairs)
  run = compile_update(None if own_master else params[0].dtype, experts)
  for rows, size in zip(blocks, sizes, strict=True):
    norm = squares.new_empty(squares.shape[:-1])
    compile_norm()(squares.view(-1), norm.view(-1), (*rows, whole))
    update = newton_schulz(rows.view(direction).flatten(-3, -2), norm[..., None, None], steps)
    for param, master, o, moves in zip(plain, masters, update, live, strict=True):
      flat = None if own_master else param.view(-1)
      numbers = (*rows, whole), vectors, 1 - lr * weight_decay, lr * size
      run(flat, master.view(-1), o.view(-1), moves, scale, *numbers)
  torch.autograd.graph.increment_version(params)  # the kernels' writes are not torch's


def _nonzero(grad: Tensor) -> Tensor:
  """fp32 [E]: 1 for the matrices of [E, A, B] that are not zero throughout."""
  return (torch.linalg.vector_norm(grad, torch.inf, dim=(-2, -1)) != 0).float()


def _check(
  params: list[Tensor],
  grads: list[Tensor],
  masters: list[Tensor],
  momenta: list[Tensor],
  grad_scale: Tensor,
  blocks: Sequence[Rows],
) -> None:
  """KernelError for what the kernels cannot take."""
  groups = {"params": params, "grads": grads, "masters": masters, "momenta": momenta}
  check_lists("muon", list(groups.values()))
  check_scale("muon", grad_scale)
  for name, group in groups.items():
    found = {(tuple(t.shape), t.dtype) for t in group}
    kinds = {torch.float32} if name == "masters" else set(DTYPES)
    check(
      len(found) <= 1 and {dtype for _, dtype in found} <= kinds,
      f"muon: {name} are {sorted(map(str, found))}; need one shape and one dtype of "
      f"{sorted(map(str, kinds))}",
    )
    contiguous(**{f"{name}[{i}]": t for i, t in enumerate(group)})
  shapes = {tuple(t.shape) for group in groups.values() for t in group}
  check(len(shapes) <= 1, f"muon: shapes {sorted(shapes)} of one batch must agree")
  if params:
    check_device(check_same_device(*params, *grads, *masters, *momenta, grad_scale))
    whole, columns = params[0].shape[-2:]
    for period, start, stop in blocks:
      check(whole % period == 0, f"muon: {whole} rows are no multiple of a period of {period}")
      check_sides(whole // period * (stop - start), columns)
