"""Where the gradient of a weight goes (kernels.ops: the gradients of weights)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.ops import check


def in_fp32(weight: Tensor) -> bool:
  """Whether kernels make the weight's gradient in fp32: it is a bf16 leaf of fp32 `grad_dtype`."""
  return (
    weight.dtype == torch.bfloat16
    and weight.is_leaf
    and weight.requires_grad
    and weight.grad_dtype == torch.float32
  )


def gradient(weight: Tensor, product: Callable[[Tensor, bool], object]) -> Tensor | None:
  """What a Function's backward returns for `weight`, as saved: `product(out, add)` computes it.

  out is new, of the weight's shape and dtype. For a bf16 leaf whose `grad_dtype` is fp32 it is new
  in fp32; or, if the leaf has one, its `.grad` with add True, to which the product is added, and
  the result is None.
  """
  fp32 = in_fp32(weight)
  if not fp32 or weight.grad is None:
    out = torch.empty_like(weight, dtype=torch.float32 if fp32 else weight.dtype)
    product(out, False)
    return out
  check(
    weight.grad.stride() == weight.stride(),
    f"a weight {tuple(weight.shape)} with strides {weight.stride()} has a .grad with strides "
    f"{weight.grad.stride()}; kernels add to a .grad laid out as the weight: set it to None",
  )
  product(weight.grad, True)
  return None


def scaled_gradient(weight: Tensor, dw: Tensor, factor: Tensor) -> Tensor | None:
  """`gradient` of a weight whose gradient dw, in fp32 or wider, is there but for a factor, 0-d."""

  def product(out: Tensor, add: bool) -> None:
    if add:
      out.addcmul_(dw, factor)
    else:
      torch.mul(dw, factor, out=out)

  return gradient(weight, product)
