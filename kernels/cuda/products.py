"""Products of expert-sorted rows with block-scaled operands (`Recipe` in kernels/ops.py).

  y  = x · wᵀ   x per block along I; w along I (fp8) or in squares (nvfp4)
  dx = dy · w   dy along O, stochastically rounded (nvfp4); w along O (fp8) or the same squares
  dw = dyᵀ · x  both along the rows of each expert, from the unquantized tensors; rotated (nvfp4)

A weight is quantized twice, as it is and transposed; with `Recipe.copies` at the first forward and
backward pass after it changed. Per element that moves 2 + 1 and 2 + 2 (the transposed copy in bf16)
+ 2 + 1 bytes in MXFP8, besides scales, for a step instead of for each of its micro-batches. What
AdamW writes with the weight (kernels.cuda.adamw: for the tensor cores) is not quantized here.

Quantization is kernels.cuda.quantization; the tensors' scales multiply the fp32 sums, which are
rounded once, or for dw not at all (kernels.ops: gradients of weights). With `emulate` the operands'
values, exact in bf16, are multiplied by the bf16 kernels of `gemms`. Without it (sm_100a only)
QuACK's block-scaled kernels read data and scales. Those read a sum over ragged rows in MXFP8 alone,
so NVFP4's dw multiplies the same values in bf16.

What is block-scaled on sm_100a is compiled, not run: no such GPU was at hand.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from quack.blockscaled import MXFP8_E4M3, NVFP4
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.arithmetic import swiglu
from kernels.cuda import blockscaled_gemm, gemms
from kernels.cuda.blockscale import ATOM_ROWS
from kernels.cuda.jit import ARCH
from kernels.cuda.quantization import Operand as Quantized
from kernels.cuda.quantization import quantize, quantize_operand
from kernels.cuda.tail import zero_tail
from kernels.formats import BlockScaled, derive
from kernels.gradient import gradient
from kernels.ops import Operand, Recipe, check
from kernels.ragged import gather, moved
from kernels.sizes import BLOCK

ALIGNMENT = 32  # of D and F: whole blocks along every summed dimension
FORMATS = {"fp8": MXFP8_E4M3, "nvfp4": NVFP4}


def block_scaled_product(
  x: Tensor, w: Tensor, offset_E1: Tensor, recipe: Recipe, salt: int
) -> Tensor:
  """x [N', I] · w[e]ᵀ for each expert's rows -> [N', O] in bf16, zero beyond offset[-1].

  w [E, O, I], or [O, I] of one expert. salt tells the products of one call apart in stochastic
  rounding. I and O are multiples of 32.
  """
  _check(x, recipe, w)
  return _Product.apply(x.contiguous(), w.contiguous(), offset_E1, recipe, salt)


def _check(x: Tensor, recipe: Recipe, *weights: Tensor) -> None:
  check(
    recipe.format in FORMATS,
    f'format {recipe.format!r} is unknown; use "bf16", "fp8" or "nvfp4"',
  )
  check(
    recipe.emulate or ARCH.block_scaled,
    f"format {recipe.format!r} needs the block-scaled tensor cores of sm_100a and this is "
    f"{ARCH.name}; set target.emulate_blockscale = true (Recipe.emulate)",
  )
  for w in weights:
    gemms.check_operands(x=x, w=w)
    check(
      w.shape[-2] % ALIGNMENT == 0 and w.shape[-1] % ALIGNMENT == 0,
      f"format {recipe.format!r}: a weight of {tuple(w.shape[-2:])}; make both multiples of "
      f"{ALIGNMENT}",
    )


class _Product(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x: Tensor, w: Tensor, offset: Tensor, recipe: Recipe, salt: int) -> Tensor:
    ctx.save_for_backward(x, w, offset)
    ctx.recipe, ctx.salt = recipe, salt
    if recipe.forward_only_bf16:
      return zero_tail(gemms.rows(x, _of_experts(w), offset), offset)
    x = _without_tail(x, offset)
    _show_forward(recipe, salt, x, w, offset)
    return _rows(x, _forward_weight(recipe, salt, w), offset, recipe)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, w, offset = ctx.saved_tensors
    recipe, salt = ctx.recipe, ctx.salt
    dy = _without_tail(dy.contiguous(), offset)
    _show_backward(recipe, salt, dy, w, offset)
    dx = _rows(dy, _backward_weight(recipe, salt, w), offset, recipe, _seed(recipe, salt))
    return dx, _weight_gradient(w, dy, x, offset, recipe, salt), None, None, None


def block_scaled_mlp(
  x: Tensor, w13: Tensor, w2: Tensor, offset_E1: Tensor, recipe: Recipe
) -> Tensor:
  """SwiGLU experts over sorted rows x [N', D] -> bf16 [N', D], by `block_scaled_product`s.

  w13 [E, 2F, D] and w2 [E, D, F], or without E. On sm_100a's block-scaled tensor cores SwiGLU and
  its gradient are in the epilogues: computed from the fp32 sums, not from the rounded
  pre-activation. Kept are x and the pre-activation.
  """
  _check(x, recipe, w13, w2)
  if recipe.emulate:
    preact = block_scaled_product(x, w13, offset_E1, recipe, 0)
    return block_scaled_product(swiglu(preact), w2, offset_E1, recipe, 1)
  return _BlockScaledMlp.apply(x.contiguous(), w13.contiguous(), w2.contiguous(), offset_E1, recipe)


class _BlockScaledMlp(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x: Tensor, w13: Tensor, w2: Tensor, offset: Tensor, recipe: Recipe) -> Tensor:
    ctx.recipe = recipe
    if recipe.forward_only_bf16:
      preact, act = gemms.gated(x, _of_experts(w13), offset=offset)
      ctx.save_for_backward(x, preact, w13, w2, offset)
      return zero_tail(gemms.rows(act, _of_experts(w2), offset), offset)
    rows = _without_tail(x, offset)
    _show_forward(recipe, 0, rows, w13, offset)
    operands = _operands(rows, _forward_weight(recipe, 0, w13), offset, recipe)
    preact, act = blockscaled_gemm.gated(FORMATS[recipe.format], *operands)
    ctx.save_for_backward(x, preact, w13, w2, offset)
    _show_forward(recipe, 1, zero_tail(act, offset), w2, offset)
    return _rows(act, _forward_weight(recipe, 1, w2), offset, recipe)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, preact, w13, w2, offset = ctx.saved_tensors
    recipe = ctx.recipe
    dy = _without_tail(dy.contiguous(), offset)
    _show_backward(recipe, 1, dy, w2, offset)
    w2_q = _backward_weight(recipe, 1, w2)
    dy_q, w2_q, *rest = _operands(dy, w2_q, offset, recipe, _seed(recipe, 1))
    fmt = FORMATS[recipe.format]
    dpreact, act = blockscaled_gemm.dgated(fmt, dy_q, w2_q, preact, *rest)
    dpreact = zero_tail(dpreact, offset)
    _show_backward(recipe, 0, dpreact, w13, offset)
    dx = _rows(dpreact, _backward_weight(recipe, 0, w13), offset, recipe, _seed(recipe, 0))
    dw13 = _weight_gradient(w13, dpreact, x, offset, recipe, 0)
    return dx, dw13, _weight_gradient(w2, dy, act, offset, recipe, 1), None, None


def _of_experts(w: Tensor) -> Tensor:
  """[E, O, I] of a weight [E, O, I] or [O, I]."""
  return w if w.ndim == 3 else w[None]


def _seed(recipe: Recipe, salt: int) -> int | None:
  """Of an input gradient's stochastic rounding."""
  return derive(recipe.seed, recipe.draw, salt, 0) if recipe.format == "nvfp4" else None


def _forward_weight(recipe: Recipe, salt: int, w: Tensor) -> BlockScaled | Quantized:
  """[E, O, I] of a weight, quantized along I; nvfp4: in squares."""
  return recipe.quantized("fprop_w", salt, w, lambda: _quantized(recipe, _of_experts(w)))


def _backward_weight(recipe: Recipe, salt: int, w: Tensor) -> BlockScaled | Quantized:
  """[E, I, O] of a weight, quantized along O; nvfp4: in the same squares."""
  return recipe.quantized("dgrad_w", salt, w, lambda: _quantized(recipe, _of_experts(w).mT))


def _quantized(recipe: Recipe, w: Tensor) -> BlockScaled | Quantized:
  function = quantize if recipe.emulate else quantize_operand
  return function(w, recipe.format, square=recipe.format == "nvfp4")


def _operands(
  x: Tensor, w_q: Quantized, offset: Tensor, recipe: Recipe, seed: int | None = None
) -> tuple[Quantized, Quantized, Tensor, Tensor | float]:
  """(x, w, offset, scale): operands for the tensor cores, and what multiplies their product."""
  x_q = quantize_operand(x, recipe.format, seed=seed, offset_E1=offset)
  return x_q, w_q, offset, alpha(x_q.tensor_scale, w_q.tensor_scale)


def _without_tail(x: Tensor, offset: Tensor) -> Tensor:
  """x with zeros in the rows that no expert owns, so that they do not reach a tensor's scale."""
  row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
  return torch.where((row < offset[-1])[:, None], x, 0)


def _rows(
  x: Tensor,
  w_q: BlockScaled | Quantized,
  offset: Tensor,
  recipe: Recipe,
  seed: int | None = None,
) -> Tensor:
  """x [N', K] · w[e]ᵀ over K, x quantized along it; w_q of [E, M, K]."""
  if recipe.emulate:
    x_q = quantize(x, recipe.format, seed=seed)
    scale = alpha(x_q.tensor_scale, w_q.tensor_scale)
    return zero_tail(gemms.rows(values(x_q), values(w_q), offset, scale), offset)
  operands = _operands(x, w_q, offset, recipe, seed)
  return zero_tail(gemms.rows_block_scaled(FORMATS[recipe.format], *operands), offset)


def _weight_gradient(
  w: Tensor, dy: Tensor, x: Tensor, offset: Tensor, recipe: Recipe, salt: int
) -> Tensor | None:
  """What backward returns for w: `gradient` of dyᵀ · x.

  Each expert's rows are padded to whole blocks with zeros, which add nothing. Rows that no expert
  owns are left behind, whatever they hold.
  """
  block_scaled = recipe.format == "fp8" and not recipe.emulate
  padded, size = pad_offsets(
    offset, x.shape[0], ATOM_ROWS if block_scaled else BLOCK[recipe.format]
  )
  to = gather(offset, padded, size)
  x, dy = moved(x, to), moved(dy, to)
  rotation = seed = None
  if recipe.format == "nvfp4":
    rotation, seed = recipe.seed, derive(recipe.seed, recipe.draw, salt, 1)
  _show(recipe, "wgrad_x", salt, x, padded, axis=-2, hadamard=rotation)
  _show(recipe, "wgrad_dy", salt, dy, padded, axis=-2, hadamard=rotation, seed=seed)
  if block_scaled:
    x_q, dy_q = (quantize_operand(t, "fp8", axis=-2) for t in (x, dy))
    product = partial(gemms.weight_grad_block_scaled, MXFP8_E4M3, dy_q, x_q, padded)
  else:
    x_q = quantize(x, recipe.format, axis=-2, hadamard=rotation)
    dy_q = quantize(dy, recipe.format, axis=-2, hadamard=rotation, seed=seed)
    scale = alpha(x_q.tensor_scale, dy_q.tensor_scale)
    product = partial(gemms.weight_grad, values(dy_q), values(x_q), padded, alpha=scale)
  return gradient(w, lambda out, add: product(_of_experts(out), add=add))


def _show_forward(recipe: Recipe, salt: int, x: Tensor, w: Tensor, offset: Tensor) -> None:
  _show(recipe, "fprop_x", salt, x, offset)
  _show(recipe, "fprop_w", salt, _of_experts(w), None, square=recipe.format == "nvfp4")


def _show_backward(recipe: Recipe, salt: int, dy: Tensor, w: Tensor, offset: Tensor) -> None:
  _show(recipe, "dgrad_dy", salt, dy, offset, seed=_seed(recipe, salt))
  _show(recipe, "dgrad_w", salt, _of_experts(w).mT, None, square=recipe.format == "nvfp4")


def _show(
  recipe: Recipe, leg: str, salt: int, x: Tensor, offset_E1: Tensor | None, **how: Any
) -> None:
  """Let the recipe's observer, if any, see an operand, quantized row-major as `how` says."""
  if recipe.observe is not None:
    q = quantize(x, recipe.format, **how)
    recipe.observe(Operand(leg, salt, x, q, offset_E1, how.get("hadamard")))


def pad_offsets(offset_E1: Tensor, num_rows: int, multiple: int) -> tuple[Tensor, int]:
  """Experts padded to a multiple: (offsets int32 [E + 1], total rows).

  The total is a bound that depends on shapes alone.
  """
  num_experts = offset_E1.shape[0] - 1
  padded = torch.zeros_like(offset_E1)
  blocks = (offset_E1.diff() + multiple - 1) // multiple
  torch.cumsum(blocks * multiple, 0, dtype=torch.int32, out=padded[1:])
  total = num_rows + num_experts * (multiple - 1)
  return padded, total + -total % multiple


def alpha(*tensor_scales: Tensor | None) -> Tensor | float:
  """The product of two tensors' scales, fp32 [1]; 1.0 for formats without one."""
  a, b = tensor_scales
  return 1.0 if a is None or b is None else (a * b).reshape(1)


def values(q: BlockScaled) -> Tensor:
  """q.values(torch.bfloat16), exact, by table and cast; block sizes must divide the shape."""
  data = q.data.to(torch.bfloat16) if q.format == "fp8" else _nibbles(q.data, q.axis)
  rows, columns = q.block
  blocks = data.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
  return (blocks * q.scale.to(torch.bfloat16)[..., :, None, :, None]).view(data.shape)


def _nibbles(data: Tensor, axis: int) -> Tensor:
  """uint8 pairs of E2M1 along axis -> bf16."""
  half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=data.device)
  table = torch.cat([half, -half]).bfloat16()
  low, high = table[(data & 0xF).int()], table[(data >> 4).int()]
  return torch.stack([low, high], axis).flatten(axis - 1, axis)
