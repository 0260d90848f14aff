"""What the kernels of a run depend on: all that choosing and compiling them needs. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shapes:
  """What the kernels of a run depend on, named as the keys of a configuration; E is per rank."""

  batch: int
  seq_len: int
  dim: int
  vocab_size: int
  num_heads: int
  qk_nope_dim: int
  qk_rope_dim: int
  v_dim: int
  kv_lora_rank: int
  q_lora_rank: int
  dense_dim: int
  num_experts: int
  ranks: int
  expert_dim: int
  num_shared: int
  top_k: int
  num_groups: int
  topk_groups: int
  score: str
  normalize: bool
  route_scale: float
  loss_chunk: int
  dtype: str  # "bf16", "fp8" or "nvfp4"
  emulate_blockscale: bool
  moments: str  # "fp32" or "bf16"
  muon: bool
  payload: str  # of RDEP's dispatched rows: "bf16", "mxfp8" or "nvfp4"
