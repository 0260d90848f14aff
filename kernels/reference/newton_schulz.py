"""Muon's orthogonalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.arithmetic import NEWTON_SCHULZ, wide


@torch.no_grad()
def newton_schulz(g: Tensor, steps: int) -> Tensor:
  """As Ops.muon says (arXiv 2502.16982 Eq 3-4). bf16 on CUDA, fp32 or float64 on a CPU."""
  a, b, c = NEWTON_SCHULZ
  tall = g.shape[-2] > g.shape[-1]
  x = g.mT if tall else g
  x = x.to(wide(g))
  x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
  if g.is_cuda:
    x = x.bfloat16()
  for _ in range(steps):
    gram = x @ x.mT
    x = a * x + (b * gram + c * (gram @ gram)) @ x
  return (x.mT if tall else x).to(g.dtype).contiguous()
