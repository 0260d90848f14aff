"""Root mean square norm (arXiv 1910.07467 Eq 4): y = x / sqrt(mean(x²) + eps) · weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.arithmetic import wide
from kernels.ops import check


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
  """See Ops.rms_norm. float64 inputs are computed in float64."""
  check(
    weight.shape == x.shape[-1:],
    f"rms_norm: weight {tuple(weight.shape)} must be [{x.shape[-1]}], the last dimension of x",
  )
  return _RmsNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
  """See Ops.add_rms_norm."""
  total = (x + residual).to(x.dtype)
  return rms_norm(total, weight, eps), total


class _RmsNorm(torch.autograd.Function):
  """Saves x and 1/rms per row; the normalised rows are computed again in backward."""

  @staticmethod
  def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = wide(x, weight)
    x_wide = x.to(dtype)
    rstd = x_wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    ctx.save_for_backward(x, weight, rstd)
    return (x_wide * rstd).mul_(weight.to(dtype)).to(x.dtype)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, weight, rstd = ctx.saved_tensors
    normed = x.to(rstd.dtype) * rstd
    dy = dy.to(rstd.dtype)
    dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
    dnormed = dy * weight.to(rstd.dtype)
    mean = (dnormed * normed).mean(-1, keepdim=True)
    dx = dnormed.addcmul_(normed, mean, value=-1).mul_(rstd)
    return dx.to(x.dtype), dweight, None
