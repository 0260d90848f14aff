"""When kernels.cuda quantizes a weight, seen on meta tensors: at its first use after a change, or
with the step of AdamW that changes it.

Started by test_without_gpu.py in the environment of an architecture. Nothing is launched.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from table import MOONLET  # whose kernels are in the cache
from torch import Tensor

from kernels.copies import Copies
from kernels.cuda import products
from kernels.cuda.adamw import adamw
from kernels.cuda.dense import linear
from kernels.cuda.experts import grouped_mlp, grouped_mlp_backward, grouped_mlp_forward
from kernels.cuda.jit import ARCH
from kernels.cuda.jobs import backward, meta
from kernels.ops import Recipe
from kernels.tools.compiler import compile_only

E, D, F = MOONLET.num_experts, MOONLET.dim, MOONLET.expert_dim
N = MOONLET.batch * MOONLET.seq_len * MOONLET.top_k
SHAPES = {(E, 2 * F, D), (E, D, 2 * F), (E, D, F), (E, F, D)}  # of w13 and w2, and transposed
quantized: list[tuple[int, ...]] = []


def watch(name: str) -> None:
  function = getattr(products, name)

  def counted(x: Tensor, *args, **kwargs):
    quantized.extend([tuple(x.shape)] * (x.ndim == 3))
    return function(x, *args, **kwargs)

  setattr(products, name, counted)


def step(w: Tensor, copies: Copies | None) -> None:
  """AdamW of one weight."""
  state = [[torch.empty_like(w, dtype=torch.float32)] for _ in range(4)]
  rule = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "copies": [copies]}
  adamw([w.detach()], *state, step=1, grad_scale=meta(dtype=torch.float32, grad=False), **rule)


def together(recipe: Recipe, w13: Tensor, w2: Tensor) -> None:
  backward(grouped_mlp(meta(N, D), meta(E + 1, dtype=torch.int32), w13, w2, recipe))


@torch.no_grad()
def halves(recipe: Recipe, w13: Tensor, w2: Tensor) -> None:
  gate = meta(N, dtype=torch.float32, grad=False)
  offset = meta(E + 1, dtype=torch.int32)
  _, kept = grouped_mlp_forward(meta(N, D), offset, w13, w2, recipe, True)
  grouped_mlp_backward(kept, meta(N, D), gate, w13, w2)[2]()


def seen() -> set[tuple[int, ...]]:
  found = list(quantized)
  quantized.clear()
  assert len(set(found)) == len(found), found
  return set(found)


def check(recipe: Recipe) -> None:
  """Only operands of tensor cores are written with the weight."""
  written = not recipe.emulate
  w13, w2 = meta(E, 2 * F, D), meta(E, D, F)
  for run in (together, halves):
    kept = replace(recipe, copies=Copies())
    run(kept, w13, w2)
    assert seen() == SHAPES
    run(kept, w13, w2)
    assert seen() == set()
    step(w2, None)
    run(kept, w13, w2)
    assert seen() == {(E, D, F), (E, F, D)}
    step(w2, kept.copies)
    run(kept, w13, w2)
    assert seen() == (set() if written else {(E, D, F), (E, F, D)})
    step(w2, None)
    step(w2, kept.copies)  # which are not of the weight by then
    run(kept, w13, w2)
    assert seen() == {(E, D, F), (E, F, D)}


def check_linear(recipe: Recipe) -> None:
  """A weight of two dimensions, and rows of it that a rank owns."""
  written = not recipe.emulate
  w, kept = meta(2 * F, D), replace(recipe, copies=Copies())
  shapes = {(1, 2 * F, D), (1, D, 2 * F)}

  def run() -> set[tuple[int, ...]]:
    backward(linear(meta(N, D), w, kept))
    return seen()

  assert run() == shapes
  step(w, kept.copies)
  assert run() == (set() if written else shapes)
  step(w.detach()[:F], kept.copies)
  assert run() == shapes


if __name__ == "__main__":
  for name in ("quantize", "quantize_operand"):
    watch(name)
  with compile_only():
    for name in ("fp8", "nvfp4"):
      for function in (check, check_linear):
        function(Recipe(name, emulate=not ARCH.block_scaled))
