"""The routed experts of one rank: SwiGLU blocks over expert-sorted rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import halves
from kernels.arithmetic import swiglu as interleaved_swiglu
from kernels.arithmetic import wide
from kernels.ops import Layout, Product, Recipe, check
from kernels.reference import swiglu
from kernels.reference.products import block_scaled_product, rows_by_weight, spans
from kernels.reference.router import combine, sum_rows


def grouped_mlp(x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe) -> Tensor:
  """See Ops.grouped_mlp. Reads the offsets on the host (one synchronisation on a CUDA device)."""
  offsets = _checked_offsets(x_ND, offset_E1, w13, w2)
  if recipe.format == "bf16":
    return _GroupedMlp.apply(x_ND, w13, w2, offsets, recipe.recompute)
  h_NF = block_scaled_product(x_ND, w13, offsets, recipe, 0)
  return block_scaled_product(interleaved_swiglu(h_NF), w2, offsets, recipe, 1)


class _Kept(NamedTuple):
  x: Tensor
  h: Tensor | None  # None: to be computed again
  offsets: list[int]


def grouped_mlp_forward(
  x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe, keep: bool
) -> tuple[Tensor | Product, _Kept | halves.Graph]:
  """See Ops.grouped_mlp_forward."""
  if recipe.format != "bf16":
    return halves.forward(grouped_mlp, x_ND, offset_E1, w13, w2, recipe, keep)
  offsets = _checked_offsets(x_ND, offset_E1, w13, w2)
  h = rows_by_weight(x_ND, swiglu.to_halves(w13).mT, offsets, x_ND.dtype)
  kept = _Kept(x_ND, None if recipe.recompute else h, offsets)
  return Product(swiglu.forward(h), w2, offset_E1), kept


def grouped_mlp_backward(
  kept: _Kept | halves.Graph, dy_ND: Tensor, gate_N: Tensor, w13: Tensor, w2: Tensor
) -> tuple[Tensor | Product, Tensor, Callable[[], tuple[Tensor, Tensor]]]:
  """See Ops.grouped_mlp_backward. The arithmetic is that of `experts`."""
  if isinstance(kept, halves.Graph):
    return halves.backward(kept, dy_ND, gate_N, w13, w2)
  x, h, offsets = kept
  if h is None:
    h = rows_by_weight(x, swiglu.to_halves(w13).mT, offsets, x.dtype)
  dtype = wide(dy_ND, gate_N)
  da = rows_by_weight(dy_ND, w2, offsets, dy_ND.dtype).to(dtype)
  gate_N1 = gate_N.to(dtype)[:, None]
  dh, a = swiglu.backward(h, da * gate_N1)
  dgate_N = torch.linalg.vecdot(a.to(dtype), da).to(gate_N.dtype)
  scaled = (a * gate_N1).to(a.dtype)

  def weights() -> tuple[Tensor, Tensor]:
    dw13, dw2 = torch.zeros_like(w13), torch.zeros_like(w2)
    for e, rows in spans(offsets):
      torch.mm(dy_ND[rows].T, scaled[rows], out=dw2[e])
      torch.mm(dh[rows].T, x[rows], out=dw13[e])
    return swiglu.to_interleaved(dw13), dw2

  dx = Product(dh, swiglu.to_halves(w13).mT, torch.tensor(offsets))
  return dx, dgate_N, weights


def experts(
  x_TD: Tensor, gate_TK: Tensor, layout: Layout, w13: Tensor, w2: Tensor, recipe: Recipe
) -> Tensor:
  """See Ops.experts."""
  _check_weights(x_TD, w13, w2)
  if recipe.format == "bf16":
    return _Experts.apply(x_TD, gate_TK, w13, w2, layout, recipe.recompute)
  x_ND = _Gather.apply(x_TD, layout)
  y_ND = grouped_mlp(x_ND, layout.offset_E1, w13, w2, recipe)
  return combine(y_ND.index_select(0, layout.row_TK.flatten()).unflatten(0, gate_TK.shape), gate_TK)


def _checked_offsets(x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor) -> list[int]:
  _check_weights(x_ND, w13, w2)
  offsets = offset_E1.tolist()
  check(
    len(offsets) == w13.shape[0] + 1 and offsets[-1] <= x_ND.shape[0],
    f"grouped_mlp: {len(offsets)} offsets up to {offsets[-1]} for {w13.shape[0]} experts and "
    f"{x_ND.shape[0]} rows; need one more offset than experts, none beyond the rows",
  )
  return offsets


def _check_weights(x: Tensor, w13: Tensor, w2: Tensor) -> None:
  num_experts, dim, width = w2.shape
  check(
    w13.shape == (num_experts, 2 * width, dim) and x.shape[1] == dim,
    f"experts: x {tuple(x.shape)}, w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} must be [N, D], "
    "[E, 2F, D] and [E, D, F]",
  )


class _Gather(torch.autograd.Function):
  """x [T, D] -> the sorted rows [N, D]; the gradient sums a token's rows with k ascending."""

  @staticmethod
  def forward(ctx, x: Tensor, layout: Layout) -> Tensor:
    ctx.row_TK = layout.row_TK
    return x.index_select(0, layout.source_N // layout.row_TK.shape[1])

  @staticmethod
  @once_differentiable
  def backward(ctx, dx_ND: Tensor):
    ones = torch.ones_like(ctx.row_TK, dtype=wide(dx_ND))
    return sum_rows(dx_ND, ctx.row_TK, ones).to(dx_ND.dtype), None


class _GroupedMlp(torch.autograd.Function):
  """Saves x and the pre-activations h, or computes h again. An expert's rows pass the whole chain
  while in the cache.
  """

  @staticmethod
  def forward(
    ctx, x: Tensor, w13: Tensor, w2: Tensor, offsets: list[int], recompute: bool
  ) -> Tensor:
    w13 = swiglu.to_halves(w13)
    h = x.new_empty(x.shape[0], w13.shape[1])
    y = torch.empty_like(x)
    for e, rows in spans(offsets):
      torch.mm(x[rows], w13[e].T, out=h[rows])
      torch.mm(swiglu.forward(h[rows]), w2[e].T, out=y[rows])
    y[offsets[-1] :] = 0
    ctx.save_for_backward(x, None if recompute else h, w13, w2)
    ctx.offsets = offsets
    return y

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, h, w13, w2 = ctx.saved_tensors
    dx, dw13, dw2 = torch.empty_like(x), torch.zeros_like(w13), torch.zeros_like(w2)
    for e, rows in spans(ctx.offsets):
      h_e = x[rows] @ w13[e].T if h is None else h[rows]
      dh, a = swiglu.backward(h_e, dy[rows] @ w2[e])
      torch.mm(dy[rows].T, a, out=dw2[e])
      torch.mm(dh.T, x[rows], out=dw13[e])
      torch.mm(dh, w13[e], out=dx[rows])
    dx[ctx.offsets[-1] :] = 0
    return dx, swiglu.to_interleaved(dw13), dw2, None, None


class _Experts(torch.autograd.Function):
  """Saves x, h [N, 2F], if it is not computed again, and the indices; gathers x again in backward,
  one expert's rows at a time.

  With a = swiglu(h), y = w2 · a and da' = w2ᵀ · dout: dgate = y · dout = a · da', da = gate · da'
  and dw2 = doutᵀ · (gate · a), so neither y nor gate · dout is needed.
  """

  @staticmethod
  def forward(
    ctx, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, layout: Layout, recompute: bool
  ) -> Tensor:
    offsets = layout.offset_E1.tolist()
    token = layout.source_N // gate.shape[1]
    w13 = swiglu.to_halves(w13)
    h = x.new_empty(token.numel(), w13.shape[1])
    y = x.new_empty(token.numel(), x.shape[1])
    for e, rows in spans(offsets):
      torch.mm(x.index_select(0, token[rows]), w13[e].T, out=h[rows])
      torch.mm(swiglu.forward(h[rows]), w2[e].T, out=y[rows])
    kept = None if recompute else h
    ctx.save_for_backward(x, gate, w13, w2, kept, token, layout.source_N, layout.row_TK)
    ctx.offsets = offsets
    return sum_rows(y, layout.row_TK, gate).to(x.dtype)

  @staticmethod
  @once_differentiable
  def backward(ctx, dout: Tensor):
    x, gate, w13, w2, h, token, source, row_TK = ctx.saved_tensors
    dtype = wide(x, gate)
    gate_N1 = gate.to(dtype).flatten().index_select(0, source)[:, None]
    dgate = torch.empty_like(gate_N1)
    dx = x.new_empty(token.numel(), x.shape[1])
    dw13, dw2 = torch.zeros_like(w13), torch.zeros_like(w2)
    for e, rows in spans(ctx.offsets):
      x_e, dout_e = x.index_select(0, token[rows]), dout.index_select(0, token[rows])
      h_e = x_e @ w13[e].T if h is None else h[rows]
      gate_e, da = gate_N1[rows], (dout_e @ w2[e]).to(dtype)
      dh, a = swiglu.backward(h_e, da * gate_e)
      dgate[rows] = torch.linalg.vecdot(a.to(dtype), da)[:, None]
      torch.mm(dout_e.T, (a * gate_e).to(x.dtype), out=dw2[e])
      torch.mm(dh.T, x_e, out=dw13[e])
      torch.mm(dh, w13[e], out=dx[rows])
    dx = sum_rows(dx, row_TK, torch.ones_like(gate)).to(x.dtype)
    return dx, dgate.to(gate.dtype)[:, 0][row_TK], swiglu.to_interleaved(dw13), dw2, None, None
