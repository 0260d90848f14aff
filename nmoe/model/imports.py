"""A folder of HuggingFace's DeepSeek classes as a configuration and a checkpoint of ours.

Every key of config.json is used, known to change nothing, or listed; what contradicts our model is
refused. Every tensor is accounted for, in both directions. The weights lie in

  {root}/imports/DIGEST/step_00000000/   a checkpoint without an optimizer
  {root}/imports/DIGEST/tokenizer.json   if the folder has one

where DIGEST covers the configuration and each tensor; `[model] init = "import:DIGEST"` begins a run
from them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data import tokenizer
from nmoe.errors import CheckpointError, ConfigError
from nmoe.model.export import check_room
from nmoe.model.names import computed, from_hf, state_shapes
from nmoe.model.safetensors import Folder
from nmoe.records import checkpoint
from nmoe.records.root import Root

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
READ = (
  "model_type q_lora_rank tie_word_embeddings initializer_range rope_theta rope_scaling "
  "rope_parameters max_position_embeddings scoring_func topk_method n_group topk_group hidden_act "
  "attention_bias mlp_bias moe_layer_freq rope_interleave num_key_value_heads torch_dtype dtype "
  "eos_token_id"
).split()
HARMLESS = (  # of running, serving and other training than ours
  "architectures auto_map transformers_version bos_token_id pad_token_id use_cache head_dim "
  "attention_dropout num_nextn_predict_layers moe_router_dtype ep_size pretraining_tp seq_aux "
  "aux_loss_alpha quantization_config qk_head_dim output_router_logits unk_token_id _name_or_path"
).split()
NEEDED = {  # key -> its only value; absent: the same
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "moe_layer_freq": 1,
  "rope_interleave": True,
}
HARMONY = (tokenizer.O200K_VOCAB, tokenizer.O200K_EOT)


@dataclass(frozen=True)
class Imported:
  """What became of a folder. unknown: keys that were not understood; left: tensors not needed."""

  config: Config
  digest: str
  unknown: list[str]
  left: list[str]


def import_folder(folder: Path, root: Root) -> Imported:
  """Read, check and store a folder's model; it is found if it is there already.

  Raises ConfigError or CheckpointError naming the key or tensor that does not fit.
  """
  table = read_config(folder)
  values = values_of(table, str(folder / "config.json"))
  config = configs.loads(_toml(values, folder, table), str(folder / "config.json"))
  without_bias = table["model_type"] == "deepseek_v2"
  with Folder(folder) as files:
    left, described = sorted(computed(files, config)), files.described()
    deque(from_hf(described, config, without_bias), maxlen=0)  # names and shapes, read in no time
    config = _store(folder, root, config, from_hf(files, config, without_bias))
  unknown = sorted(table.keys() - REQUIRED.keys() - {*READ, *HARMLESS})
  return Imported(config, config.model.init.removeprefix("import:"), unknown, left)


def read_config(folder: Path) -> dict[str, Any]:
  """config.json of a model that we can be: ConfigError for another architecture."""
  path = folder / "config.json"
  try:
    table = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ConfigError(f"{path} cannot be read ({error}); name a model's folder") from error
  kind = table.get("model_type")
  if kind not in TYPES:
    raise ConfigError(f"{path}: model_type = {kind!r} is another architecture than {[*TYPES]}")
  return table


def values_of(table: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Our dotted keys from config.json. ConfigError for what is missing or contradicts our model."""
  missing = [key for key in REQUIRED if key not in table]
  if missing:
    raise ConfigError(
      f"{where}: {', '.join(missing)} missing; the class's defaults are not guessed"
    )
  for key, value in NEEDED.items():
    if table.get(key, value) != value:
      raise ConfigError(f"{where}: {key} = {table[key]!r}, our model has {value!r}")
  heads = table["num_attention_heads"]
  if table.get("num_key_value_heads", heads) != heads:
    raise ConfigError(
      f"{where}: num_key_value_heads = {table['num_key_value_heads']!r}, not {heads}"
    )
  values = {ours: table[key] for key, ours in REQUIRED.items()}
  for key, hint in (("model.norm_eps", float), ("moe.route_scale", float)):
    values[key] = hint(values[key])
  values["model.q_lora_rank"] = table.get("q_lora_rank") or 0
  values["model.tie_embeddings"] = table.get("tie_word_embeddings", False)
  values["model.init_std"] = float(table.get("initializer_range", 0.006))
  dtype = table.get("dtype", table.get("torch_dtype"))
  values["target.dtype"] = "fp32" if dtype == "float32" else "bf16"
  return values | _routing(table, where) | _rope(table, where)


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


def _rope(table: Mapping[str, Any], where: str) -> dict[str, Any]:
  told = table.get("rope_parameters") or table.get("rope_scaling") or {}
  theta = told.get("rope_theta", table.get("rope_theta"))
  if theta is None:
    raise ConfigError(f"{where}: rope_theta is missing; the class's default is not guessed")
  values: dict[str, Any] = {"model.rope_theta": float(theta)}
  kind = told.get("rope_type", told.get("type", "default"))
  if kind == "default":
    return values
  scales = (told.get("mscale", 1.0), told.get("mscale_all_dim", 0.0))
  plain = told.get("attention_factor") == 1.0
  if kind != "yarn" or not (scales[0] == scales[1] and (scales[0] or plain)):
    raise ConfigError(
      f"{where}: RoPE of type {kind!r} with mscale {scales[0]} and mscale_all_dim {scales[1]}; "
      "ours is 'default', or 'yarn' with both equal"
    )
  return values | {
    "yarn.factor": float(told["factor"]),
    "yarn.original_seq_len": told["original_max_position_embeddings"],
    "yarn.beta_fast": float(told.get("beta_fast", 32)),
    "yarn.beta_slow": float(told.get("beta_slow", 1)),
    "yarn.mscale_all_dim": float(scales[1]),
  }


def _toml(values: Mapping[str, Any], folder: Path, table: Mapping[str, Any]) -> str:
  """A whole configuration: the model's keys, and those of a run at their least."""
  rest: dict[str, Any] = {
    "experiment.name": folder.resolve().name,
    "experiment.statement": f"Training goes on from {folder.resolve().name}.",
    "target.arch": "cpu",
    "data.mixture": "mixture.toml",
    "data.tokenizer": _tokenizer(folder, table),
    "data.seq_len": min(4096, table.get("max_position_embeddings", 4096)),
    "optim.dense_lr": 1e-5,
    "optim.router_lr": 1e-5,
    "optim.expert_lr": 1e-5,
    "train.micro_batch": 1,
  }
  rest["schedule.batch_tokens"] = rest["schedule.total_tokens"] = rest["data.seq_len"]
  sections: dict[str, list[str]] = {}
  for key, value in (rest | dict(values)).items():
    section, name = key.split(".")
    sections.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
  return "\n".join(f"[{s}]\n" + "\n".join(lines) + "\n" for s, lines in sections.items())


def _tokenizer(folder: Path, table: Mapping[str, Any]) -> str:
  shape = (table["vocab_size"], table.get("eos_token_id"))
  if shape == HARMONY:
    return "o200k_harmony"
  if shape == (257, 256):
    return "byte"
  file = folder.resolve() / "tokenizer.json"
  return f"hf:{file}" if file.is_file() else "byte"


def _stored(name: str, tensor: Tensor, fp32: bool) -> Tensor:
  """In the dtype of the model's parameter."""
  return tensor.to(torch.float32 if fp32 or ".router." in name else torch.bfloat16)


def _store(folder: Path, root: Root, config: Config, state: Iterator[tuple[str, Tensor]]) -> Config:
  """Write the weights as they come; the configuration that begins from them."""
  told, fp32 = hashlib.sha256(configs.to_toml(config).encode()), config.target.dtype == "fp32"
  imports = root.imports

  def hashed() -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state:
      weight = _stored(name, tensor, fp32).contiguous()
      told.update(name.encode())
      told.update(weight.view(-1).view(torch.uint8).numpy())
      yield name, weight

  def named() -> Config:
    return configs.changed(config, {"model.init": f"import:{told.hexdigest()[:16]}"})

  def meta() -> dict[str, Any]:
    return {"run": f"import of {folder.resolve().name}", "config": configs.to_toml(named())}

  partial = None
  try:
    imports.mkdir(parents=True, exist_ok=True)
    check_room(imports, state_bytes(config))
    partial = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=imports))
    checkpoint.save_streamed(partial, 0, hashed(), meta)
    if (folder / "tokenizer.json").is_file():
      shutil.copy(folder / "tokenizer.json", partial)
    partial.chmod(0o755)
    final = root.imported(named().model.init.removeprefix("import:"))
    if not final.exists():
      partial.rename(final)
  except OSError as error:
    raise CheckpointError(
      f"{imports} cannot be written ({error}); make room or name another root, then run again"
    ) from error
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)
  return named()


def state_bytes(config: Config) -> int:
  """Of all weights as they are stored."""
  shapes, wide = state_shapes(config), config.target.dtype == "fp32"
  return sum(
    torch.Size(shape).numel() * (4 if wide or ".router." in name else 2)
    for name, shape in shapes.items()
  )
