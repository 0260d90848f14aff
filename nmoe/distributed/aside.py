"""A part of a layer whose graph is its own: it runs, forward and backward, when the layer says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

Back = Callable[[Tensor], Tensor | None]


def aside(f: Callable[[Tensor], Tensor], x: Tensor, *, keep: bool) -> tuple[Tensor, Back | None]:
  """f(x) without its graph, and with `keep` its backward pass, to be run once: dy -> dx.

  dx is None if f has none; gradients of f's weights go where autograd puts them. What is kept for
  it is what f's operations keep, and neither x nor f(x).
  """
  put: list[Tensor] = []
  with torch.set_grad_enabled(keep):
    root = x.new_empty(0).requires_grad_(keep)
    y = f(_Leaf.apply(root, x.detach(), put))
  if not keep:
    return y, None
  edge = get_gradient_edge(y)

  def back(dy: Tensor) -> Tensor | None:
    torch.autograd.backward(edge, dy)
    return put.pop() if put else None

  return y.detach(), back


class _Leaf(torch.autograd.Function):
  """x, whose gradient is put aside: the graph keeps no x of its own. root makes it one."""

  @staticmethod
  def forward(ctx: Any, root: Tensor, x: Tensor, put: list[Tensor]) -> Tensor:
    ctx.put = put
    return x.view_as(x)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dx: Tensor) -> tuple:
    ctx.put.append(dx)
    return None, None, None
