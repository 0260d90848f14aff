"""Causal attention by FlashAttention-4 (flash-attn-4, CuTeDSL) with its deterministic backward.

torch's cuDNN attention adds into dq in any order, so two runs differ; torch withholds it when
deterministic algorithms are asked for. FlashAttention-4 orders those sums by semaphores.
FLOPs, causal: B · H · S² · (QK + V) forward, 2.5 times that backward.

On one H200 the deterministic backward takes 1.15 of cuDNN's, which does not repeat
(kernels/RESULTS.md).
"""

from __future__ import annotations

import torch
from flash_attn.cute import flash_attn_func
from torch import Tensor

from kernels.cuda.jit import check_device
from kernels.ops import check, check_same_device

MLA_HEAD = (192, 128)  # the widths beyond 128 that both architectures have


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
  """See kernels.ops.Ops.attention. bf16; head widths are 64, 72, … 128, or 192/128."""
  check_device(check_same_device(q, k, v))
  check(
    q.shape == k.shape and k.shape[:3] == v.shape[:3],
    f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
    "need [B, S, H, QK] twice and [B, S, H, V]",
  )
  dtypes = {t.dtype for t in (q, k, v)}
  check(
    dtypes == {torch.bfloat16},
    f"attention: q, k, v are {', '.join(sorted(map(str, dtypes)))}; pass bfloat16",
  )
  widths = (q.shape[3], v.shape[3])
  fits = all(width % 8 == 0 and 64 <= width <= 128 for width in widths)
  check(
    fits or widths == MLA_HEAD,
    f"attention: head widths {widths[0]}/{widths[1]}; they must be multiples of 8 from 64 to "
    f"128, or {MLA_HEAD[0]}/{MLA_HEAD[1]}",
  )
  if q.numel() == 0:
    return v * 1
  return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=True)[0]
