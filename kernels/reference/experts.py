"""The routed experts of one rank: SwiGLU blocks over expert-sorted rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.ops import Layout, Recipe, check
from kernels.reference import swiglu
from kernels.reference.dtypes import wide
from kernels.reference.router import weighted_sum


def grouped_mlp(x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe) -> Tensor:
  """See Ops.grouped_mlp. Reads the offsets on the host (one synchronisation on a CUDA device)."""
  _check_weights(x_ND, w13, w2)
  check(recipe.format == "bf16", f"grouped_mlp: format {recipe.format!r} is not available")
  offsets = offset_E1.tolist()
  check(
    len(offsets) == w13.shape[0] + 1 and offsets[-1] <= x_ND.shape[0],
    f"grouped_mlp: {len(offsets)} offsets up to {offsets[-1]} for {w13.shape[0]} experts and "
    f"{x_ND.shape[0]} rows; need one more offset than experts, none beyond the rows",
  )
  return _GroupedMlp.apply(x_ND, w13, w2, offsets)


def experts(
  x_TD: Tensor, gate_TK: Tensor, layout: Layout, w13: Tensor, w2: Tensor, recipe: Recipe
) -> Tensor:
  """See Ops.experts."""
  _check_weights(x_TD, w13, w2)
  check(recipe.format == "bf16", f"experts: format {recipe.format!r} is not available")
  token_N = layout.source_N // max(1, gate_TK.shape[1])
  return _Experts.apply(x_TD, gate_TK, w13, w2, layout, token_N)


def _check_weights(x: Tensor, w13: Tensor, w2: Tensor) -> None:
  num_experts, dim, width = w2.shape
  check(
    w13.shape == (num_experts, 2 * width, dim) and x.shape[1] == dim,
    f"experts: x {tuple(x.shape)}, w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} must be [N, D], "
    "[E, 2F, D] and [E, D, F]",
  )


def _spans(offsets: list[int]):
  """(expert, first row, end row) of the experts that have rows."""
  for expert, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
    if end > start:
      yield expert, start, end


def rows_by_weight(x: Tensor, w: Tensor, offsets: list[int]) -> Tensor:
  """x [N', I] · w[e] [I, O] for the rows of each expert e; rows beyond offsets[-1] are zero."""
  out = x.new_empty(x.shape[0], w.shape[2])
  for e, start, end in _spans(offsets):
    torch.mm(x[start:end], w[e], out=out[start:end])
  out[offsets[-1] :] = 0
  return out


def rows_by_rows(dy: Tensor, x: Tensor, offsets: list[int]) -> Tensor:
  """dy[rows of e]ᵀ · x[rows of e] for each expert: [E, O, I]; zero for an expert without rows."""
  out = x.new_zeros(len(offsets) - 1, dy.shape[1], x.shape[1])
  for e, start, end in _spans(offsets):
    torch.mm(dy[start:end].T, x[start:end], out=out[e])
  return out


class _GroupedMlp(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x: Tensor, w13: Tensor, w2: Tensor, offsets: list[int]) -> Tensor:
    h = rows_by_weight(x, w13.mT, offsets)
    ctx.save_for_backward(x, h, w13, w2)
    ctx.offsets = offsets
    return rows_by_weight(swiglu.forward(h), w2.mT, offsets)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, h, w13, w2 = ctx.saved_tensors
    offsets = ctx.offsets
    dw2 = rows_by_rows(dy, swiglu.forward(h), offsets)
    dh = swiglu.backward(h, rows_by_weight(dy, w2, offsets))
    return rows_by_weight(dh, w13, offsets), rows_by_rows(dh, x, offsets), dw2, None


class _Experts(torch.autograd.Function):
  """Saves x, the pre-activations h [N, 2F] and the indices; gathers x again in backward.

  With a = swiglu(h), y = w2 · a and da' = w2ᵀ · dout: dgate = y · dout = a · da', da = gate · da'
  and dw2 = doutᵀ · (gate · a), so neither y nor gate · dout is needed.
  """

  @staticmethod
  def forward(
    ctx, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, layout: Layout, token_N: Tensor
  ):
    offsets = layout.offset_E1.tolist()
    h = rows_by_weight(x.index_select(0, token_N), w13.mT, offsets)
    y = rows_by_weight(swiglu.forward(h), w2.mT, offsets)
    ctx.save_for_backward(x, gate, w13, w2, h, token_N, layout.source_N, layout.row_TK)
    ctx.offsets = offsets
    return weighted_sum(_to_tokens(y, layout.row_TK), gate).to(x.dtype)

  @staticmethod
  @once_differentiable
  def backward(ctx, dout: Tensor):
    x, gate, w13, w2, h, token_N, source_N, row_TK = ctx.saved_tensors
    offsets = ctx.offsets
    gate_N1 = gate.flatten().index_select(0, source_N)[:, None]
    dout_ND = dout.index_select(0, token_N)
    a = swiglu.forward(h)
    da = rows_by_weight(dout_ND, w2, offsets).to(wide(x, gate))
    dgate_N = (a * da).sum(-1)
    dw2 = rows_by_rows(dout_ND, (a * gate_N1).to(x.dtype), offsets)
    dh = swiglu.backward(h, da.mul_(gate_N1))
    dw13 = rows_by_rows(dh, x.index_select(0, token_N), offsets)
    dx_TKD = _to_tokens(rows_by_weight(dh, w13, offsets), row_TK)
    dx = weighted_sum(dx_TKD, torch.ones_like(gate)).to(x.dtype)
    return dx, dgate_N[row_TK].to(gate.dtype), dw13, dw2, None, None


def _to_tokens(y_ND: Tensor, row_TK: Tensor) -> Tensor:
  return y_ND.index_select(0, row_TK.flatten()).view(*row_TK.shape, y_ND.shape[1])
