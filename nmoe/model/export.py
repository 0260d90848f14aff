"""Weights under HuggingFace's names for `DeepseekV3ForCausalLM`, and back.

The names are those of the files on disk: one matrix per expert and projection (transformers fuses
experts in memory only). Our w13 interleaves the rows of gate and up; theirs are two matrices. RoPE
pairs are interleaved on both sides (`rope_interleave`). The maps are linear, so gradients pass
through them too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nmoe.config.parameters import parameter_shapes
from nmoe.config.sections import Config
from nmoe.errors import CheckpointError, ConfigError

TOP = {
  "embed.weight": "model.embed_tokens.weight",
  "norm.weight": "model.norm.weight",
  "head.weight": "lm_head.weight",
}
RENAMED = {
  "attention_norm.weight": "input_layernorm.weight",
  "mlp_norm.weight": "post_attention_layernorm.weight",
  "attention.q.weight": "self_attn.q_proj.weight",
  "attention.q_a.weight": "self_attn.q_a_proj.weight",
  "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
  "attention.q_b.weight": "self_attn.q_b_proj.weight",
  "attention.kv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
  "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
  "attention.kv_b.weight": "self_attn.kv_b_proj.weight",
  "attention.o.weight": "self_attn.o_proj.weight",
  "moe.router.weight": "mlp.gate.weight",
  "moe.router.bias": "mlp.gate.e_score_correction_bias",
}
BLOCKS = {"mlp": "mlp", "moe.shared": "mlp.shared_experts", "moe.experts": "mlp.experts"}


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """A whole state dict (all experts) under HuggingFace's names; shares memory with it."""
  hf = {}
  for name, tensor in state.items():
    if name in TOP:
      hf[TOP[name]] = tensor
      continue
    prefix, part = _layer(name)
    if part in RENAMED:
      hf[prefix + RENAMED[part]] = tensor
      continue
    block, _, weight = part.rpartition(".")
    if block == "moe.experts":
      for expert, matrix in enumerate(tensor):
        hf.update(_projections(f"{prefix}{BLOCKS[block]}.{expert}.", weight, matrix))
    else:
      hf.update(_projections(f"{prefix}{BLOCKS[block]}.", weight, tensor))
  return hf


def from_hf(hf: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
  """The state dict of `Model(config)` from HuggingFace's names, in their dtypes.

  Multi-token-prediction layers (model.layers.{num_layers}.…) are left out. Raises CheckpointError
  for a missing, an unexpected, or a wrongly shaped tensor.
  """
  mtp = f"model.layers.{config.model.num_layers}."
  left = {name: tensor for name, tensor in hf.items() if not name.startswith(mtp)}
  state = {}
  for name, shape in _expected(config):
    tensor = _gather(name, shape, left)
    if tuple(tensor.shape) != shape:
      raise CheckpointError(f"{name} would be {tuple(tensor.shape)}, the model needs {shape}")
    state[name] = tensor
  if config.model.tie_embeddings:
    left.pop("lm_head.weight", None)
  if left:
    raise CheckpointError(
      f"{len(left)} tensors have no place in this model, the first is {min(left)!r}; "
      "is it another architecture?"
    )
  return state


def hf_config(config: Config) -> dict[str, Any]:
  """The config.json of `DeepseekV3ForCausalLM` for this model.

  HuggingFace's class gives the latent norms the fixed eps 1e-6; ours follow model.norm_eps. Raises
  ConfigError for what the class cannot express.
  """
  m, e = config.model, config.moe
  if e.score != "sigmoid" or e.num_shared == 0:
    raise ConfigError(
      f'DeepseekV3ForCausalLM needs moe.score = "sigmoid" and moe.num_shared >= 1, '
      f"this model has {e.score!r} and {e.num_shared}"
    )
  return {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": m.vocab_size,
    "hidden_size": m.dim,
    "intermediate_size": m.dense_dim,
    "moe_intermediate_size": e.expert_dim,
    "num_hidden_layers": m.num_layers,
    "first_k_dense_replace": m.num_dense_layers,
    "num_attention_heads": m.num_heads,
    "num_key_value_heads": m.num_heads,
    "q_lora_rank": m.q_lora_rank or None,
    "kv_lora_rank": m.kv_lora_rank,
    "qk_nope_head_dim": m.qk_nope_dim,
    "qk_rope_head_dim": m.qk_rope_dim,
    "v_head_dim": m.v_dim,
    "n_routed_experts": e.num_experts,
    "num_experts_per_tok": e.top_k,
    "n_shared_experts": e.num_shared,
    "n_group": e.num_groups,
    "topk_group": e.topk_groups,
    "norm_topk_prob": e.normalize,
    "routed_scaling_factor": e.route_scale,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rms_norm_eps": m.norm_eps,
    "initializer_range": m.init_std,
    "max_position_embeddings": _positions(config),
    "tie_word_embeddings": m.tie_embeddings,
    "num_nextn_predict_layers": 0,
    "rope_interleave": True,
    "rope_parameters": _rope_parameters(config),
  }


def _positions(config: Config) -> int:
  """The context that the frequencies serve."""
  extended = int(config.yarn.original_seq_len * config.yarn.factor)
  return config.data.seq_len if config.yarn.factor == 1 else extended


def _rope_parameters(config: Config) -> dict[str, Any]:
  y, theta = config.yarn, config.model.rope_theta
  if y.factor == 1:
    return {"rope_type": "default", "rope_theta": theta}
  return {
    "rope_type": "yarn",
    "rope_theta": theta,
    "factor": y.factor,
    "original_max_position_embeddings": y.original_seq_len,
    "beta_fast": y.beta_fast,
    "beta_slow": y.beta_slow,
    "mscale": y.mscale_all_dim,
    "mscale_all_dim": y.mscale_all_dim,
  }


def _layer(name: str) -> tuple[str, str]:
  """("model.layers.3.", "attention.q.weight") from "layers.3.attention.q.weight"."""
  _, layer, part = name.split(".", 2)
  return f"model.layers.{layer}.", part


def _projections(prefix: str, weight: str, matrix: Tensor) -> dict[str, Tensor]:
  if weight == "w2":
    return {f"{prefix}down_proj.weight": matrix}
  return {f"{prefix}gate_proj.weight": matrix[0::2], f"{prefix}up_proj.weight": matrix[1::2]}


def _expected(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
  for name, shape in parameter_shapes(config).items():
    yield name, shape
    if name.endswith("router.weight"):
      yield name.replace("weight", "bias"), shape[:1]


def _gather(name: str, shape: tuple[int, ...], left: dict[str, Tensor]) -> Tensor:
  """Our tensor `name`, taken out of `left`."""
  if name in TOP:
    return _take(TOP[name], left)
  prefix, part = _layer(name)
  if part in RENAMED:
    return _take(prefix + RENAMED[part], left)
  block, _, weight = part.rpartition(".")
  if block != "moe.experts":
    return _fused(f"{prefix}{BLOCKS[block]}.", weight, left)
  matrices = [_fused(f"{prefix}{BLOCKS[block]}.{e}.", weight, left) for e in range(shape[0])]
  return torch.stack(matrices)


def _fused(prefix: str, weight: str, left: dict[str, Tensor]) -> Tensor:
  if weight == "w2":
    return _take(f"{prefix}down_proj.weight", left)
  gate, up = _take(f"{prefix}gate_proj.weight", left), _take(f"{prefix}up_proj.weight", left)
  return torch.stack([gate, up], dim=1).flatten(0, 1)


def _take(name: str, left: dict[str, Tensor]) -> Tensor:
  if name not in left:
    near = difflib.get_close_matches(name, left, n=1)
    found = f"; the nearest is {near[0]!r}" if near else ""
    raise CheckpointError(f"{name!r} is missing among {len(left)} tensors{found}")
  return left.pop(name)
