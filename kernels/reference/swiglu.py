"""kernels.arithmetic.swiglu on halves, [gate; up], and its gradient.

The contract interleaves gate and up rows. A CPU computes faster on halves, so the fused experts
reorder the small weights once per call instead of the large activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arithmetic import wide


def to_halves(w13: Tensor) -> Tensor:
  """[E, 2F, D] with interleaved rows -> rows [gate; up]."""
  return w13.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def to_interleaved(w13: Tensor) -> Tensor:
  """The inverse of `to_halves`."""
  return w13.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def forward(h: Tensor) -> Tensor:
  """h [N, 2F] in halves -> [N, F]."""
  gate, up = h.to(wide(h)).chunk(2, -1)
  return F.silu(gate).mul_(up).to(h.dtype)


def backward(h: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
  """(the gradient of h in halves, swiglu(h) again), from da, the gradient of swiglu(h)."""
  gate, up = h.to(wide(h)).chunk(2, -1)
  da = da.to(gate.dtype)
  sigmoid = gate.sigmoid()
  silu = gate * sigmoid
  a = silu * up
  dup = silu * da
  dgate = sigmoid.add_(silu.mul_(1 - sigmoid)).mul_(up).mul_(da)
  return torch.cat([dgate, dup], -1).to(h.dtype), a.to(h.dtype)
