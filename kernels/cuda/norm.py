"""RMSNorm, and the residual sum with the norm of it, in one pass each (QuACK's kernels).

  y = x · rsqrt(mean(x²) + eps) · weight        fp32, rounded once to x's dtype

Elements moved: forward 2 · T · D (with the residual 4), backward 3 · T · D (with it 4). The
weight's gradient is summed per streaming multiprocessor and then across them in a fixed order.
"""

from __future__ import annotations

from quack.rmsnorm import rmsnorm
from torch import Tensor

from kernels.cuda.jit import check_device, vector_width
from kernels.ops import check, check_same_device


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
  return rmsnorm(x, weight, eps=eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
  """See kernels.ops.Ops.add_rms_norm. The norm is taken of the sum before its rounding."""
  _check(x, weight, residual)
  check(
    x.shape == residual.shape and x.dtype == residual.dtype,
    f"add_rms_norm: x is {x.dtype} {tuple(x.shape)}, residual {residual.dtype} "
    f"{tuple(residual.shape)}; give both one dtype and shape",
  )
  return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)
