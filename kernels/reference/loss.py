"""Cross entropy of a linear head without the [T, V] logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.arithmetic import wide
from kernels.gradient import scaled_gradient
from kernels.ops import check


def linear_cross_entropy(
  x: Tensor, weight: Tensor, target: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
  """See Ops.linear_cross_entropy. Forward computes the gradients of the sum too, chunk by chunk."""
  check(
    x.ndim == 2 and target.shape == x.shape[:1] and weight.shape[1:] == x.shape[1:],
    f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)} and target "
    f"{tuple(target.shape)} must be [T, D], [V, D] and [T]",
  )
  check(chunk > 0, f"linear_cross_entropy: chunk {chunk} must be positive")
  return _LinearCrossEntropy.apply(x, weight, target, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
  """Keeps dx [T, D] and dweight [V, D] of the sum; backward scales them."""

  @staticmethod
  def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, chunk: int, with_grad: bool):
    dtype = wide(x, weight)
    weight_wide = weight.to(dtype)
    need_x, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
    losses = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    dx = torch.empty_like(x) if need_x else None
    dweight = torch.zeros_like(weight_wide) if need_weight else None
    for start in range(0, x.shape[0], chunk):
      rows = slice(start, start + chunk)
      x_rows = x[rows].to(dtype)
      losses[rows], dlogits = _chunk(x_rows @ weight_wide.T, target[rows])
      if need_x:
        dx[rows] = (dlogits @ weight_wide).to(x.dtype)
      if need_weight:
        dweight.addmm_(dlogits.T, x_rows)
    ctx.save_for_backward(dx, dweight, weight)
    ctx.mark_non_differentiable(losses)
    return losses.sum(), losses

  @staticmethod
  @once_differentiable
  def backward(ctx, dtotal: Tensor, _):
    dx, dweight, weight = ctx.saved_tensors
    dx = None if dx is None else (dx * dtotal).to(dx.dtype)
    dweight = None if dweight is None else scaled_gradient(weight, dweight, dtotal)
    return dx, dweight, None, None, None


def _chunk(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
  """The losses of a chunk and softmax(logits) - onehot(target), which overwrites the logits."""
  kept = (target >= 0)[:, None]
  column = target.clamp(min=0)[:, None]
  chosen = logits.gather(1, column)
  peak = logits.amax(1, keepdim=True)
  logits.sub_(peak).exp_()
  total = logits.sum(1, keepdim=True)
  losses = torch.where(kept, total.log() + peak - chosen, 0).squeeze(1)
  dlogits = logits.div_(total)
  dlogits.scatter_add_(1, column, -torch.ones_like(chosen))
  return losses, dlogits.masked_fill_(~kept, 0)
