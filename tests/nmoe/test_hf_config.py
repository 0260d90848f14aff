"""config.json against transformers: whatever the configuration allows is refused or equal."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_configs import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from kernels import reference
from nmoe.errors import ConfigError
from nmoe.model.decoder import Model
from nmoe.model.hf_config import generation_config, hf_config, model_type_of
from nmoe.model.names import to_hf

POSITIONS = 24


def compare(config, tmp_path, latent_eps=None) -> float:
  """Largest difference of logits, relative to the largest logit or 1, beyond four times what fp32
  rounds theirs by: a norm over one dimension is a sign, which rounding can turn. latent_eps: what
  their class fixes at 1e-6, set to this.
  """
  table = hf_config(config, 96, "float32")
  model = Model(config, reference)
  model.init_weights(1)
  biased = table["model_type"] == "deepseek_v3"
  for i, router in enumerate(model.routers):
    router.bias.copy_(torch.linspace(-0.2, 0.2, len(router.bias)).roll(i) * biased)
  hf = {n: x for n, x in to_hf(model.state_dict()).items() if biased or "e_score" not in n}
  torch.save({n: x.contiguous().clone() for n, x in hf.items()}, tmp_path / "pytorch_model.bin")
  (tmp_path / "config.json").write_text(json.dumps(table))
  theirs, report = AutoModelForCausalLM.from_pretrained(
    tmp_path,
    dtype=torch.float32,
    attn_implementation="eager",
    experts_implementation="eager",
    output_loading_info=True,
  )
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, module in theirs.named_modules():
    if latent_eps is not None and name.endswith(("kv_a_layernorm", "q_a_layernorm")):
      module.variance_epsilon = latent_eps
  tokens = torch.arange(2 * POSITIONS).view(2, POSITIONS) % 97
  with torch.no_grad():
    ours, other = model.logits(tokens), theirs(tokens, use_cache=False).logits
    exact = theirs.double()(tokens, use_cache=False).logits
  apart, rounded = ((x - other).abs().max() for x in (ours, exact))
  return float((apart - 4 * rounded).clamp(min=0) / ours.abs().max().clamp(min=1))


@st.composite
def drawn(draw):
  """A configuration of all that `validate` allows and that a model can be built of: every key of
  [model], [moe] and [yarn] that the equations have, at its edges too.
  """
  experts = draw(st.sampled_from([1, 2, 6, 8]))
  num_groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8) if experts % g == 0]))
  topk_groups = draw(st.integers(1, num_groups))
  layers = draw(st.integers(1, 3))
  top_k = draw(st.integers(1, min(experts // num_groups * topk_groups, 4)))
  slow = draw(st.sampled_from([0.5, 1.0, 4.0]))
  sizes = {"model__dense_dim": 48, "model__kv_lora_rank": 16, "model__qk_nope_dim": 8}
  edges = {name: draw(st.sampled_from([1, 3, size])) for name, size in sizes.items()}
  return tiny(
    **edges,
    model__dim=draw(st.sampled_from([4, 30, 32])),
    model__num_layers=layers,
    model__num_dense_layers=draw(st.integers(0, layers)),
    model__num_heads=draw(st.sampled_from([1, 3, 4])),
    model__q_lora_rank=draw(st.sampled_from([0, 1, 24])),
    model__qk_rope_dim=draw(st.sampled_from([2, 8])),
    model__v_dim=draw(st.sampled_from([1, 12, 20])),
    model__norm_eps=draw(st.sampled_from([1e-6, 1e-6, 1e-5, 1e-3])),
    model__rope_theta=draw(st.sampled_from([1.01, 1.5, 100.0, 1e4, 1e6])),
    model__tie_embeddings=draw(st.booleans()),
    yarn__factor=draw(st.sampled_from([1.0, 1.25, 2.0, 40.0])),
    yarn__original_seq_len=draw(st.sampled_from([1, 16, 64, 4096])),
    yarn__beta_slow=slow,
    yarn__beta_fast=draw(st.sampled_from([slow, 8.0, 32.0])),
    yarn__mscale_all_dim=draw(st.sampled_from([0.0, 0.1, 0.707, 1.0])),
    moe__num_experts=experts,
    moe__num_groups=num_groups,
    moe__topk_groups=topk_groups,
    moe__top_k=top_k,
    moe__expert_dim=draw(st.sampled_from([1, 4, 20])),
    moe__num_shared=draw(st.sampled_from([0, 1, 1, 2])),
    moe__score=draw(st.sampled_from(["sigmoid", "sigmoid", "softmax"])),
    moe__normalize=top_k > 1 and draw(st.booleans()),
    moe__route_scale=draw(st.sampled_from([0.1, 1.0, 2.5])),
    moe__bias_update_rate=draw(st.sampled_from([0.0, 0.0, 0.001])),
    moe__forced_balance=draw(st.sampled_from([False] * 5 + [True])),
  )


SIGNS = tiny(  # latents of one dimension, drawn once: both models round by 3e-5 in fp32
  model__dim=30,
  model__num_layers=3,
  model__num_dense_layers=1,
  model__dense_dim=1,
  model__num_heads=4,
  model__q_lora_rank=1,
  model__kv_lora_rank=1,
  model__qk_nope_dim=3,
  model__qk_rope_dim=8,
  model__v_dim=12,
  model__rope_theta=100.0,
  model__norm_eps=1e-6,
  moe__num_experts=2,
  moe__expert_dim=20,
  moe__num_shared=1,
  moe__top_k=1,
  moe__num_groups=1,
  moe__topk_groups=1,
  moe__normalize=False,
  moe__route_scale=0.1,
  moe__bias_update_rate=0.0,
)


@pytest.mark.faults
@settings(max_examples=200, deadline=None)
@given(config=drawn())
@example(config=SIGNS)
def test_a_model_is_refused_or_has_equal_logits(config, tmp_path_factory):
  """But for the eps of the latent norms, which a class fixes: the export measures what it does."""
  try:
    model_type_of(config)
  except ConfigError:
    return
  eps = config.model.norm_eps
  assert compare(config, tmp_path_factory.mktemp("hf"), latent_eps=eps) < 1e-5


@settings(max_examples=200)
@given(config=drawn())
def test_what_is_refused_has_a_reason(config):
  """Models of one of the two kinds are never refused."""
  e, routed = config.moe, config.model.num_dense_layers < config.model.num_layers
  limited = e.topk_groups < e.num_groups
  v3 = e.score == "sigmoid" and e.num_experts > (e.num_groups if limited else 1)
  v2 = e.score == "softmax" and not (e.normalize or e.bias_update_rate or limited)
  m = config.model
  v2 = v2 and m.dim % m.num_heads == m.qk_nope_dim % 2 == m.kv_lora_rank % 2 == 0
  fine = not routed or ((v3 or v2) and e.num_shared and not e.forced_balance)
  rotations = config.yarn.original_seq_len / (2 * math.pi)  # of the fastest dimension
  dims = config.model.qk_rope_dim / 2 / math.log(max(config.model.rope_theta, 1.1))
  last = math.ceil(dims * math.log(rotations / config.yarn.beta_slow))
  first = math.floor(dims * math.log(rotations / config.yarn.beta_fast))
  ramp = min(last, config.model.qk_rope_dim - 1) >= max(first, 0)
  if fine and (config.yarn.factor == 1 or ramp):
    assert model_type_of(config) == ("deepseek_v2" if routed and v2 else "deepseek_v3")
  else:
    with pytest.raises(ConfigError, match="no class of HuggingFace computes (moe|yarn)\\."):
      model_type_of(config)


FAULTS = {
  "mscale 0": {"yarn__factor": 8.0, "yarn__original_seq_len": 8, "yarn__mscale_all_dim": 0.0},
  "an expert a group, all groups": {"moe__num_groups": 8, "moe__topk_groups": 8},
  "softmax": {"moe__score": "softmax", "moe__normalize": False, "moe__bias_update_rate": 0.0},
  "softmax with YaRN": {
    "moe__score": "softmax",
    "moe__normalize": False,
    "moe__bias_update_rate": 0.0,
    "yarn__factor": 40.0,
    "yarn__original_seq_len": 8,
    "yarn__mscale_all_dim": 0.707,
    "model__q_lora_rank": 24,
  },
}


@pytest.mark.parametrize("name", FAULTS)
def test_known_faults_of_configurations(name, tmp_path):
  assert compare(tiny(**FAULTS[name]), tmp_path) < 1e-5


def test_the_fixed_eps_of_latent_norms_is_seen(tmp_path):
  """What the export must measure: another eps gives other logits in transformers."""
  assert compare(tiny(model__norm_eps=1e-2), tmp_path) > 1e-4


def test_the_file_says_what_readers_would_guess_wrongly(tmp_path):
  config = tiny(yarn__factor=4.0)
  table = hf_config(config, 96, "bfloat16")
  (tmp_path / "config.json").write_text(json.dumps(table))
  read = AutoConfig.from_pretrained(tmp_path)
  for made in (table, generation_config(96)):
    assert (made["bos_token_id"], made["eos_token_id"], made["pad_token_id"]) == (None, 96, 96)
  assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (None, 96, 96)
  assert read.num_nextn_predict_layers == 0
  assert read.dtype == torch.bfloat16 and table["torch_dtype"] == "bfloat16"
  assert read.head_dim == config.model.qk_rope_dim
  wanted = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_dtype": "float32"}
  wanted |= {"rope_interleave": True, "hidden_act": "silu", "attention_bias": False}
  assert {key: table[key] for key in wanted} == wanted
  assert table["rope_scaling"]["factor"] == table["rope_parameters"]["factor"] == 4.0
  assert table["rope_theta"] == table["rope_parameters"]["rope_theta"]


def test_a_separator_without_a_row_is_refused():
  with pytest.raises(ConfigError, match="vocab_size = 97 has no row for the separator 256"):
    hf_config(tiny(), 256, "float32")
