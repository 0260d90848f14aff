"""The two halves of `grouped_mlp` by autograd: for recipes whose products have no explicit pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gradient import in_fp32
from kernels.ops import Recipe


class Graph(NamedTuple):
  """What the forward half keeps: y, and the leaves that it was computed from."""

  y_ND: Tensor
  x_ND: Tensor
  w13: Tensor
  w2: Tensor


def forward(
  mlp: Callable[..., Tensor],
  x_ND: Tensor,
  offset_E1: Tensor,
  w13: Tensor,
  w2: Tensor,
  recipe: Recipe,
  keep: bool,
) -> tuple[Tensor, Graph]:
  """`Ops.grouped_mlp_forward` of a differentiable `grouped_mlp`."""
  leaves = x_ND, w13, w2 = [_leaf(t, keep) for t in (x_ND, w13, w2)]
  with torch.set_grad_enabled(keep):
    y_ND = mlp(x_ND, offset_E1, w13, w2, recipe)
  return y_ND.detach(), Graph(y_ND, *leaves)


def _leaf(x: Tensor, keep: bool) -> Tensor:
  """x detached, a leaf that wants a gradient as x does, if `keep`."""
  leaf = x.detach().requires_grad_(keep)
  if keep and in_fp32(x):
    leaf.grad_dtype = torch.float32
  return leaf


def backward(
  graph: Graph, dy_ND: Tensor, gate_N: Tensor, w13: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Callable[[], tuple[Tensor | None, Tensor | None]]]:
  """`Ops.grouped_mlp_backward` after `forward`. The leaves share the weights' fp32 `.grad`s."""
  y_ND, *leaves = graph
  for leaf, weight in zip(leaves[1:], (w13, w2), strict=True):
    if in_fp32(leaf):
      leaf.grad = weight.grad
  dgate_N = (dy_ND.to(gate_N.dtype) * y_ND.detach().to(gate_N.dtype)).sum(1)
  scaled_ND = (gate_N[:, None] * dy_ND.to(gate_N.dtype)).to(dy_ND.dtype)
  dx_ND, dw13, dw2 = torch.autograd.grad(y_ND, leaves, scaled_ND, allow_unused=True)
  return dx_ND, dgate_N, lambda: (dw13, dw2)
