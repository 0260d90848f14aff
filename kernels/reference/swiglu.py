"""swiglu(h)[i] = silu(h[2i]) · h[2i + 1] over interleaved gate and up rows (2002.05202 Eq 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference.dtypes import wide


def swiglu(h: Tensor) -> Tensor:
  """h [..., 2F] interleaved -> [..., F]; computed in fp32, rounded once to h's dtype."""
  return _Swiglu.apply(h)


def forward(h: Tensor) -> Tensor:
  """`swiglu` without autograd."""
  gate, up = h.to(wide(h)).unflatten(-1, (-1, 2)).unbind(-1)
  return F.silu(gate).mul_(up).to(h.dtype)


def backward(h: Tensor, da: Tensor) -> Tensor:
  """The gradient of h [..., 2F] from that of swiglu(h) [..., F]."""
  gate, up = h.to(wide(h)).unflatten(-1, (-1, 2)).unbind(-1)
  da = da.to(gate.dtype)
  sigmoid = gate.sigmoid()
  silu = gate * sigmoid
  dgate = torch.addcmul(sigmoid, silu, 1 - sigmoid).mul_(up).mul_(da)
  return torch.stack([dgate, silu.mul_(da)], -1).flatten(-2).to(h.dtype)


class _Swiglu(torch.autograd.Function):
  @staticmethod
  def forward(ctx, h: Tensor) -> Tensor:
    ctx.save_for_backward(h)
    return forward(h)

  @staticmethod
  @once_differentiable
  def backward(ctx, da: Tensor) -> Tensor:
    return backward(ctx.saved_tensors[0], da)
