"""Newton-Schulz on symmetric products (arXiv 2502.16982 Eq 3-4).

G = X Xᵀ and P = b G + c G² are symmetric, so each is computed as half its tiles; X = a X + P X.
Batched over the leading dimensions, in bf16 with fp32 accumulation. FLOPs of a step and an [A, B]
matrix, A ≤ B: 4 · A² · B + 2 · A³ as of whole products, 3 · A² · B + A³ computed.

It runs at 0.88 of a dense product's rate, whole products counted, on one H200 (kernels/RESULTS.md).
"""

from __future__ import annotations

import torch
from quack.gemm import gemm
from quack.gemm_symmetric import gemm_symmetric
from torch import Tensor

from kernels.arithmetic import NEWTON_SCHULZ
from kernels.cuda.jit import ARCH, check_device
from kernels.ops import check

TILE = {"sm_90a": (128, 256), "sm_100a": (256, 256)}
CLUSTER = (2, 1)  # makes the tile of sm_90a square, as a symmetric product wants


def check_sides(rows: int, columns: int) -> None:
  """KernelError for matrices that the products cannot take."""
  check(
    rows % 8 == 0 and columns % 8 == 0,
    f"newton_schulz: matrices of {rows} by {columns}; make both multiples of 8",
  )


def _symmetric(x: Tensor, out: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
  """out = alpha · x xᵀ + beta · c for [L, M, K] and [L, M, M]."""
  gemm_symmetric(x, x, out, c, None, *TILE[ARCH.name], *CLUSTER, alpha=alpha, beta=beta)


@torch.no_grad()
def newton_schulz(g: Tensor, norm: Tensor, steps: int) -> Tensor:
  """bf16, contiguous: each matrix of g / norm made nearly orthogonal, as kernels.ops.Ops.muon says.

  g [..., A, B], sides multiples of 8; norm fp32 [..., 1, 1], at least the largest singular value.
  """
  check_device(g.device)
  rows, columns = g.shape[-2:]
  check_sides(rows, columns)
  if g.numel() == 0:
    return g.bfloat16()
  x = torch.div(g, norm, out=g.new_empty(g.shape, dtype=torch.bfloat16))
  x = x.view(-1, rows, columns)
  x = (x.mT if rows > columns else x).contiguous()
  gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
  poly, other = torch.empty_like(gram), torch.empty_like(x)
  a, b, c = NEWTON_SCHULZ
  for _ in range(steps):
    _symmetric(x, gram, None, 1.0, 1.0)
    _symmetric(gram, poly, gram, c, b)
    gemm(poly, x.mT, other, x, None, *TILE[ARCH.name], *CLUSTER, beta=a)
    x, other = other, x
  return (x.mT if rows > columns else x).reshape(g.shape).contiguous()
