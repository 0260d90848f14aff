"""Folders that say one thing and hold another, or that are not what they seem: refused by name."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from folder_cases import folder_of
from model_configs import YARN, tiny

from nmoe.errors import CheckpointError, ConfigError
from nmoe.model.hf_config import hf_config
from nmoe.model.hf_folder import described_in
from nmoe.model.imports import import_folder
from nmoe.model.safetensors import dequantized
from nmoe.records.root import Root

pytestmark = pytest.mark.faults
CONFIG = tiny()
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
  """A model's folder that is right."""
  return folder_of(tmp_path, CONFIG)


def tell(folder, values, gone=()):
  """Write config.json with these keys changed and those gone."""
  table = hf_config(CONFIG, 96, "float32") | values
  table = {key: value for key, value in table.items() if key not in gone}
  (folder / "config.json").write_text(json.dumps(table))


def refused(folder, kind, message):
  root = Root(folder.parent / "root")
  with pytest.raises(kind, match=message):
    import_folder(folder, root)
  assert not root.path.exists()


KINDS = {
  "awq": {"quant_method": "awq", "bits": 4},
  "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
  "other blocks": {"quant_method": "fp8", "weight_block_size": [64, 64]},
  "no blocks": {"quant_method": "fp8", "weight_block_size": None},
  "a list": ["fp8"],
}


@pytest.mark.parametrize("name", KINDS)
def test_another_quantization_is_refused(folder, name):
  tell(folder, {"quantization_config": KINDS[name]})
  refused(folder, ConfigError, "quantization_config = .*weight_block_size .128, 128.: save the mod")


def test_blocks_of_another_size_had_as_many_scales():
  """Why it is refused: 130 rows are two blocks of 128 and two of 100, but other ones."""
  weight = torch.full((130, 130), 1.0).to(torch.float8_e4m3fn)
  scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
  assert dequantized("w", weight, scale)[110, 0] == 1.0  # of blocks of 100 it would be 3.0


def test_deepseek_s_own_quantization_is_read(folder):
  own = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
  for told in (own, own | {"weight_block_size": [128, 128]}, None):
    tell(folder, {"quantization_config": told})
    assert described_in(folder).unknown == []


def test_rope_of_kinds_of_layers_is_refused(folder):
  """transformers 5 writes one table a kind of layer where layers differ."""
  tell(folder, {"rope_parameters": {"full_attention": YARN}, "rope_scaling": None})
  refused(folder, ConfigError, "full_attention = .* in rope_parameters: all layers of ours are")


def test_rope_as_transformers_5_writes_it(folder):
  tell(folder, {"rope_parameters": YARN}, gone=("rope_theta", "rope_scaling"))
  found = described_in(folder)
  assert found.unknown == [] and found.config.yarn.factor == 4.0
  assert found.config.model.rope_theta == 1e4 and found.config.yarn.original_seq_len == 8


def test_keys_of_attention_that_these_classes_do_not_read_are_listed(folder):
  keys = {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 3, "attn_sink": True}
  tell(folder, keys, gone=("tie_word_embeddings",))
  found = described_in(folder)
  assert found.unknown == sorted(keys) and not found.config.model.tie_embeddings


def edited(folder, edit):
  """Change the header of the weights: `edit` takes its table, and returns that or bytes."""
  path = folder / "model.safetensors"
  data = path.read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  changed = edit(json.loads(data[8 : 8 + length]))
  text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def placed(change):
  """A header whose final norm lies elsewhere."""

  def edit(header):
    header[NORM]["data_offsets"] = [at + change for at in header[NORM]["data_offsets"]]
    return header

  return edit


HEADERS = {
  "overlapping": placed(-8),
  "a hole": placed(8),
  "behind the end": placed(1 << 40),
  "a shape of 2^66": lambda h: h | {NORM: h[NORM] | {"shape": [1 << 62, 16]}},
  "a shape below 0": lambda h: h | {NORM: h[NORM] | {"shape": [-32]}},
  "a type that is none": lambda h: h | {NORM: h[NORM] | {"dtype": "F4"}},
  "brackets": lambda h: b"[" * 200_000,
  "no UTF-8": lambda h: b"\xff\xfe" * 50,
}
FILES = {
  "nothing": b"",
  "a page of the web": b"<!DOCTYPE html><html>Not found</html>",
  "a header of 200 MB": struct.pack("<Q", 200 << 20) + b" " * 100,
  "a header of 2^63": struct.pack("<Q", 1 << 63),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(folder, name):
  edited(folder, HEADERS[name])
  refused(folder, CheckpointError, "model.safetensors cannot be read .*; fetch the folder again")


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_weights(folder, name):
  (folder / "model.safetensors").write_bytes(FILES[name])
  refused(folder, CheckpointError, "model.safetensors cannot be read .*; fetch the folder again")


def test_a_pointer_of_git_lfs_is_said_to_be_one(folder):
  """What `git clone` leaves of a model where Git LFS is not installed."""
  text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
  (folder / "model.safetensors").write_text(text)
  refused(folder, CheckpointError, "it is a pointer: run `git lfs pull` in its folder")


@pytest.mark.parametrize("file", ["/etc/passwd", "..", ".", "", "sub", "../x.safetensors", "a\0b"])
def test_an_index_names_files_of_its_folder_alone(folder, file):
  (folder / "sub").mkdir()
  places = dict.fromkeys([NORM, "lm_head.weight"], file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  refused(folder, CheckpointError, "is no name of a .safetensors file in .*hf; fetch it again")
