"""Names of the files on disk, against what HuggingFace itself writes and reads."""

from __future__ import annotations

import json

import pytest
import torch
from model_configs import tiny
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from kernels import reference
from nmoe.errors import CheckpointError, ConfigError
from nmoe.model.decoder import Model
from nmoe.model.export import from_hf, hf_config, to_hf

CONFIGS = {
  "plain": {},
  "q_lora": {"model__q_lora_rank": 24, "yarn__factor": 4.0},
  "tied": {"model__tie_embeddings": True},
}


def state_of(config, seed: int = 0) -> dict[str, torch.Tensor]:
  model = Model(config, reference)
  model.init_weights(seed)
  for i, router in enumerate(model.routers):
    router.bias.copy_(torch.arange(config.moe.num_experts) * 0.01 + i)
  return model.state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
  config = tiny(**CONFIGS[name])
  state = state_of(config)
  back = from_hf(to_hf(state), config)
  assert back.keys() == state.keys()
  assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", CONFIGS)
def test_huggingface_loads_the_exported_files(name, tmp_path):
  config = tiny(**CONFIGS[name])
  state = state_of(config)
  tensors = {key: value.contiguous() for key, value in to_hf(state).items()}
  save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
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
  hf = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(config), attn_implementation="eager"))
  hf.save_pretrained(tmp_path)
  model = Model(config, reference)
  model.init_weights(0)
  model.load_state_dict(from_hf(load_file(tmp_path / "model.safetensors"), config))
  tokens = torch.arange(24).view(1, 24)
  theirs = hf.float()(tokens, use_cache=False).logits
  torch.testing.assert_close(model.logits(tokens), theirs, rtol=1e-4, atol=1e-5)


def test_multi_token_prediction_layers_are_left_out():
  config = tiny()
  hf = to_hf(state_of(config))
  hf["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
  assert from_hf(hf, config).keys() == state_of(config).keys()


def test_missing_unexpected_and_misshapen_tensors_are_named():
  config = tiny()
  hf = to_hf(state_of(config))
  part = {key: value for key, value in hf.items() if "experts.3.up_proj" not in key}
  with pytest.raises(CheckpointError, match="'model.layers.1.mlp.experts.3.up_proj.weight' is mis"):
    from_hf(part, config)
  with pytest.raises(CheckpointError, match="1 tensors have no place.*'extra'"):
    from_hf({**hf, "extra": torch.zeros(1)}, config)
  with pytest.raises(
    CheckpointError, match=r"norm.weight would be \(31,\), the model needs \(32,\)"
  ):
    from_hf({**hf, "model.norm.weight": torch.ones(31)}, config)


def test_what_huggingface_cannot_express_is_refused():
  with pytest.raises(ConfigError, match="'softmax' and 2"):
    hf_config(tiny(moe__score="softmax"))
