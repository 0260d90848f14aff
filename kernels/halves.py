"""The two halves of `grouped_mlp` by autograd: for recipes whose products have no explicit pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
  x_ND, w13, w2 = (t.detach().requires_grad_(keep) for t in (x_ND, w13, w2))
  with torch.set_grad_enabled(keep):
    y_ND = mlp(x_ND, offset_E1, w13, w2, recipe)
  return y_ND.detach(), Graph(y_ND, x_ND, w13, w2)


def backward(
  graph: Graph, dy_ND: Tensor, gate_N: Tensor
) -> tuple[Tensor, Tensor, Callable[[], tuple[Tensor, Tensor]]]:
  """`Ops.grouped_mlp_backward` after `forward`."""
  y_ND, *leaves = graph
  dgate_N = (dy_ND.to(gate_N.dtype) * y_ND.detach().to(gate_N.dtype)).sum(1)
  scaled_ND = (gate_N[:, None] * dy_ND.to(gate_N.dtype)).to(dy_ND.dtype)
  dx_ND, dw13, dw2 = torch.autograd.grad(y_ND, leaves, scaled_ND)
  return dx_ND, dgate_N, lambda: (dw13, dw2)
