"""Configurations small enough to build, train and compare in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from nmoe.config.file import changed, loads
from nmoe.config.sections import Config

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [  # what describes a run, and neither a mixture nor a sweep
  path
  for path in sorted(CONFIGS.glob("*/*.toml"))
  if not tomli.loads(path.read_text()).keys() & {"source", "sweep", "mix"}
]

YARN = {  # rope_scaling of a HuggingFace configuration
  "rope_type": "yarn",
  "rope_theta": 1e4,
  "factor": 4.0,
  "original_max_position_embeddings": 8,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
}

TINY = """
[experiment]
name = "tiny"
statement = "none"
[target]
arch = "cpu"
dtype = "fp32"
[model]
vocab_size = 97
dim = 32
num_layers = 3
num_dense_layers = 1
dense_dim = 48
num_heads = 4
kv_lora_rank = 16
qk_nope_dim = 8
qk_rope_dim = 8
v_dim = 12
init_std = 0.1
[moe]
num_experts = 8
top_k = 3
num_shared = 2
expert_dim = 20
route_scale = 2.5
balance_alpha = 0.01
[data]
mixture = "none.toml"
tokenizer = "byte"
seq_len = 24
[optim]
dense_lr = 1e-3
router_lr = 1e-3
expert_lr = 1e-3
[schedule]
total_tokens = 4800
batch_tokens = 48
[train]
micro_batch = 2
loss_chunk = 20
"""


def tiny(**values: Any) -> Config:
  """The tiny configuration with dotted keys replaced, "." written "__": tiny(moe__top_k=2)."""
  config = loads(TINY, env={})
  return changed(config, {key.replace("__", "."): value for key, value in values.items()})
