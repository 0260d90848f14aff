"""Muon on master weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import Rows, check_lists
from kernels.reference.newton_schulz import newton_schulz


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
  """See Ops.muon (arXiv 2502.16982 Eq 2-4).

  Arithmetic is in the masters' dtype; bf16 momenta are rounded when they are stored.
  """
  check_lists("muon", (params, grads, masters, momenta))
  rate = torch.where(grad_scale.isnan(), 0.0, lr)
  live = [_nonzero(grad) if experts else None for grad in grads]
  updates = torch.stack(
    [
      _direction(grad.to(master.dtype), own, moves, momentum, grad_scale)
      for grad, master, own, moves in zip(grads, masters, momenta, live, strict=True)
    ]
  )
  for block, size in zip(blocks, sizes, strict=True):
    part = block.view(updates)
    part.copy_(newton_schulz(part.flatten(-3, -2), steps).view_as(part)).mul_(size)
  for param, master, update, moves in zip(params, masters, updates, live, strict=True):
    own = rate if moves is None else torch.where(moves, rate, 0.0)
    master.mul_(1 - own * weight_decay).sub_(update.mul_(own))
    if param is not master:
      param.copy_(master)


def _direction(
  grad: Tensor, own: Tensor, moves: Tensor | None, momentum: float, grad_scale: Tensor
) -> Tensor:
  """Nesterov's point of the averaged gradient (the same direction as the sum's)."""
  old = own.to(grad.dtype)
  grad = torch.where(grad_scale.isnan(), old, grad * grad_scale)
  average = old.lerp(grad, 1 - momentum)
  if moves is not None:
    average = torch.where(moves, average, old)
  own.copy_(average)
  return grad.lerp(average, momentum)


def _nonzero(grad: Tensor) -> Tensor:
  """bool [E, 1, 1]: the matrices of [E, A, B] that are not zero throughout."""
  return torch.linalg.vector_norm(grad, torch.inf, dim=(-2, -1), keepdim=True) != 0
