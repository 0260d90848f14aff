"""The configuration of a model as HuggingFace's classes read it.

Two classes compute what we train: `DeepseekV3ForCausalLM` (sigmoid scores with a selection bias)
and `DeepseekV2ForCausalLM` (softmax scores, neither normalised nor biased). What neither computes
is refused, naming the key. Their latent norms have the fixed eps 1e-6: another model.norm_eps is
an error that the export measures (nmoe.model.agreement).
"""

from __future__ import annotations

from typing import Any, Literal

from nmoe.config.sections import Config
from nmoe.config.yarn import yarn_range
from nmoe.errors import ConfigError

TRANSFORMERS = "5.24.0"  # what the files are written for and were tested with
LATENT_EPS = 1e-6  # of the latent norms of both classes
Dtype = Literal["bfloat16", "float32"]


def hf_config(config: Config, eot: int, dtype: Dtype) -> dict[str, Any]:
  """config.json. eot: the id of the document separator, which ends and pads a text.

  Raises ConfigError for what no class computes.
  """
  model_type = model_type_of(config)
  m, e = config.model, config.moe
  if eot >= m.vocab_size:
    raise ConfigError(
      f"model.vocab_size = {m.vocab_size} has no row for the separator {eot} of tokenizer "
      f"{config.data.tokenizer!r}; set model.vocab_size = {eot + 1} or more"
    )
  return {
    "architectures": [
      f"{'DeepseekV3' if model_type == 'deepseek_v3' else 'DeepseekV2'}ForCausalLM"
    ],
    "model_type": model_type,
    "transformers_version": TRANSFORMERS,
    "dtype": dtype,
    "torch_dtype": dtype,
    **token_ids(eot),
    "vocab_size": m.vocab_size,
    "hidden_size": m.dim,
    "intermediate_size": m.dense_dim,
    "moe_intermediate_size": e.expert_dim,
    "num_hidden_layers": m.num_layers,
    "first_k_dense_replace": m.num_dense_layers,
    "moe_layer_freq": 1,
    "num_attention_heads": m.num_heads,
    "num_key_value_heads": m.num_heads,
    "head_dim": m.qk_rope_dim,
    "q_lora_rank": m.q_lora_rank or None,
    "kv_lora_rank": m.kv_lora_rank,
    "qk_nope_head_dim": m.qk_nope_dim,
    "qk_rope_head_dim": m.qk_rope_dim,
    "v_head_dim": m.v_dim,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "n_routed_experts": e.num_experts,
    "num_experts_per_tok": e.top_k,
    "n_shared_experts": e.num_shared or 1,
    **_routing(config, model_type),
    "norm_topk_prob": e.normalize,
    "routed_scaling_factor": e.route_scale,
    "moe_router_dtype": "float32",
    "rms_norm_eps": m.norm_eps,
    "initializer_range": m.init_std,
    "max_position_embeddings": positions(config),
    "tie_word_embeddings": m.tie_embeddings,
    "use_cache": True,
    "num_nextn_predict_layers": 0,
    "rope_interleave": True,
    **_rope(config),
  }


def generation_config(eot: int) -> dict[str, Any]:
  """generation_config.json: the same ends of a text, nothing about sampling."""
  return {**token_ids(eot), "transformers_version": TRANSFORMERS}


def token_ids(eot: int) -> dict[str, Any]:
  """A text begins with nothing of its own and ends with the separator, which also pads."""
  return {"bos_token_id": None, "eos_token_id": eot, "pad_token_id": eot}


def model_type_of(config: Config) -> Literal["deepseek_v3", "deepseek_v2"]:
  """The class that computes this model. Raises ConfigError where there is none."""
  refused = next((line for line, broken in _refusals(config) if broken), None)
  if refused is not None:
    raise ConfigError(f"no class of HuggingFace computes {refused}")
  return "deepseek_v2" if _routed(config) and config.moe.score == "softmax" else "deepseek_v3"


def positions(config: Config) -> int:
  """The context that the frequencies serve."""
  extended = int(config.yarn.original_seq_len * config.yarn.factor)
  return config.data.seq_len if config.yarn.factor == 1 else max(extended, config.data.seq_len)


def _routed(config: Config) -> bool:
  return config.model.num_dense_layers < config.model.num_layers


def _limited(config: Config) -> bool:
  """Whether groups keep a token from some experts."""
  return config.moe.topk_groups < config.moe.num_groups


def _refusals(config: Config) -> list[tuple[str, bool]]:
  m, e, y, routed = config.model, config.moe, config.yarn, _routed(config)
  softmax = routed and e.score == "softmax"
  size = e.num_experts // e.num_groups if _limited(config) else e.num_experts
  rate = e.bias_update_rate
  low, high = yarn_range(m, y) if y.factor > 1 else (0, 0)
  return [
    ("moe.num_shared = 0: each has at least one shared expert", routed and e.num_shared == 0),
    ("moe.forced_balance = true: it is a benchmark's routing", routed and e.forced_balance),
    ('moe.score = "softmax" with moe.normalize = true: set one of them', softmax and e.normalize),
    (
      f'moe.score = "softmax" with a selection bias (moe.bias_update_rate = {rate})',
      softmax and rate > 0,
    ),
    (
      f'moe.score = "softmax" with moe.topk_groups {e.topk_groups} of num_groups {e.num_groups}: '
      "theirs take the best expert of a group, ours the best two",
      softmax and _limited(config),
    ),
    (
      f'moe.score = "softmax" with model.dim = {m.dim} that is no multiple of model.num_heads = '
      f"{m.num_heads}: their class refuses it",
      softmax and m.dim % m.num_heads != 0,
    ),
    (
      f'moe.score = "softmax" with an odd one of model.qk_nope_dim = {m.qk_nope_dim} and '
      f"kv_lora_rank = {m.kv_lora_rank}: their class takes what follows as complex pairs",
      softmax and (m.qk_nope_dim % 2 == 1 or m.kv_lora_rank % 2 == 1),
    ),
    (
      f"moe.num_groups = {e.num_groups} of num_experts = {e.num_experts}: "
      "groups are chosen by their best two experts, these have one",
      routed and not softmax and size < 2,
    ),
    (
      f"yarn.original_seq_len = {y.original_seq_len}: in it no dimension turns yarn.beta_slow = "
      f"{y.beta_slow} times; theirs turn the ramp of frequencies round",
      low > high,
    ),
  ]


def _routing(config: Config, model_type: str) -> dict[str, Any]:
  if model_type == "deepseek_v2":
    return {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1}
  groups = (config.moe.num_groups, config.moe.topk_groups) if _limited(config) else (1, 1)
  return {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": groups[0],
    "topk_group": groups[1],
  }


def _rope(config: Config) -> dict[str, Any]:
  """Under the present names, and under those that older readers know."""
  y, theta = config.yarn, config.model.rope_theta
  if y.factor == 1:
    plain = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": plain, "rope_theta": theta, "rope_scaling": None}
  yarn = {
    "factor": y.factor,
    "original_max_position_embeddings": y.original_seq_len,
    "beta_fast": y.beta_fast,
    "beta_slow": y.beta_slow,
    "mscale": y.mscale_all_dim,
    "mscale_all_dim": y.mscale_all_dim,
    "attention_factor": 1.0,  # of cos and sin: else derived, wrongly where mscale is 0
  }
  return {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **yarn},
    "rope_theta": theta,
    "rope_scaling": {"type": "yarn", "rope_type": "yarn", **yarn},
  }
