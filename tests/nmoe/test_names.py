"""Names of the files on disk, against what HuggingFace itself writes and reads."""

from __future__ import annotations

import json

import pytest
import torch
from labs import whole_experts
from model_configs import tiny
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from kernels import reference
from nmoe.errors import CheckpointError
from nmoe.model.decoder import Model
from nmoe.model.hf_config import hf_config
from nmoe.model.names import from_hf, to_hf
from nmoe.records.checkpoint import split_experts

CONFIGS = {
  "plain": {},
  "q_lora": {"model__q_lora_rank": 24, "yarn__factor": 4.0},
  "tied": {"model__tie_embeddings": True},
}


def table(config):
  return hf_config(config, 96, "float32")


def state_of(config, seed: int = 0) -> dict[str, torch.Tensor]:
  model = Model(config, reference)
  model.init_weights(seed)
  for i, router in enumerate(model.routers):
    router.bias.copy_(torch.arange(config.moe.num_experts) * 0.01 + i)
  return model.state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
  """Of whole experts and of experts one by one, as a checkpoint names them."""
  config = tiny(**CONFIGS[name])
  state = state_of(config)
  split = split_experts(state, 0)
  assert "layers.1.moe.experts.7.w13" in split
  for hf in (to_hf(state), to_hf(split)):
    back = dict(from_hf(hf, config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
  stacked = whole_experts(split)
  assert all(torch.equal(stacked[key], state[key]) for key in state)


@pytest.mark.parametrize("name", CONFIGS)
def test_huggingface_loads_the_exported_files(name, tmp_path):
  config = tiny(**CONFIGS[name])
  state = state_of(config)
  tensors = {key: value.contiguous() for key, value in to_hf(state).items()}
  save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  (tmp_path / "config.json").write_text(json.dumps(table(config)))
  hf, report = DeepseekV3ForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
  )
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  model = Model(config, reference)
  model.init_weights(0)
  model.load_state_dict(state)
  tokens = torch.arange(24).view(1, 24)
  theirs = hf(tokens, use_cache=False).logits
  torch.testing.assert_close(model.logits(tokens), theirs, rtol=1e-4, atol=1e-5)


def test_files_written_by_huggingface_load(tmp_path):
  config = tiny(model__q_lora_rank=24)
  torch.manual_seed(0)
  hf = DeepseekV3ForCausalLM(DeepseekV3Config(**table(config), attn_implementation="eager"))
  hf.save_pretrained(tmp_path)
  model = Model(config, reference)
  model.init_weights(0)
  model.load_state_dict(dict(from_hf(load_file(tmp_path / "model.safetensors"), config)))
  tokens = torch.arange(24).view(1, 24)
  theirs = hf.float()(tokens, use_cache=False).logits
  torch.testing.assert_close(model.logits(tokens), theirs, rtol=1e-4, atol=1e-5)


def test_experts_fused_by_huggingface_load(tmp_path):
  """One tensor for all experts, as transformers saves on request."""
  config = tiny()
  state = state_of(config)
  hf = DeepseekV3ForCausalLM(DeepseekV3Config(**table(config)))
  save_file({k: v.contiguous() for k, v in to_hf(state).items()}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(table(config)))
  hf = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  hf.save_pretrained(tmp_path / "fused", save_original_format=False)
  fused = load_file(tmp_path / "fused" / "model.safetensors")
  assert "model.layers.1.mlp.experts.gate_up_proj" in fused
  back = dict(from_hf(fused, config))
  assert all(torch.equal(back[key], state[key]) for key in state)


def test_what_is_computed_or_not_of_the_model_is_left_out():
  """Layers of multi-token prediction, and RoPE's frequencies in files of an older transformers."""
  config = tiny()
  hf = to_hf(state_of(config))
  hf["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
  hf["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
  assert dict(from_hf(hf, config)).keys() == state_of(config).keys()


def test_files_without_selection_biases_have_them_at_zero_where_that_is_said():
  config = tiny()
  hf = {k: v for k, v in to_hf(state_of(config)).items() if "e_score" not in k}
  with pytest.raises(CheckpointError, match="'model.layers.1.mlp.gate.e_score_correction_bias'"):
    dict(from_hf(hf, config))
  back = dict(from_hf(hf, config, without_bias=True))
  assert torch.equal(back["layers.1.moe.router.bias"], torch.zeros(8))


def test_missing_unexpected_and_misshapen_tensors_are_named():
  config = tiny()
  hf = to_hf(state_of(config))
  part = {key: value for key, value in hf.items() if "experts.3.up_proj" not in key}
  with pytest.raises(CheckpointError, match="'model.layers.1.mlp.experts.3.up_proj.weight' is mis"):
    dict(from_hf(part, config))
  with pytest.raises(CheckpointError, match="no place in this model for 1 tensor, .*'extra'"):
    dict(from_hf({**hf, "extra": torch.zeros(1)}, config))
  with pytest.raises(
    CheckpointError, match=r"norm.weight would be \(31,\), the model needs \(32,\)"
  ):
    dict(from_hf({**hf, "model.norm.weight": torch.ones(31)}, config))
  name = "model.layers.2.mlp.experts.5.down_proj.weight"
  with pytest.raises(CheckpointError, match=r"layers.2.mlp.experts.5: w2 would be \(20, 32\)"):
    dict(from_hf({**hf, name: hf[name].T}, config))
  renamed = {key.replace("experts.5.", "experts.x."): value for key, value in hf.items()}
  with pytest.raises(CheckpointError, match="experts.5.gate_proj.weight' is missing.*experts.x"):
    dict(from_hf(renamed, config))
