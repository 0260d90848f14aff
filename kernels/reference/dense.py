"""Dense matrix products in a recipe's arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Recipe, check
from kernels.reference.experts import grouped_mlp
from kernels.reference.products import block_scaled_product


def linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
  """See Ops.linear."""
  check(
    x.shape[-1] == weight.shape[1],
    f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} differ in their last dimension",
  )
  if recipe.format == "bf16":
    return F.linear(x, weight)
  rows = x.flatten(0, -2)
  y = block_scaled_product(rows, weight[None], [0, rows.shape[0]], recipe, 0)
  return y.unflatten(0, x.shape[:-1])


def mlp(x: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe) -> Tensor:
  """See Ops.mlp."""
  check(
    w13.shape == (2 * w2.shape[1], w2.shape[0]),
    f"mlp: w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} must be [2F, D] and [D, F]",
  )
  rows = x.flatten(0, -2)
  offsets = torch.tensor([0, rows.shape[0]], dtype=torch.int32)
  return grouped_mlp(rows, offsets, w13[None], w2[None], recipe).view(x.shape)
