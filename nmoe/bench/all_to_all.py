"""The yardstick of `nmoe bench rdep`: an MoE layer that moves rows by all_to_all_single."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.ops import Layout, Ops, Recipe
from nmoe.distributed.streams import beside, join


class _Permute(torch.autograd.Function):
  """x[index], of a permutation and its inverse."""

  @staticmethod
  def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    ctx.inverse = inverse
    return x.index_select(0, index)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy: Tensor) -> tuple:
    return dy.index_select(0, ctx.inverse), None, None


class _Expand(torch.autograd.Function):
  """A token's row for each of its experts, in the layout's order; backward sums them in fp32."""

  @staticmethod
  def forward(ctx: Any, x_TD: Tensor, layout: Layout, ops: Ops) -> Tensor:
    ctx.row_TK, ctx.ops = layout.row_TK, ops
    return x_TD.index_select(0, layout.source_N // layout.row_TK.shape[1])

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dx_ND: Tensor) -> tuple:
    dx_TKD = dx_ND.index_select(0, ctx.row_TK.flatten()).unflatten(0, ctx.row_TK.shape)
    ones_TK = torch.ones(ctx.row_TK.shape, device=dx_ND.device)
    return ctx.ops.combine(dx_TKD, ones_TK), None, None


class _AllToAll(torch.autograd.Function):
  """Rows to the ranks, by their numbers; backward is the way back."""

  @staticmethod
  def forward(ctx: Any, x: Tensor, out_R: list[int], into_R: list[int]) -> Tensor:
    ctx.out_R, ctx.into_R = out_R, into_R
    y = x.new_empty(sum(into_R), x.shape[1])
    dist.all_to_all_single(y, x, into_R, out_R)
    return y

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy: Tensor) -> tuple:
    dx = dy.new_empty(sum(ctx.out_R), dy.shape[1])
    dist.all_to_all_single(dx, dy.contiguous(), ctx.out_R, ctx.into_R)
    return dx, None, None


class AllToAll:
  """Sort by expert, exchange counts and rows, experts, rows back; meanwhile the shared experts, on
  a stream of their own where there are streams. Over all ranks; rank r owns E/R neighbouring
  experts.
  """

  def __init__(
    self,
    ops: Ops,
    recipe: Recipe,
    shared: Callable[[Tensor], Tensor] | None,
    side: torch.cuda.Stream | None,
  ):
    self.ops, self.recipe, self.shared, self.side = ops, recipe, shared, side

  def __call__(self, expert_TK: Tensor, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """[T, D]; w13 and w2 are this rank's experts, as Rdep.experts takes them."""
    ranks, ops = dist.get_world_size(), self.ops
    shared_TD = self._shared_experts(x)
    layout = ops.layout(expert_TK, len(w13) * ranks)
    count_E = layout.offset_E1.diff()
    count_RL = torch.empty_like(count_E)
    dist.all_to_all_single(count_RL, count_E)
    splits = torch.stack([count_E, count_RL]).view(2, ranks, -1).sum(2)
    out_R, into_R = splits.tolist()  # the host must know them
    rows = _AllToAll.apply(_Expand.apply(x, layout, ops), out_R, into_R)
    held = torch.arange(len(w13), device=x.device).repeat(ranks)
    expert_N = held.repeat_interleave(count_RL, output_size=sum(into_R))
    order = expert_N.argsort(stable=True)
    inverse, offset_L1 = order.argsort(), offsets(count_RL.view(ranks, -1).sum(0))
    y = ops.grouped_mlp(_Permute.apply(rows, order, inverse), offset_L1, w13, w2, self.recipe)
    back = _AllToAll.apply(_Permute.apply(y, inverse, order), into_R, out_R)
    sorted_TK = layout.row_TK.flatten()
    y_TKD = _Permute.apply(back, sorted_TK, layout.source_N).unflatten(0, gate.shape)
    y_TD = ops.combine(y_TKD, gate)
    if shared_TD is None:
      return y_TD
    join(self.side)
    return y_TD + shared_TD

  def _shared_experts(self, x: Tensor) -> Tensor | None:
    """The shared experts, on their own stream; autograd runs their backward pass there too."""
    if self.shared is None:
      return None
    with beside(self.side):
      return self.shared(x)


def offsets(count_L: Tensor) -> Tensor:
  """int32 [L + 1]: where each expert's rows begin, from their numbers."""
  return torch.nn.functional.pad(count_L.cumsum(0), (1, 0)).int()
