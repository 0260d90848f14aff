"""Causal attention through torch's scaled_dot_product_attention, on cuDNN's kernel and no other.

FLOPs, causal: 2 · B · H · S² · (QK + V) / 2 forward, 2.5 times that backward.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.cuda.jit import check_device
from kernels.ops import KernelError, check, check_same_device


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
  """See kernels.ops.Ops.attention. KernelError when cuDNN cannot run these shapes: no slower kernel is taken."""
  check_device(check_same_device(q, k, v))
  check(
    q.shape == k.shape and k.shape[:3] == v.shape[:3],
    f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
    "need [B, S, H, QK] twice and [B, S, H, V]",
  )
  if q.numel() == 0:
    return v.new_empty(v.shape)
  try:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
      y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale
      )
  except RuntimeError as error:
    raise KernelError(
      f"attention: cuDNN refuses q {q.dtype} {tuple(q.shape)}, v {v.dtype} {tuple(v.shape)}: {error}; "
      "use bfloat16 and head widths that are multiples of 8, and a torch built with cuDNN 9.5 or newer"
    ) from error
  return y.transpose(1, 2)
