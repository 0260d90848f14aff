"""Values that the contract defines and both implementations compute from the same lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of x ← a x + (b G + c G²) x with G = x xᵀ


def wide(*tensors: Tensor) -> torch.dtype:
  """The dtype of sums over these tensors: fp32, or float64 when one of them is float64."""
  dtype = torch.float32
  for tensor in tensors:
    dtype = torch.promote_types(dtype, tensor.dtype)
  return dtype


def swiglu(h: Tensor) -> Tensor:
  """silu(gate) · up (arXiv 2002.05202 Eq 6) of h [..., 2F], gate and up interleaved -> [..., F].

  Differentiable; fp32 inside, rounded once to h's dtype.
  """
  gate, up = h.to(wide(h)).unflatten(-1, (-1, 2)).unbind(-1)
  return (F.silu(gate) * up).to(h.dtype)
