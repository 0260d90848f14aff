"""`nmoe import` of a folder that is broken or another model's: refused by name, nothing is left."""

from __future__ import annotations

import hashlib
import json
import math
import re

import pytest
import torch
from folder_cases import folder_of
from model_configs import YARN, tiny

from nmoe.errors import CheckpointError, ConfigError
from nmoe.model.hf_config import hf_config
from nmoe.model.hf_folder import described_in, read_config, values_of
from nmoe.model.imported import imported_config
from nmoe.model.imports import import_folder
from nmoe.records import checkpoint
from nmoe.records.root import Root


@pytest.fixture
def root(tmp_path):
  return Root(tmp_path / "root")


EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"
FIRST, SHARED, NORM = (
  EXPERT.replace(".5.", ".0."),
  "model.layers.2.mlp.shared_experts",
  "model.norm.weight",
)
BROKEN = {
  "deleted": (lambda t: {k: v for k, v in t.items() if k != EXPERT}, f"'{EXPERT}' is missing"),
  "renamed": (
    lambda t: {k.replace("experts.5.down", "experts.5.dwn"): v for k, v in t.items()},
    "layers.1.mlp.experts.5.down_proj.weight' is missing.*the nearest is .*dwn_proj",
  ),
  "transposed": (lambda t: t | {EXPERT: t[EXPERT].T.contiguous()}, "layers.2.mlp.experts.5: w2"),
  "extra": (
    lambda t: t | {"model.extra": torch.ones(1)},
    "no place in this model for 1 tensor, .*'model.extra'",
  ),
  "without biases": (
    lambda t: {k: v for k, v in t.items() if "e_score" not in k},
    "e_score_correction_bias' is missing",
  ),
  "expert 0 transposed": (
    lambda t: t | {FIRST: t[FIRST].T.contiguous()},
    "layers.2.mlp.experts.0: w2 would be .20, 32., the model needs .32, 20.",
  ),
  "an expert of vectors": (
    lambda t: t | {FIRST.replace("down", p): torch.ones(5) for p in ("gate", "up")},
    "experts.0.gate_proj.weight' is .5,.; a matrix is needed",
  ),
  "shared experts of numbers": (
    lambda t: t | {f"{SHARED}.{p}_proj.weight": torch.ones(()) for p in ("gate", "up")},
    "shared_experts.gate_proj.weight' is ..; a matrix is needed",
  ),
  "fused experts of another width": (
    lambda t: (
      {n: v for n, v in t.items() if "mlp.experts" not in n}
      | {f"model.layers.{i}.mlp.experts.gate_up_proj": torch.ones(8, 41, 32) for i in (1, 2)}
      | {f"model.layers.{i}.mlp.experts.down_proj": torch.ones(8, 32, 20) for i in (1, 2)}
    ),
    "layers.1.mlp.experts.gate_up_proj' is .8, 41, 32., the model needs .8, 40, 32.",
  ),
  "a norm in fp8": (
    lambda t: t | {NORM: t[NORM].to(torch.float8_e4m3fn)} | {NORM + "_scale_inv": torch.ones(1)},
    "norm.weight: an fp8 weight .32,. is no matrix",
  ),
  "a layer too many": (
    lambda t: t | {n.replace("layers.2", "layers.3"): v.clone() for n, v in t.items()},
    "no place in this model for .*the first is 'model.layers.3",
  ),
  "scales in integers": (
    lambda t: (
      t
      | {EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}
      | {EXPERT + "_scale_inv": torch.ones(1, 1, dtype=torch.int32)}
    ),
    "down_proj.weight_scale_inv' is of type I32; scales are BF16",
  ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_by_name_and_nothing_is_written(tmp_path, root, name):
  change, message = BROKEN[name]
  with pytest.raises(CheckpointError, match=message):
    import_folder(folder_of(tmp_path, tiny(), change), root)
  assert not root.path.exists()


def spoilt(name, value):
  """Tensors whose `name` has one number that is `value`."""

  def change(tensors):
    tensors[name].view(-1)[0] = value
    return tensors

  return change


UNFIT = {
  "NaN": (spoilt(EXPERT, math.nan), {}, "layers.2.moe.experts.w2 has numbers that are not finite"),
  "infinite": (spoilt("lm_head.weight", -math.inf), {}, "head.weight has numbers that are not"),
  "a head of its own": (
    lambda tensors: tensors,
    {"tie_word_embeddings": True},
    "tie_word_embeddings.*'lm_head.weight' differs from 'model.embed_tokens.weight'",
  ),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", UNFIT)
def test_numbers_that_cannot_be_the_model_s_are_refused_and_nothing_is_left(tmp_path, root, name):
  change, values, message = UNFIT[name]
  folder = folder_of(tmp_path, tiny(), change)
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  with pytest.raises(CheckpointError, match=message):
    import_folder(folder, root)
  assert not list(root.imports.iterdir())


CONTRADICTIONS = {
  "llama": ({"model_type": "llama"}, "model_type = 'llama' is another architecture"),
  "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu', our model has 'silu'"),
  "every other layer": ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
  "grouped queries": ({"num_key_value_heads": 1}, "num_key_value_heads = 1, not 4"),
  "greedy": ({"topk_method": "greedy"}, "topk_method 'greedy' and scoring_func 'sigmoid'"),
  "group_limited": (
    {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "scoring_func": "softmax"},
    "'group_limited_greedy'",
  ),
  "mscale": (
    {
      "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
      }
    },
    "mscale 1.0 and mscale_all_dim 0.5",
  ),
  "attention_factor": ({"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor 2"),
  "a ramp of its own": ({"rope_parameters": YARN | {"truncate": False}}, "truncate = False"),
  "half of the dimensions": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
  "two kinds of RoPE": (
    {"rope_scaling": YARN},
    "rope_type = 'yarn' in rope_scaling, but 'default' elsewhere",
  ),
  "two thetas": ({"rope_theta": 5e5}, "rope_theta = 500000.0 in the top level, but 10000.0"),
  "two lengths": (
    {"rope_parameters": YARN, "original_max_position_embeddings": 4},
    "original_max_position_embeddings = 4 in the top level, but 8",
  ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_folder_of_another_model_is_refused_naming_the_key(tmp_path, name):
  change, message = CONTRADICTIONS[name]
  (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny(), 96, "float32") | change))
  with pytest.raises(ConfigError, match=message):
    values_of(read_config(tmp_path), "config.json")


def test_a_missing_key_is_not_guessed():
  table = hf_config(tiny(), 96, "float32")
  with pytest.raises(ConfigError, match="n_shared_experts missing; the class's defaults are not"):
    values_of({k: v for k, v in table.items() if k != "n_shared_experts"}, "config.json")


NO_CONFIGS = {
  "a list": "[]",
  "brackets": "[" * 100_000,
  "a kind in a list": {"model_type": ["deepseek_v3"]},
  "a number in words": {"rms_norm_eps": "small"},
  "NaN": {"routed_scaling_factor": float("nan")},
  "no length": {"max_position_embeddings": None},
  "RoPE in a list": {"rope_parameters": [1]},
  "YaRN without its factor": {
    "rope_parameters": {"type": "yarn", "mscale": 1, "mscale_all_dim": 1}
  },
  "no width": {"hidden_size": None},
  "no number of experts": {"n_routed_experts": None},
  "RoPE's kind in a list": {"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e4}},
  "theta in a table": {"rope_parameters": None, "rope_theta": {}},
}
NO_INDEXES = {
  "a number": {"weight_map": {"a": 5}},
  "brackets": "[" * 100_000,
  "a path": {"weight_map": {"a": "../model.safetensors"}},
  "a long name": {"weight_map": {"a": "x" * 5000}},
  "a file that is gone": {"weight_map": {"a": "gone.safetensors"}},
}


@pytest.mark.faults
@pytest.mark.parametrize("what", NO_CONFIGS)
def test_a_config_of_other_values_is_one_error(tmp_path, root, what):
  folder, wrong = folder_of(tmp_path, tiny()), NO_CONFIGS[what]
  path = folder / "config.json"
  told = wrong if isinstance(wrong, str) else json.dumps(json.loads(path.read_text()) | wrong)
  path.write_text(told)
  with pytest.raises(ConfigError, match="config.json") as said:
    import_folder(folder, root)
  assert "TOML" not in str(said.value)


OF_HF = (  # what a user of config.json knows; ours have other names
  "vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size "
  "num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
  "rms_norm_eps n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size "
  "norm_topk_prob routed_scaling_factor n_group topk_group initializer_range tie_word_embeddings "
  "max_position_embeddings rope_theta factor beta_fast beta_slow mscale_all_dim mscale "
  "original_max_position_embeddings"
).split()
BAD = (-1, 0, 1, 3, 7, 10**4, 10**6, 2**70, 1.5, -0.5, 1e300, True, "moe.top_k", [4], {"a": 1})
OURS = re.compile(r"\b(model|moe|yarn|data|target|schedule|train|launch|precision|rdep)\.\w+")
SHORT = re.compile(
  r"\b(dim|num_layers|num_heads|num_experts|top_k|num_groups|topk_groups|seq_len)\b"
)


@pytest.mark.faults
@pytest.mark.parametrize("key", OF_HF)
def test_a_value_that_cannot_be_is_told_by_config_json_s_own_key(tmp_path, key):
  """In every refusal: of a type, a range, or two keys that do not agree; of no key of ours."""
  of_rope = key in YARN or key.startswith("beta")
  (tmp_path / "model.safetensors").touch()
  refused = 0
  for bad in BAD:
    table = hf_config(tiny(), 96, "float32") | {"rope_parameters": dict(YARN)}
    (table["rope_parameters"] if of_rope else table)[key] = bad
    if key == "mscale_all_dim" and bad != {"a": 1}:  # it is to be of one value with mscale
      table["rope_parameters"]["mscale"] = bad
    (tmp_path / "config.json").write_text(json.dumps(table))
    try:
      described_in(tmp_path)
    except ConfigError as error:
      refused += 1
      said = str(error).removeprefix(f"{tmp_path}/config.json: ")
      assert said != str(error) and re.search(rf"\b{key}\b", said), said
      words = said.replace("'moe.top_k'", "")
      assert not OURS.search(words) and not SHORT.search(words), said
  assert refused > 2


@pytest.mark.faults
@pytest.mark.parametrize("what", NO_INDEXES)
def test_an_index_of_other_values_is_one_error(tmp_path, root, what):
  folder, wrong = folder_of(tmp_path, tiny()), NO_INDEXES[what]
  text = wrong if isinstance(wrong, str) else json.dumps(wrong)
  (folder / "model.safetensors.index.json").write_text(text)
  with pytest.raises(CheckpointError, match="index.json|gone.safetensors"):
    import_folder(folder, root)


def sealed(folder):
  """The folder with the sums that `nmoe export` writes beside weights."""
  name = "model.safetensors"
  sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()}
  (folder / "nmoe.json").write_text(json.dumps({"sha256": {"files": sums}}))
  return folder


def flip(file, place):
  content = bytearray(file.read_bytes())
  content[place] ^= 1
  file.write_bytes(content)


def test_an_export_with_a_changed_byte_is_refused(tmp_path, root):
  """The file is still a model's: the sums of its nmoe.json alone say that it is another's."""
  folder = sealed(folder_of(tmp_path, tiny()))
  file = folder / "model.safetensors"
  flip(file, file.stat().st_size - 4)  # the lowest bits of the last number
  with pytest.raises(CheckpointError, match=r"model.safetensors has sha256 \w{12}, nmoe.json says"):
    import_folder(folder, root)
  assert not root.path.exists()
  (folder / "nmoe.json").unlink()  # on purpose
  assert import_folder(folder, root).digest


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": {"files": 5}}', '{"sha256": [1]}'])
def test_sums_that_cannot_be_read_are_one_error(tmp_path, root, text):
  folder = folder_of(tmp_path, tiny())
  (folder / "nmoe.json").write_text(text)
  with pytest.raises(CheckpointError, match="nmoe.json cannot be read .*; copy the folder again"):
    import_folder(folder, root)


DAMAGED = {
  "a byte": lambda step: flip(next(step.glob("*.distcp")), -9),
  "a file": lambda step: next(step.glob("*.distcp")).unlink(),
  "the manifest": lambda step: (step / "manifest.json").write_text("{"),
  "the metadata": lambda step: (step / ".metadata").unlink(),
  "the step": lambda step: step.rename(step.with_name("moved")),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_imported_weights_are_made_anew_by_the_import_that_the_message_names(
  tmp_path, root, what
):
  folder = folder_of(tmp_path, tiny())
  found = import_folder(folder, root)
  step = root.imported(found.digest) / "step_00000000"
  whole = checkpoint.read(step)
  DAMAGED[what](step)
  with pytest.raises(CheckpointError, match="; run `nmoe import` on the model's folder again$"):
    imported_config(found.config, root)
    checkpoint.verify(step)
  assert import_folder(folder, root).digest == found.digest
  checkpoint.verify(step)
  again = checkpoint.read(step)
  assert again.keys() == whole.keys() and all(torch.equal(again[n], whole[n]) for n in whole)
