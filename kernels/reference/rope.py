"""Splitting and rotating MLA's projections (arXiv 2412.19437 Eq 1-9; RoPE 2104.09864 Eq 34)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.arithmetic import wide
from kernels.ops import check


def mla_qkv(
  q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, rope_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
  """See Ops.mla_qkv. The rotation is computed in fp32 and rounded once to the inputs' dtype."""
  nope = q.shape[-1] - rope_dim
  check(
    rope_dim % 2 == 0 and nope >= 0 and k_rope.shape[-1] == rope_dim,
    f"mla_qkv: rope_dim {rope_dim} must be even, k_rope's width {k_rope.shape[-1]} and at most "
    f"q's {q.shape[-1]}",
  )
  check(
    cos.shape == sin.shape == (q.shape[1], rope_dim // 2),
    f"mla_qkv: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [S, rope / 2] = "
    f"[{q.shape[1]}, {rope_dim // 2}]",
  )
  q_nope, q_rope = q.split([nope, rope_dim], -1)
  k_nope, v = kv.split([nope, kv.shape[-1] - nope], -1)
  k_rope = rotate(k_rope[:, :, None], cos, sin).expand(-1, -1, q.shape[2], -1)
  q = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1)
  return q, torch.cat([k_nope, k_rope], -1), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
  """Turn pairs (2j, 2j+1) of x [B, S, H, rope] by angles with this cos and sin [S, rope / 2]."""
  dtype = wide(x)
  a, b = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
  cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
  return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
