"""The fixed-order sum over a token's K rows, forward and backward.

  y[t] = Σ_k gate[t, k] · rows[row[t, k]]         fp32, k ascending, rounded once
  drows[row[t, k]] = gate[t, k] · dy[t]           rounded once
  dgate[t, k] = dy[t] · rows[row[t, k]]           fp32, fixed order

Without `row` the rows are y_TKD's own, t·K + k; without `gate` the weights are 1 (the dx of a
gather). No atomics: results are bit-identical from run to run. Every row crosses memory once, in
16-byte accesses: forward reads N·D and writes T·D elements, backward reads N·D + T·D and writes N·D
(N = T·K).

On one H200 forward runs at 1.05 of a copy's rate, it reads more than it writes, and backward at
0.98 (kernels/RESULTS.md).
"""

from __future__ import annotations

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
  vector_width,
)
from kernels.ops import check, check_same_device

THREADS = 256
WARP = 32


class CombineForward:
  """One thread owns 16 bytes of one token's output and reads them from the K rows."""

  def __init__(self, width: int, dim: int, top_k: int):
    self.width, self.dim, self.top_k = width, dim, top_k

  @cute.jit
  def __call__(self, mRows: cute.Tensor, mRow, mGate, mY: cute.Tensor, stream):
    vectors = mY.shape[0] * (self.dim // self.width)
    self.kernel(mRows, mRow, mGate, mY).launch(
      grid=[cute.ceil_div(vectors, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mRows: cute.Tensor, mRow, mGate, mY: cute.Tensor):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    per_token = const_expr(self.dim // self.width)
    index = Int64(bidx) * THREADS + tidx
    token = index // per_token
    column = (index % per_token) * self.width
    if token < mY.shape[0]:
      rX = []
      for k in cutlass.range_constexpr(self.top_k):
        slot = token * self.top_k + k
        row = slot
        if const_expr(mRow is not None):
          row = Int64(mRow[slot])
        rX.append(load_vector(mRows, row * self.dim + column, self.width))
      rSum = cute.make_rmem_tensor(self.width, Float32)
      rSum.fill(0.0)
      for k in cutlass.range_constexpr(self.top_k):
        gate = Float32(1.0)
        if const_expr(mGate is not None):
          gate = mGate[token * self.top_k + k]
        rSum.store(rSum.load() + rX[k].load().to(Float32) * gate)
      store_vector(mY, token * self.dim + column, rSum.load())


class CombineBackward:
  """One warp owns one row (t, k): writes gate · dy and reduces the dot product. Neighbours share dy
  in L1.
  """

  def __init__(self, width: int, dim: int, top_k: int):
    self.width, self.dim, self.top_k = width, dim, top_k

  @cute.jit
  def __call__(self, mDy: cute.Tensor, mRows: cute.Tensor, mRow, mGate, mDrows, mDgate, stream):
    blocks = cute.ceil_div(mDgate.shape[0], THREADS // WARP)
    self.kernel(mDy, mRows, mRow, mGate, mDrows, mDgate).launch(
      grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mDy: cute.Tensor, mRows: cute.Tensor, mRow, mGate, mDrows, mDgate):
    lane = cute.arch.lane_idx()
    bidx, _, _ = cute.arch.block_idx()
    slot = Int64(bidx) * (THREADS // WARP) + cute.arch.warp_idx()
    if slot < mDgate.shape[0]:
      row = slot
      if const_expr(mRow is not None):
        row = Int64(mRow[slot])
      gate = mGate[slot]
      dy_start = slot // self.top_k * self.dim
      dot = Float32(0.0)
      for column in cutlass.range(lane * self.width, self.dim, WARP * self.width, unroll=4):
        rDy = load_vector(mDy, dy_start + column, self.width).load().to(Float32)
        rX = load_vector(mRows, row * self.dim + column, self.width).load().to(Float32)
        dot += (rDy * rX).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
        store_vector(mDrows, row * self.dim + column, rDy * gate)
      dot = cute.arch.warp_reduction_sum(dot)
      if lane == 0:
        mDgate[slot] = dot


@cached
def compile_combine(dtype, dim: int, top_k: int, gather: bool, weighted: bool):
  rows, y = fake(DTYPES[dtype], None, dim), fake(DTYPES[dtype], None, dim)
  row = fake(Int32, None, align=4) if gather else None
  gate = fake(Float32, None, align=4) if weighted else None
  kernel = CombineForward(vector_width(dtype, dim, "rows"), dim, top_k)
  return compile_kernel(kernel, rows, row, gate, y)


@cached
def compile_combine_backward(dtype, dim: int, top_k: int, gather: bool):
  dy, rows, drows = (fake(DTYPES[dtype], None, dim) for _ in range(3))
  row = fake(Int32, None, align=4) if gather else None
  gate, dgate = fake(Float32, None, align=4), fake(Float32, None, align=4)
  kernel = CombineBackward(vector_width(dtype, dim, "rows"), dim, top_k)
  return compile_kernel(kernel, dy, rows, row, gate, drows, dgate)


def _check(rows_ND: Tensor, row_TK: Tensor | None, gate_TK: Tensor | None) -> None:
  tensors = [t for t in (rows_ND, row_TK, gate_TK) if t is not None]
  check_device(check_same_device(*tensors))
  check(rows_ND.ndim == 2, f"rows has shape {tuple(rows_ND.shape)}; need [N, D]")
  vector_width(rows_ND.dtype, rows_ND.shape[1], "rows")
  for name, t, dtype in (("row", row_TK, torch.int32), ("gate", gate_TK, torch.float32)):
    check(t is None or t.dtype == dtype, f"{name} is {t is not None and t.dtype}; need {dtype}")
  shapes = {tuple(t.shape) for t in (row_TK, gate_TK) if t is not None}
  check(
    len(shapes) == 1 and len(next(iter(shapes))) == 2,
    f"row and gate have shapes {shapes}; need one [T, K]",
  )


def sum_rows(rows_ND: Tensor, row_TK: Tensor | None, gate_TK: Tensor | None = None) -> Tensor:
  """Σ_k gate[t, k] · rows[row[t, k]] -> [T, D] in rows' dtype. Not differentiable.

  rows bf16 or fp32 contiguous, row int32 with values below N (None: t·K + k), gate fp32 (None: 1).
  One of row and gate is needed for the shape [T, K].
  """
  _check(rows_ND, row_TK, gate_TK)
  num_tokens, top_k = (gate_TK if row_TK is None else row_TK).shape
  rows_ND = rows_ND.contiguous()
  y_TD = rows_ND.new_empty(num_tokens, rows_ND.shape[1])
  if y_TD.numel():
    row = None if row_TK is None else row_TK.reshape(-1)
    gate = None if gate_TK is None else gate_TK.reshape(-1)
    contiguous(rows=rows_ND)
    run = compile_combine(rows_ND.dtype, rows_ND.shape[1], top_k, row is not None, gate is not None)
    run(rows_ND, row, gate, y_TD)
  return y_TD


def sum_rows_backward(
  dy_TD: Tensor, rows_ND: Tensor, row_TK: Tensor | None, gate_TK: Tensor
) -> tuple[Tensor, Tensor]:
  """(drows [N, D] in rows' dtype, dgate fp32 [T, K]) of sum_rows. Rows that no slot names are left
  unwritten.
  """
  _check(rows_ND, row_TK, gate_TK)
  check(
    dy_TD.dtype == rows_ND.dtype and dy_TD.shape == (gate_TK.shape[0], rows_ND.shape[1]),
    f"dy is {dy_TD.dtype} {tuple(dy_TD.shape)}; need {rows_ND.dtype} "
    f"{(gate_TK.shape[0], rows_ND.shape[1])}",
  )
  dy_TD, rows_ND = dy_TD.contiguous(), rows_ND.contiguous()
  drows_ND, dgate_TK = torch.empty_like(rows_ND), torch.empty_like(gate_TK)
  if dgate_TK.numel() and rows_ND.shape[1]:
    row = None if row_TK is None else row_TK.reshape(-1)
    contiguous(dy=dy_TD, rows=rows_ND)
    run = compile_combine_backward(
      rows_ND.dtype, rows_ND.shape[1], gate_TK.shape[1], row is not None
    )
    run(dy_TD, rows_ND, row, gate_TK.reshape(-1), drows_ND, dgate_TK.view(-1))
  return drows_ND, dgate_TK


class _Combine(torch.autograd.Function):
  @staticmethod
  def forward(ctx, y_TKD: Tensor, gate_TK: Tensor) -> Tensor:
    ctx.save_for_backward(y_TKD, gate_TK)
    return sum_rows(y_TKD.flatten(0, 1), None, gate_TK)

  @staticmethod
  def backward(ctx, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
    y_TKD, gate_TK = ctx.saved_tensors
    dy_ND, dgate_TK = sum_rows_backward(dy_TD, y_TKD.flatten(0, 1), None, gate_TK)
    return dy_ND.view_as(y_TKD), dgate_TK


def combine(y_TKD: Tensor, gate_TK: Tensor) -> Tensor:
  """See kernels.ops.Ops.combine."""
  check(
    y_TKD.ndim == 3 and y_TKD.shape[:2] == gate_TK.shape,
    f"y has shape {tuple(y_TKD.shape)} and gate {tuple(gate_TK.shape)}; need [T, K, D] and [T, K]",
  )
  return _Combine.apply(y_TKD, gate_TK)
