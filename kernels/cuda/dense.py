"""Dense products: a linear layer and a SwiGLU block.

  linear  y = x · weightᵀ                 cuBLAS through torch; FLOPs 6 · T · I · O with backward
  mlp     y = w2 · swiglu(w13 · x)        SwiGLU in the first GEMM's epilogue, its gradient in that
          of dy · w2; kept are x and preact [T, 2F]; FLOPs 18 · T · D · F. Those two, the first of
          each pass, can leave SMs to rows that travel (gemms.leaving)

fp8 and nvfp4 are kernels.cuda.products with one expert.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cuda import gemms
from kernels.cuda.jit import check_device
from kernels.cuda.products import block_scaled_mlp, block_scaled_product
from kernels.gradient import gradient
from kernels.ops import Recipe, check, check_same_device


def _gradient(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
  """dyᵀ · x, `weight`'s gradient."""
  return gradient(weight, partial(gemms.dense_grad, dy, x))


class _Linear(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
    ctx.save_for_backward(x, weight)
    return F.linear(x, weight)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    need_dx, need_dw = ctx.needs_input_grad
    dw = _gradient(weight, dy, x) if need_dw else None
    return dy @ weight if need_dx else None, dw


def linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
  """See kernels.ops.Ops.linear."""
  check_device(check_same_device(x, weight))
  check(
    x.shape[-1] == weight.shape[1],
    f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} differ in their last dimension",
  )
  if recipe.format == "bf16":
    y = _Linear.apply(x.reshape(-1, weight.shape[1]), weight)
    return y.view(*x.shape[:-1], weight.shape[0])
  rows = x.flatten(0, -2)
  y = block_scaled_product(rows, weight, _all_rows(rows), recipe, 0)
  return y.unflatten(0, x.shape[:-1])


def _all_rows(rows: Tensor) -> Tensor:
  """The offsets of one expert that owns all rows, made on the device."""
  return torch.arange(2, device=rows.device, dtype=torch.int32) * rows.shape[0]


class _Mlp(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x: Tensor, w13: Tensor, w2: Tensor, keep: bool, recompute: bool) -> Tensor:
    preact, act = gemms.gated(x, w13, keep=keep)
    ctx.save_for_backward(x, None if recompute else preact, w13, w2)
    return act @ w2.T

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, preact, w13, w2 = ctx.saved_tensors
    dy = dy.contiguous()
    if preact is None:
      preact = gemms.gated(x, w13)[0]
    dpreact, act, _ = gemms.dgated(dy, w2, preact)
    dw13, dw2 = _gradient(w13, dpreact, x), _gradient(w2, dy, act)
    return dpreact @ w13, dw13, dw2, None, None


def mlp(x: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe) -> Tensor:
  """See kernels.ops.Ops.mlp. bf16; D and F are multiples of 8."""
  gemms.check_operands(x=x, w13=w13, w2=w2)
  dim, width = w2.shape
  check(
    w13.shape == (2 * width, dim) and x.shape[-1] == dim,
    f"mlp: x {tuple(x.shape)}, w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} must be [..., D], "
    "[2F, D] and [D, F]",
  )
  if x.numel() == 0:
    return x * 1
  rows = x.reshape(-1, dim)
  if recipe.format != "bf16":
    return block_scaled_mlp(rows, w13, w2, _all_rows(rows), recipe).view(x.shape)
  how = torch.is_grad_enabled(), recipe.recompute
  y = _Mlp.apply(rows, w13.contiguous(), w2.contiguous(), *how)
  return y.view(x.shape)
