"""Causal attention through torch's scaled_dot_product_attention, on cuDNN's kernel and no other.

Backward asks cuDNN for its deterministic algorithm; the default one adds into dq in any order.
FLOPs, causal: B · H · S² · (QK + V) forward, 2.5 times that backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.cuda.jit import check_device
from kernels.ops import KernelError, check, check_same_device


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
  """torch.use_deterministic_algorithms(on) inside, without its filling of new memory.

  Off, torch offers cuDNN's forward, which it withholds when on although it repeats bit for bit.
  """
  settings = torch.utils.deterministic
  before = (
    torch.are_deterministic_algorithms_enabled(),
    torch.is_deterministic_algorithms_warn_only_enabled(),
    settings.fill_uninitialized_memory,
  )
  torch.use_deterministic_algorithms(on)
  settings.fill_uninitialized_memory = False
  try:
    yield
  finally:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    settings.fill_uninitialized_memory = before[2]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
  try:
    with _deterministic(False), sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
      y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale
      )
  except RuntimeError as error:
    raise KernelError(
      f"attention: cuDNN refuses q {q.dtype} {tuple(q.shape)}, v {v.dtype} {tuple(v.shape)}: "
      f"{error}; use bfloat16, two tokens or more, head widths that are multiples of 8, and a "
      "torch with cuDNN 9.5 or newer"
    ) from error
  return y.transpose(1, 2)


class _Attention(torch.autograd.Function):
  """Keeps the graph of the forward call, so that backward runs it under the setting."""

  @staticmethod
  def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    ctx.inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
      ctx.output = _cudnn(*ctx.inputs, scale)
    return ctx.output.detach()

  @staticmethod
  @once_differentiable
  def backward(ctx, dy: Tensor):
    with _deterministic(True):
      grads = torch.autograd.grad(ctx.output, ctx.inputs, dy)
    return *grads, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
  """See kernels.ops.Ops.attention. KernelError when cuDNN cannot run these shapes."""
  check_device(check_same_device(q, k, v))
  check(
    q.shape == k.shape and k.shape[:3] == v.shape[:3],
    f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
    "need [B, S, H, QK] twice and [B, S, H, V]",
  )
  if q.numel() == 0:
    return v * 1
  if not torch.is_grad_enabled():
    return _cudnn(q, k, v, scale)
  return _Attention.apply(q, k, v, scale)
