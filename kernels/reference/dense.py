"""Dense matrix products in a recipe's arithmetic."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Recipe, check
from kernels.reference.swiglu import swiglu


def linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
  """See Ops.linear."""
  check(
    x.shape[-1] == weight.shape[1],
    f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} differ in their last dimension",
  )
  check(recipe.format == "bf16", f"linear: format {recipe.format!r} is not available")
  return F.linear(x, weight)


def mlp(x: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe) -> Tensor:
  """See Ops.mlp."""
  return linear(swiglu(linear(x, w13, recipe)), w2, recipe)
