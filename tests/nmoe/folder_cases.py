"""HuggingFace folders of a small model, for tests."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from kernels import reference
from nmoe.model.decoder import Model
from nmoe.model.hf_config import hf_config
from nmoe.model.names import to_hf


def model_of(config):
  model = Model(config, reference)
  model.init_weights(5)
  for router in model.routers:
    router.bias.copy_(torch.linspace(-0.1, 0.1, len(router.bias)) * (config.moe.score == "sigmoid"))
  return model


def folder_of(tmp_path, config, change=None, name="hf"):
  """The config's model with random weights, as files; `change` edits the tensors."""
  folder = tmp_path / name
  folder.mkdir()
  tensors = {k: v.clone().contiguous() for k, v in to_hf(model_of(config).state_dict()).items()}
  if config.moe.score == "softmax":
    tensors = {k: v for k, v in tensors.items() if "e_score" not in k}
  tensors = tensors if change is None else change(tensors)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(hf_config(config, 96, "float32")))
  return folder
