"""What a payload leaves of rows (nmoe.distributed.rdep), where no row travels: on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.formats import quantize_rows


def as_received(
  x_TD: Tensor, format: str, quantize: Callable[..., Any], *, of_gradient: bool
) -> Tensor:
  """x, or its gradient, with the values that rows of this format (kernels.sizes) would have."""
  if format == "bf16":
    return x_TD
  return _Received.apply(x_TD, quantize, format, of_gradient)


class _Received(torch.autograd.Function):
  """x through a row's format and its gradient as it is, or the other way round."""

  @staticmethod
  def forward(ctx: Any, x_TD: Tensor, quantize: Callable, format: str, of_gradient: bool) -> Tensor:
    ctx.quantize, ctx.format = quantize, format if of_gradient else None
    if of_gradient:
      return x_TD.view_as(x_TD)
    return quantize_rows(x_TD, format, quantize).dequantize(x_TD.dtype)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dx_TD: Tensor) -> tuple:
    if ctx.format is not None:
      dx_TD = quantize_rows(dx_TD, ctx.format, ctx.quantize).dequantize(dx_TD.dtype)
    return dx_TD, None, None, None
