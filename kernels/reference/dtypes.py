"""The arithmetic that the reference computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> torch.dtype:
  """The dtype of sums over these tensors: fp32, or float64 when one of them is float64."""
  dtype = torch.float32
  for tensor in tensors:
    dtype = torch.promote_types(dtype, tensor.dtype)
  return dtype
