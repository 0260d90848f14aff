"""Products of expert-sorted rows with block-scaled operands, emulated (`Recipe` in kernels/ops.py).

  y  = x · wᵀ   sums over I: x per block along I; w along I (fp8) or in squares (nvfp4)
  dx = dy · w   sums over O: dy along O; w along O (fp8) or the same squares (nvfp4)
  dw = dyᵀ · x  sums over an expert's rows: both along rows, from the unquantized tensors

Operands are the values data · scale, exact; fp32 sums are multiplied by the tensors' scales and
rounded once. E experts, N' rows, I and O the weight's [E, O, I].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.arithmetic import wide
from kernels.formats import BlockScaled, derive
from kernels.ops import Operand, Product, Recipe, check
from kernels.reference.blockscale import quantize
from kernels.sizes import BLOCK


def block_scaled_product(
  x: Tensor, w: Tensor, offsets: list[int], recipe: Recipe, salt: int
) -> Tensor:
  """x [N', I] · w[e]ᵀ for each expert's rows -> [N', O], zero beyond offsets[-1].

  salt tells the products of one call apart in stochastic rounding.
  """
  check(
    recipe.format in BLOCK,
    f'format {recipe.format!r} is unknown; use "bf16", "fp8" or "nvfp4"',
  )
  check(
    recipe.emulate,
    f"format {recipe.format!r} needs the block-scaled tensor cores of sm_100a; the reference can "
    "only emulate them: set target.emulate_blockscale = true (Recipe.emulate)",
  )
  return _Product.apply(x, w, offsets, recipe, salt)


def spans(offsets: list[int]) -> Iterator[tuple[int, slice]]:
  """(expert, slice of its rows) of the experts that have rows."""
  for expert, (start, end) in enumerate(pairwise(offsets)):
    if end > start:
      yield expert, slice(start, end)


class _Product(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x: Tensor, w: Tensor, offsets: list[int], recipe: Recipe, salt: int) -> Tensor:
    ctx.save_for_backward(x, w)
    ctx.offsets, ctx.recipe, ctx.salt = offsets, recipe, salt
    if recipe.forward_only_bf16:
      return rows_by_weight(x, w.mT, offsets, x.dtype)
    dtype, square = wide(x, w), recipe.format == "nvfp4"
    x_q = _quantized("fprop_x", x[: offsets[-1]], offsets, recipe, salt)
    w_q = _quantized("fprop_w", w, None, recipe, salt, square=square)
    (x_values, x_scale), (w_values, w_scale) = _operand(x_q, dtype), _operand(w_q, dtype)
    y = rows_by_weight(x_values, w_values.mT, offsets, dtype)
    return _padded(y.mul_(x_scale).mul_(w_scale), x.shape[0]).to(x.dtype)

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    x, w = ctx.saved_tensors
    offsets, recipe = ctx.offsets, ctx.recipe
    num_rows = x.shape[0]
    x, dy = x[: offsets[-1]], dy[: offsets[-1]].contiguous()
    dx = _input_gradient(dy, w, offsets, recipe, ctx.salt)
    dw = _weight_gradient(dy, x, offsets, recipe, ctx.salt)
    return _padded(dx, num_rows).to(x.dtype), dw.to(w.dtype), None, None, None


def _input_gradient(dy: Tensor, w: Tensor, offsets: list[int], recipe: Recipe, salt: int) -> Tensor:
  dtype = wide(dy, w)
  if recipe.format == "fp8":
    dy_q = _quantized("dgrad_dy", dy, offsets, recipe, salt)
    w_q = _quantized("dgrad_w", w, None, recipe, salt, axis=-2)
  else:
    seed = derive(recipe.seed, recipe.draw, salt, 0)
    dy_q = _quantized("dgrad_dy", dy, offsets, recipe, salt, seed=seed)
    w_q = _quantized("dgrad_w", w, None, recipe, salt, square=True)
  dy_values, dy_scale = _operand(dy_q, dtype)
  w_values, w_scale = _operand(w_q, dtype)
  return rows_by_weight(dy_values, w_values, offsets, dtype).mul_(dy_scale).mul_(w_scale)


def _weight_gradient(
  dy: Tensor, x: Tensor, offsets: list[int], recipe: Recipe, salt: int
) -> Tensor:
  """[E, O, I]. Each expert's rows are padded to whole blocks with zeros, which add nothing."""
  dtype = wide(dy, x)
  padded = pad_offsets(offsets, BLOCK[recipe.format])
  x, dy = pad_rows(x, offsets, padded), pad_rows(dy, offsets, padded)
  rotation = seed = None
  if recipe.format == "nvfp4":
    rotation, seed = recipe.seed, derive(recipe.seed, recipe.draw, salt, 1)
  how = {"axis": -2, "hadamard": rotation}
  x_q = _quantized("wgrad_x", x, padded, recipe, salt, **how)
  dy_q = _quantized("wgrad_dy", dy, padded, recipe, salt, seed=seed, **how)
  x_values, x_scale = _operand(x_q, dtype)
  dy_values, dy_scale = _operand(dy_q, dtype)
  dw = x_values.new_zeros(len(offsets) - 1, dy.shape[1], x.shape[1])
  for e, rows in spans(padded):
    torch.mm(dy_values[rows].T, x_values[rows], out=dw[e])
  return dw.mul_(x_scale).mul_(dy_scale)


def _quantized(
  leg: str, x: Tensor, offsets: list[int] | None, recipe: Recipe, salt: int, **how: Any
) -> BlockScaled:
  """x, without offsets a weight, quantized as `how` says, and shown to the recipe's observer."""
  make = partial(quantize, x, recipe.format, **how)
  q = recipe.quantized(leg, salt, x, make) if offsets is None else make()
  if recipe.observe is not None:
    recipe.observe(Operand(leg, salt, x, q, offsets, how.get("hadamard")))
  return q


def pad_offsets(offsets: list[int], multiple: int) -> list[int]:
  """The offsets when every expert's rows are padded to a multiple."""
  padded = [0]
  for start, end in pairwise(offsets):
    padded.append(padded[-1] + -(-(end - start) // multiple) * multiple)
  return padded


def pad_rows(x: Tensor, offsets: list[int], padded: list[int]) -> Tensor:
  """Each expert's rows at its padded place, zeros after them."""
  out = x.new_zeros(padded[-1], x.shape[1])
  for e, rows in spans(offsets):
    out[padded[e] : padded[e] + rows.stop - rows.start] = x[rows]
  return out


def _operand(q: BlockScaled, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
  return q.values(dtype), 1.0 if q.tensor_scale is None else q.tensor_scale


def rows_by_weight(x: Tensor, w: Tensor, offsets: list[int], dtype: torch.dtype) -> Tensor:
  """x [N', I] · w[e] [I, O] for the rows of each expert e -> [N', O], zero beyond offsets[-1]."""
  out = x.new_zeros(x.shape[0], w.shape[2], dtype=dtype)
  for e, rows in spans(offsets):
    torch.mm(x[rows], w[e], out=out[rows])
  return out


def multiply(product: Product) -> Tensor:
  """The product's rows; zero where no expert owns them."""
  a, w, offset = product
  return rows_by_weight(a, w.mT, offset.tolist(), a.dtype)


def _padded(x: Tensor, num_rows: int) -> Tensor:
  """x with zero rows appended to make num_rows."""
  return F.pad(x, (0, 0, 0, num_rows - x.shape[0]))
