"""The routed experts of one GPU, forward and backward, without a gathered copy of the input.

Forward, for row n = (t, k) of expert e (kernels.ops.Layout gives the order):
  preact[n] = w13[e] · x[t],   act[n] = swiglu(preact[n]),   out[n] = w2[e] · act[n],
  y[t] = Σ_k gate[t, k] · out[row[t, k]]
The gather is inside the first GEMM and SwiGLU in its epilogue. Kept for backward: x, preact, gate
and the layout; neither act nor out. Backward, from dy [T, D] and da[n] = w2[e]ᵀ · dy[t], four
GEMMs, of which three gather:
  dgate[n] = act[n] · da[n],   dpreact[n] = swiglu'(preact[n]) · gate[n] · da[n]   (one epilogue)
  dw2[e] = Σ_n dy[t] (gate[n] · act[n])ᵀ,   dw13[e] = Σ_n dpreact[n] x[t]ᵀ,
  dx[t] = Σ_k w13[e]ᵀ · dpreact[row[t, k]]
FLOPs: 18 · N · D · F. Every sum has a fixed order: results are bit-identical from run to run.

With router, layout and combine 0.86 of a dense product's rate at T 32768, D 2048, F 1408, E 64, K 6
on one H200 (kernels/RESULTS.md). The gather inside costs a fifth of its product, by copies of 16
bytes a lane; rows gathered before cost more.

fp8 and nvfp4 (kernels.cuda.products) gather the rows first; emulated, SwiGLU is on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import halves
from kernels.cuda import gemms
from kernels.cuda.combine import sum_rows, sum_rows_backward
from kernels.cuda.products import block_scaled_mlp
from kernels.cuda.tail import zero_tail
from kernels.gradient import gradient
from kernels.ops import Layout, Product, Recipe, check


def _check(x: Tensor, offset: Tensor, w13: Tensor, w2: Tensor) -> None:
  gemms.check_operands(x=x, w13=w13, w2=w2)
  num_experts, dim, width = w2.shape
  check(
    w13.shape == (num_experts, 2 * width, dim) and x.ndim == 2 and x.shape[1] == dim,
    f"experts: x {tuple(x.shape)}, w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} must be [N, D], "
    "[E, 2F, D] and [E, D, F]",
  )
  check(
    offset.dtype == torch.int32
    and offset.shape == (num_experts + 1,)
    and offset.device == x.device,
    f"experts: offset is {offset.dtype} {tuple(offset.shape)} on {offset.device}; need int32 "
    f"({num_experts + 1},) on {x.device}",
  )


def _dw13(
  x: Tensor, dpreact: Tensor, w13: Tensor, offset: Tensor, index: Tensor | None = None
) -> Tensor | None:
  def product(out: Tensor, add: bool) -> None:
    gemms.weight_grad(x, dpreact, offset, out.mT, index, add=add)

  return gradient(w13, product)


def _dw2(
  dy: Tensor, act: Tensor, w2: Tensor, offset: Tensor, index: Tensor | None = None
) -> Tensor | None:
  def product(out: Tensor, add: bool) -> None:
    gemms.weight_grad(dy, act, offset, out, index, add=add)

  return gradient(w2, product)


class _GroupedMlp(torch.autograd.Function):
  @staticmethod
  def forward(
    ctx, x: Tensor, offset: Tensor, w13: Tensor, w2: Tensor, keep: bool, recompute: bool
  ) -> Tensor:
    preact, act = gemms.gated(x, w13, offset=offset, keep=keep)
    ctx.save_for_backward(x, None if recompute else preact, offset, w13, w2)
    return zero_tail(gemms.rows(act, w2, offset), offset)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, preact, offset, w13, w2 = ctx.saved_tensors
    dy = dy.contiguous()
    if preact is None:
      preact = gemms.gated(x, w13, offset=offset)[0]
    dpreact, act, _ = gemms.dgated(dy, w2, preact, offset=offset)
    dw2 = _dw2(dy, act, w2, offset)
    dx = zero_tail(gemms.rows(dpreact, w13.mT, offset), offset)
    return dx, None, _dw13(x, dpreact, w13, offset), dw2, None, None


class _Experts(torch.autograd.Function):
  @staticmethod
  def forward(
    ctx,
    x: Tensor,
    gate: Tensor,
    layout: Layout,
    w13: Tensor,
    w2: Tensor,
    keep: bool,
    recompute: bool,
  ) -> Tensor:
    offset, row, source = layout
    token = source // gate.shape[1]
    preact, act = gemms.gated(x, w13, offset=offset, index=token, keep=keep)
    ctx.save_for_backward(x, None if recompute else preact, gate, *layout, w13, w2)
    return sum_rows(gemms.rows(act, w2, offset), row, gate)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, preact, gate, offset, row, source, w13, w2 = ctx.saved_tensors
    dy, token = dy.contiguous(), source // gate.shape[1]
    gate_N = gate.flatten().index_select(0, source)
    if preact is None:
      preact = gemms.gated(x, w13, offset=offset, index=token)[0]
    dpreact, act, dgate_N = gemms.dgated(dy, w2, preact, offset=offset, index=token, scale=gate_N)
    dw2 = _dw2(dy, act, w2, offset, token)
    dx = sum_rows(gemms.rows(dpreact, w13.mT, offset), row)
    dw13 = _dw13(x, dpreact, w13, offset, token)
    dgate = dgate_N.index_select(0, row.flatten()).view_as(gate)
    return dx, dgate, None, dw13, dw2, None, None


class _Gather(torch.autograd.Function):
  """x [T, D] -> the sorted rows [N, D]; the gradient sums a token's rows with k ascending."""

  @staticmethod
  def forward(ctx, x: Tensor, layout: Layout) -> Tensor:
    ctx.save_for_backward(layout.row_TK)
    return x.index_select(0, layout.source_N // layout.row_TK.shape[1])

  @staticmethod
  @once_differentiable
  def backward(ctx, dx_ND: Tensor):
    return sum_rows(dx_ND.contiguous(), *ctx.saved_tensors), None


class _SumRows(torch.autograd.Function):
  @staticmethod
  def forward(ctx, y_ND: Tensor, row_TK: Tensor, gate_TK: Tensor) -> Tensor:
    ctx.save_for_backward(y_ND, row_TK, gate_TK)
    return sum_rows(y_ND, row_TK, gate_TK)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy_TD: Tensor):
    dy_ND, dgate_TK = sum_rows_backward(dy_TD, *ctx.saved_tensors)
    return dy_ND, None, dgate_TK


def grouped_mlp(x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe) -> Tensor:
  """See kernels.ops.Ops.grouped_mlp. bf16; D and F are multiples of 8."""
  _check(x_ND, offset_E1, w13, w2)
  if x_ND.shape[0] == 0:
    return x_ND * 1
  if recipe.format != "bf16":
    return block_scaled_mlp(x_ND, w13, w2, offset_E1, recipe)
  how = torch.is_grad_enabled(), recipe.recompute
  return _GroupedMlp.apply(x_ND.contiguous(), offset_E1, w13.contiguous(), w2.contiguous(), *how)


class _Kept(NamedTuple):
  x: Tensor
  preact: Tensor | None  # None: to be computed again
  offset: Tensor


def grouped_mlp_forward(
  x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe, keep: bool
) -> tuple[Tensor | Product, _Kept | halves.Graph]:
  """See kernels.ops.Ops.grouped_mlp_forward. bf16; D and F are multiples of 8."""
  _check(x_ND, offset_E1, w13, w2)
  if x_ND.shape[0] == 0:
    return x_ND, _Kept(x_ND, None, offset_E1)
  if recipe.format != "bf16":
    return halves.forward(grouped_mlp, x_ND, offset_E1, w13, w2, recipe, keep)
  preact, act = gemms.gated(x_ND, w13, offset=offset_E1, keep=keep)
  kept = _Kept(x_ND, None if recipe.recompute else preact, offset_E1)
  return Product(act, w2, offset_E1), kept


def grouped_mlp_backward(
  kept: _Kept | halves.Graph, dy_ND: Tensor, gate_N: Tensor, w13: Tensor, w2: Tensor
) -> tuple[Tensor | Product, Tensor, Callable[[], tuple[Tensor | None, Tensor | None]]]:
  """See kernels.ops.Ops.grouped_mlp_backward. The epilogue that computes dgate scales by gate."""
  if isinstance(kept, halves.Graph):
    return halves.backward(kept, dy_ND, gate_N, w13, w2)
  x, preact, offset = kept
  if dy_ND.shape[0] == 0:
    return dy_ND, gate_N, lambda: (gradient(w13, _nothing), gradient(w2, _nothing))
  if preact is None:
    preact = gemms.gated(x, w13, offset=offset)[0]
  dpreact, act, dgate_N = gemms.dgated(dy_ND, w2, preact, offset=offset, scale=gate_N)

  def weights() -> tuple[Tensor | None, Tensor | None]:
    return _dw13(x, dpreact, w13, offset), _dw2(dy_ND, act, w2, offset)

  return Product(dpreact, w13.mT, offset), dgate_N, weights


def _nothing(out: Tensor, add: bool) -> None:
  """The product of no rows."""
  if not add:
    out.zero_()


def experts(
  x_TD: Tensor, gate_TK: Tensor, layout: Layout, w13: Tensor, w2: Tensor, recipe: Recipe
) -> Tensor:
  """See kernels.ops.Ops.experts. bf16 with fp32 gates; D and F are multiples of 8."""
  _check(x_TD, layout.offset_E1, w13, w2)
  tokens, top_k = gate_TK.shape
  check(
    gate_TK.dtype == torch.float32
    and tokens == x_TD.shape[0]
    and layout.row_TK.shape == gate_TK.shape
    and layout.source_N.shape == (tokens * top_k,),
    f"experts: gate is {gate_TK.dtype} {tuple(gate_TK.shape)}, row {tuple(layout.row_TK.shape)}, "
    f"source {tuple(layout.source_N.shape)} for {x_TD.shape[0]} tokens; need fp32 [T, K], [T, K] "
    "and [T·K]",
  )
  if tokens * top_k == 0:
    return x_TD * 0
  if recipe.format != "bf16":
    x_ND = _Gather.apply(x_TD, layout)
    y_ND = grouped_mlp(x_ND, layout.offset_E1, w13, w2, recipe)
    return _SumRows.apply(y_ND, layout.row_TK, gate_TK.contiguous())
  how = torch.is_grad_enabled(), recipe.recompute
  return _Experts.apply(
    x_TD.contiguous(), gate_TK.contiguous(), layout, w13.contiguous(), w2.contiguous(), *how
  )
