"""What a HuggingFace folder says of its model: config.json as a configuration of ours, and which
files hold the weights.

Every key of config.json is used, known to change nothing, or listed; what contradicts our model is
refused. It needs no torch, so that what is refused is so at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data import tokenizer
from nmoe.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES = {"deepseek_v3": "sigmoid", "kimi_k2": "sigmoid", "deepseek_v2": "softmax"}
REQUIRED = {  # key -> ours, of the same meaning
  "vocab_size": "model.vocab_size",
  "hidden_size": "model.dim",
  "num_hidden_layers": "model.num_layers",
  "first_k_dense_replace": "model.num_dense_layers",
  "intermediate_size": "model.dense_dim",
  "num_attention_heads": "model.num_heads",
  "kv_lora_rank": "model.kv_lora_rank",
  "qk_nope_head_dim": "model.qk_nope_dim",
  "qk_rope_head_dim": "model.qk_rope_dim",
  "v_head_dim": "model.v_dim",
  "rms_norm_eps": "model.norm_eps",
  "n_routed_experts": "moe.num_experts",
  "num_experts_per_tok": "moe.top_k",
  "n_shared_experts": "moe.num_shared",
  "moe_intermediate_size": "moe.expert_dim",
  "norm_topk_prob": "moe.normalize",
  "routed_scaling_factor": "moe.route_scale",
}
THEIRS = {  # ours -> key, by which whoever has a config.json knows it
  **{ours: key for key, ours in REQUIRED.items()},
  "model.q_lora_rank": "q_lora_rank",
  "model.tie_embeddings": "tie_word_embeddings",
  "model.init_std": "initializer_range",
  "model.rope_theta": "rope_theta",
  "yarn.factor": "factor",
  "yarn.original_seq_len": "original_max_position_embeddings",
  "yarn.beta_fast": "beta_fast",
  "yarn.beta_slow": "beta_slow",
  "yarn.mscale_all_dim": "mscale_all_dim",
  "moe.score": "scoring_func",
  "moe.num_groups": "n_group",
  "moe.topk_groups": "topk_group",
  "data.seq_len": "max_position_embeddings",
}
READ = (
  "model_type q_lora_rank tie_word_embeddings initializer_range rope_theta rope_scaling "
  "rope_parameters max_position_embeddings scoring_func topk_method n_group topk_group hidden_act "
  "attention_bias mlp_bias moe_layer_freq rope_interleave num_key_value_heads torch_dtype dtype "
  "quantization_config "
  "eos_token_id partial_rotary_factor original_max_position_embeddings"
).split()
ROPE = (
  "rope_type rope_theta factor original_max_position_embeddings mscale mscale_all_dim beta_fast "
  "beta_slow attention_factor partial_rotary_factor truncate"
).split()
HARMLESS = (  # of running, serving and other training than ours
  "architectures auto_map transformers_version bos_token_id pad_token_id use_cache head_dim "
  "attention_dropout num_nextn_predict_layers moe_router_dtype ep_size pretraining_tp seq_aux "
  "aux_loss_alpha qk_head_dim output_router_logits unk_token_id _name_or_path"
).split()
NEEDED = {  # key -> its only value; absent: the same
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "moe_layer_freq": 1,
  "rope_interleave": True,
}
BLOCK = 128  # rows and columns of one scale of DeepSeek's fp8 weights
ROPE_NEEDED = {"partial_rotary_factor": 1, "truncate": True}
HARMONY = (tokenizer.O200K_VOCAB, tokenizer.O200K_EOT)
SEQ_LEN = 4096  # of a run that goes on, or what the model was made for
_ALONE = {ours.split(".")[1]: key for ours, key in THEIRS.items() if "_" in ours.split(".")[1]}
_NAMES = THEIRS | _ALONE  # rules name the other key of two without its section
_NAME = re.compile(rf"'[^']*'|\"[^\"]*\"|\b(?:{'|'.join(map(re.escape, _NAMES))})\b")


@dataclass(frozen=True)
class Described:
  """What a folder says. without_bias: it has no selection biases; unknown: keys not understood."""

  config: Config
  without_bias: bool
  unknown: list[str]


def described_in(folder: Path) -> Described:
  """Read config.json and find the files of the weights.

  ConfigError naming the key that does not fit, CheckpointError for a file that is not there.
  """
  table = read_config(folder)
  where = str(folder / "config.json")
  text = _toml(values_of(table, where), folder, table, where)
  try:
    config = configs.loads(text, where)
  except ConfigError as error:
    raise ConfigError(where + _in_their_words(str(error).removeprefix(where))) from error
  weight_map(folder)
  of_rope = {f"rope_parameters.{key}" for key in _rope_told(table, where).keys() - set(ROPE)}
  unknown = sorted(of_rope | table.keys() - REQUIRED.keys() - {*READ, *HARMLESS})
  return Described(config, table["model_type"] == "deepseek_v2", unknown)


def _in_their_words(message: str) -> str:
  """A message about keys of ours as one about config.json's; what it quotes stays."""
  return _NAME.sub(lambda name: _NAMES.get(name[0], name[0]), message)


def weight_map(folder: Path) -> dict[str, str] | None:
  """The index's tensor -> file, or None where one file holds all. CheckpointError if one is not
  there, or the index is none.
  """
  index = folder / INDEX
  if not index.is_file():
    if not (folder / SINGLE).is_file():
      raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}; is it a model's?")
    return None
  try:
    found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise CheckpointError(f"{index} cannot be read ({error!r}); fetch the folder again") from error
  if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
    raise CheckpointError(f"{index}: weight_map must name a file for each tensor; fetch it again")
  for file in sorted(set(found.values())):
    if file != Path(file).name or not file.endswith(".safetensors") or len(file) > 200:
      raise CheckpointError(
        f"{index}: {file!r:.80} is no name of a .safetensors file in {folder}; fetch it again"
      )
    if not (folder / file).is_file():
      raise CheckpointError(f"{folder / file} is not there; fetch the folder again")
  return found


def read_config(folder: Path) -> dict[str, Any]:
  """config.json of a model that we can be: ConfigError for another architecture."""
  path = folder / "config.json"
  try:
    table = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(f"{path} cannot be read ({error}); name a model's folder") from error
  if not isinstance(table, dict):
    raise ConfigError(f"{path} must be a table of keys, not {table!r:.60}; name a model's folder")
  kind = table.get("model_type")
  if not isinstance(kind, str) or kind not in TYPES:
    raise ConfigError(f"{path}: model_type = {kind!r} is another architecture than {[*TYPES]}")
  return table


def values_of(table: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Our dotted keys from config.json. ConfigError for what is missing or contradicts our model."""
  missing = [key for key in REQUIRED if table.get(key) is None]
  if missing:
    raise ConfigError(
      f"{where}: {', '.join(missing)} missing; the class's defaults are not guessed"
    )
  for key, value in NEEDED.items():
    if table.get(key, value) != value:
      raise ConfigError(f"{where}: {key} = {table[key]!r}, our model has {value!r}")
  heads = table["num_attention_heads"]
  if table.get("num_key_value_heads") not in (None, heads):
    raise ConfigError(
      f"{where}: num_key_value_heads = {table['num_key_value_heads']!r}, not {heads!r} as "
      "num_attention_heads"
    )
  _check_quantization(table.get("quantization_config") or {}, where)
  values = {ours: table[key] for key, ours in REQUIRED.items()}
  for key in ("rms_norm_eps", "routed_scaling_factor"):
    values[REQUIRED[key]] = _number(where, key, table[key])
  values["model.q_lora_rank"] = table.get("q_lora_rank") or 0
  tied = table.get("tie_word_embeddings")
  values["model.tie_embeddings"] = False if tied is None else tied
  values["model.init_std"] = _number(
    where, "initializer_range", table.get("initializer_range", 0.006)
  )
  dtype = table.get("dtype", table.get("torch_dtype"))
  values["target.dtype"] = "fp32" if dtype == "float32" else "bf16"
  return values | _routing(table, where) | _rope(table, where)


def _check_quantization(told: Any, where: str) -> None:
  """ConfigError but for DeepSeek's own kind: other scales lie otherwise, in tensors alike."""
  blocks = [BLOCK, BLOCK]
  known = isinstance(told, dict) and told.get("quant_method") == "fp8"
  if told and not (known and told.get("weight_block_size", blocks) == blocks):
    raise ConfigError(
      f"{where}: quantization_config = {told!r:.120}; plain weights are read, and those of "
      f"quant_method 'fp8' with weight_block_size {blocks}: save the model dequantized"
    )


def _routing(table: Mapping[str, Any], where: str) -> dict[str, Any]:
  kind = table["model_type"]
  score = table.get("scoring_func", TYPES[kind])
  method = table.get("topk_method", "greedy" if kind == "deepseek_v2" else "noaux_tc")
  if kind == "deepseek_v2" and (
    method != "greedy" or score != "softmax" or table["norm_topk_prob"]
  ):
    raise ConfigError(
      f"{where}: a deepseek_v2 with topk_method {method!r}, scoring_func {score!r} and "
      f"norm_topk_prob {table['norm_topk_prob']!r}; ours is 'greedy', 'softmax' and False"
    )
  if kind != "deepseek_v2" and (method != "noaux_tc" or score != "sigmoid"):
    raise ConfigError(
      f"{where}: a {kind} with topk_method {method!r} and scoring_func {score!r}; ours is "
      "'noaux_tc' and 'sigmoid'"
    )
  if kind == "deepseek_v2":
    return {"moe.score": score, "moe.bias_update_rate": 0.0}
  groups = {
    "moe.num_groups": table.get("n_group") or 1,
    "moe.topk_groups": table.get("topk_group") or 1,
  }
  return {"moe.score": score, **groups}


def _rope_told(table: Mapping[str, Any], where: str) -> dict[str, Any]:
  """RoPE's parameters from the places where they may stand. ConfigError where two contradict."""
  beside = {key: table.get(key) for key in ROPE if key in READ}
  places = {"rope_parameters": table.get("rope_parameters") or {}}
  places |= {"rope_scaling": table.get("rope_scaling") or {}, "the top level": beside}
  told: dict[str, Any] = {}
  for place, parameters in places.items():
    if not isinstance(parameters, dict):
      raise ConfigError(f"{where}: RoPE's parameters must be a table, not {parameters!r:.60}")
    for key, value in parameters.items():
      if isinstance(value, dict):
        raise ConfigError(
          f"{where}: {key} = {value!r:.60} in {place}: all layers of ours are alike"
        )
      name = "rope_type" if key == "type" else key
      if value is not None and told.setdefault(name, value) != value:
        raise ConfigError(
          f"{where}: {name} = {value!r:.60} in {place}, but {told[name]!r:.60} elsewhere"
        )
  return told


def _rope(table: Mapping[str, Any], where: str) -> dict[str, Any]:
  told = _rope_told(table, where)
  for key, value in ROPE_NEEDED.items():
    if told.get(key, value) != value:
      raise ConfigError(f"{where}: RoPE's {key} = {told[key]!r:.60}, our model has {value!r}")
  if "rope_theta" not in told:
    raise ConfigError(f"{where}: rope_theta is missing; the class's default is not guessed")
  values = {"model.rope_theta": _number(where, "rope_theta", told["rope_theta"])}
  kind = told.get("rope_type", "default")
  if kind == "default":
    return values
  scales = (told.get("mscale", 1.0), told.get("mscale_all_dim", 0.0))
  factor = told.get("attention_factor", 1.0 if scales[0] else None)  # of cos and sin
  if kind != "yarn" or scales[0] != scales[1] or factor != 1.0:
    raise ConfigError(
      f"{where}: RoPE of type {kind!r:.60} with mscale {scales[0]!r} and mscale_all_dim "
      f"{scales[1]!r}, attention_factor {factor!r}; ours is 'default', or 'yarn' with both equal "
      "and a factor of 1.0"
    )
  for key in ("factor", "original_max_position_embeddings"):
    if key not in told:
      raise ConfigError(f"{where}: YaRN's {key} is missing; the class's default is not guessed")
  numbers = {"factor": told["factor"], "mscale_all_dim": scales[1]}
  numbers |= {key: told.get(key, usual) for key, usual in (("beta_fast", 32), ("beta_slow", 1))}
  values["yarn.original_seq_len"] = told["original_max_position_embeddings"]
  return values | {f"yarn.{key}": _number(where, key, value) for key, value in numbers.items()}


def _number(where: str, key: str, value: Any) -> float:
  if type(value) not in (int, float) or not math.isfinite(value):
    raise ConfigError(f"{where}: {key} = {value!r} must be a finite number")
  return float(value)


def _toml(values: Mapping[str, Any], folder: Path, table: Mapping[str, Any], where: str) -> str:
  """A whole configuration: the model's keys, and those of a run at their least."""
  longest = table.get("max_position_embeddings", SEQ_LEN)
  if type(longest) is not int:
    raise ConfigError(f"{where}: max_position_embeddings = {longest!r} must be a whole number")
  rest: dict[str, Any] = {
    "experiment.name": folder.resolve().name,
    "experiment.statement": f"Training goes on from {folder.resolve().name}.",
    "target.arch": "cpu",
    "data.mixture": "mixture.toml",
    "data.tokenizer": _tokenizer(folder, table),
    "data.seq_len": min(SEQ_LEN, longest),
    "optim.dense_lr": 1e-5,
    "optim.router_lr": 1e-5,
    "optim.expert_lr": 1e-5,
    "train.micro_batch": 1,
  }
  rest["schedule.batch_tokens"] = rest["schedule.total_tokens"] = rest["data.seq_len"]
  sections: dict[str, list[str]] = {}
  for key, value in (rest | dict(values)).items():
    if not isinstance(value, (int, float, str)):
      raise ConfigError(f"{where}: {THEIRS[key]} = {value!r:.60} must be one number or word")
    section, name = key.split(".")
    sections.setdefault(section, []).append(f"{name} = {configs.toml_value(value)}")
  return "\n".join(f"[{s}]\n" + "\n".join(lines) + "\n" for s, lines in sections.items())


def _tokenizer(folder: Path, table: Mapping[str, Any]) -> str:
  shape = (table["vocab_size"], table.get("eos_token_id"))
  if shape == HARMONY:
    return "o200k_harmony"
  if shape == (257, 256):
    return "byte"
  file = folder.resolve() / "tokenizer.json"
  return f"hf:{file}" if file.is_file() else "byte"
