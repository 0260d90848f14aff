"""Causal attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.ops import check


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
  """See Ops.attention. A narrower v is zero-padded: torch's fused CPU kernel wants one width."""
  check(
    q.shape == k.shape and v.shape[:-1] == q.shape[:-1],
    f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} must be equal, and v {tuple(v.shape)} "
    "equal to them in all but the last dimension",
  )
  padding = max(0, q.shape[-1] - v.shape[-1])
  q_BHSD, k_BHSD, v_BHSD = (t.transpose(1, 2) for t in (q, k, F.pad(v, (0, padding))))
  out = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True, scale=scale)
  return out.transpose(1, 2)[..., : v.shape[-1]]
