"""RMSNorm, and the residual sum with the norm of it, in one pass each (QuACK's kernels).

  y = x · rsqrt(mean(x²) + eps) · weight        fp32, rounded once to x's dtype

Elements moved: forward 2 · T · D (with the residual 4), backward 3 · T · D (with it 4). The
weight's gradient is summed per streaming multiprocessor and then across them in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from quack.rmsnorm import get_sm_count, rmsnorm_fwd
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cuda.jit import check_device, vector_width
from kernels.gradient import gradient
from kernels.ops import check, check_same_device


class _RmsNorm(torch.autograd.Function):
  """Of rows [T, D]: the norm of x, or with a residual of x + residual, and that sum."""

  @staticmethod
  def forward(
    ctx: Any, x_TD: Tensor, residual_TD: Tensor | None, weight: Tensor, eps: float
  ) -> tuple[Tensor, Tensor | None]:
    y_TD, total_TD, rstd_T = rmsnorm_fwd(
      x_TD, weight, residual=residual_TD, eps=eps, store_rstd=any(ctx.needs_input_grad)
    )
    ctx.save_for_backward(total_TD, weight, rstd_T)
    ctx.set_materialize_grads(False)
    return y_TD, None if residual_TD is None else total_TD

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy_TD: Tensor | None, dtotal_TD: Tensor | None) -> tuple:
    total_TD, weight, rstd_T = ctx.saved_tensors
    dy_TD = torch.zeros_like(total_TD) if dy_TD is None else _rows(dy_TD)
    if dtotal_TD is not None:
      dtotal_TD = _rows(dtotal_TD)
    if not total_TD.numel():
      return dy_TD, dy_TD if ctx.needs_input_grad[1] else None, torch.zeros_like(weight), None
    parts = get_sm_count(len(weight), total_TD.device)
    dx_TD, dw_PD = torch.ops.quack.rmsnorm_bwd_f(total_TD, weight, dy_TD, rstd_T, dtotal_TD, parts)

    def product(out: Tensor, add: bool) -> None:
      ones_P = _ones(parts, out.device)
      if out.dtype != torch.float32:
        out.copy_(dw_PD.sum(0))
      elif add:
        out.addmv_(dw_PD.T, ones_P)
      else:
        torch.mv(dw_PD.T, ones_P, out=out)

    dw = gradient(weight, product) if ctx.needs_input_grad[2] else None
    return dx_TD, dx_TD if ctx.needs_input_grad[1] else None, dw, None


@lru_cache
def _ones(size: int, device: torch.device) -> Tensor:
  return torch.ones(size, dtype=torch.float32, device=device)


def _rows(x: Tensor) -> Tensor:
  """x as [T, D], whose rows may lie apart."""
  x_TD = x.reshape(-1, x.shape[-1])
  return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def _check(x: Tensor, weight: Tensor, *others: Tensor) -> None:
  check_device(check_same_device(x, weight, *others))
  check(
    weight.ndim == 1 and x.shape[-1] == weight.shape[0],
    f"rms_norm: x has {x.shape[-1]} features and weight shape {tuple(weight.shape)}; need one "
    "weight each",
  )
  vector_width(x.dtype, x.shape[-1], "rms_norm's x")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
  """See kernels.ops.Ops.rms_norm."""
  _check(x, weight)
  return _RmsNorm.apply(_rows(x), None, weight, eps)[0].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
  """See kernels.ops.Ops.add_rms_norm. The norm is taken of the sum before its rounding."""
  _check(x, weight, residual)
  check(
    x.shape == residual.shape and x.dtype == residual.dtype,
    f"add_rms_norm: x is {x.dtype} {tuple(x.shape)}, residual {residual.dtype} "
    f"{tuple(residual.shape)}; give both one dtype and shape",
  )
  y_TD, total_TD = _RmsNorm.apply(_rows(x), _rows(residual), weight, eps)
  return y_TD.view(x.shape), total_TD.view(x.shape)
