"""`nmoe import` of tensors of several types in one folder: no number is rounded on its way in."""

from __future__ import annotations

import json

import pytest
import torch
from labs import whole_experts
from model_configs import tiny
from rich.console import Console
from safetensors.torch import load_file, save_file

from kernels import reference
from nmoe.config import file as configs
from nmoe.model.decoder import Model
from nmoe.model.hf_config import hf_config
from nmoe.model.imports import import_folder
from nmoe.model.names import to_hf
from nmoe.records import checkpoint
from nmoe.records.root import Root
from stages import export, imports
from stages.launch import local as launch
from stages.launch.local import Job, Launcher

pytestmark = pytest.mark.faults
CONFIG = tiny(model__q_lora_rank=24)
ROUTERS = ("model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.e_score_correction_bias")
TENSORS = (
  "model.embed_tokens.weight",
  "model.norm.weight",
  "lm_head.weight",
  "model.layers.1.input_layernorm.weight",
  "model.layers.0.self_attn.kv_a_layernorm.weight",
  "model.layers.0.self_attn.q_a_layernorm.weight",
  "model.layers.2.self_attn.kv_b_proj.weight",
  "model.layers.0.mlp.gate_proj.weight",
  "model.layers.0.mlp.up_proj.weight",
  "model.layers.0.mlp.down_proj.weight",
  "model.layers.1.mlp.shared_experts.up_proj.weight",
  "model.layers.1.mlp.shared_experts.down_proj.weight",
  "model.layers.1.mlp.experts.0.gate_proj.weight",
  "model.layers.1.mlp.experts.5.up_proj.weight",
  "model.layers.2.mlp.experts.7.down_proj.weight",
)


def folder_of(path, odd, dtype, fused=False):
  """A model in bf16, said to be, of which the tensors in `odd` are of another type."""
  model = Model(CONFIG, reference)
  model.init_weights(5)
  generator = torch.Generator().manual_seed(1)
  tensors = {}
  for name, tensor in to_hf(model.state_dict()).items():
    noise = torch.randn(tensor.shape, generator=generator) * 0.1
    tensors[name] = (tensor + noise).to(dtype if name in odd else torch.bfloat16).contiguous()
  if fused:
    tensors = with_fused(tensors, dtype)
  path.mkdir()
  save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
  (path / "config.json").write_text(json.dumps(hf_config(CONFIG, 96, "bfloat16")))
  return path


def with_fused(tensors, dtype):
  """Experts of layer 1 in one tensor each way, those of layer 2 as they are."""
  head = "model.layers.1.mlp.experts"
  gate, up, down = (
    torch.stack([tensors.pop(f"{head}.{e}.{part}_proj.weight") for e in range(8)])
    for part in ("gate", "up", "down")
  )
  more = {f"{head}.gate_up_proj": torch.cat([gate, up], 1), f"{head}.down_proj": down.to(dtype)}
  return tensors | more


def stored(root, found):
  return whole_experts(checkpoint.read(root.imported(found.digest) / "step_00000000"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("odd", TENSORS)
def test_a_tensor_of_another_type_than_its_peers_keeps_its_numbers(tmp_path, odd, dtype):
  root = Root(tmp_path / "root")
  found = import_folder(folder_of(tmp_path / "hf", [odd], dtype), root)
  files, back = load_file(tmp_path / "hf" / "model.safetensors"), to_hf(stored(root, found))
  assert back.keys() == files.keys()
  for name, tensor in files.items():
    assert torch.equal(back[name].double(), tensor.double()), name
  assert found.wide == [odd] and found.config.target.dtype == "fp32"


def test_a_router_is_fp32_in_every_model(tmp_path):
  root = Root(tmp_path / "root")
  found = import_folder(folder_of(tmp_path / "hf", ROUTERS, torch.float32), root)
  files, state = load_file(tmp_path / "hf" / "model.safetensors"), stored(root, found)
  back = to_hf(state)
  assert all(torch.equal(back[name].double(), files[name].double()) for name in files)
  assert found.wide == [] and found.config.target.dtype == "bf16"
  assert state["layers.1.moe.experts.w2"].dtype == torch.bfloat16


def test_fused_experts_of_another_type(tmp_path):
  root = Root(tmp_path / "root")
  found = import_folder(folder_of(tmp_path / "hf", (), torch.float32, fused=True), root)
  files = load_file(tmp_path / "hf" / "model.safetensors")
  wanted = files["model.layers.1.mlp.experts.down_proj"]
  assert torch.equal(stored(root, found)["layers.1.moe.experts.w2"], wanted)
  assert found.wide == ["model.layers.1.mlp.experts.down_proj"]


def test_types_decide_where_config_json_says_nothing(tmp_path):
  """A folder all in fp32 was rounded where config.json had no dtype, or half precision's."""
  for said in ({}, {"torch_dtype": "float16"}, {"dtype": None, "torch_dtype": "bfloat16"}):
    path = tmp_path / str(len(list(tmp_path.iterdir())))
    folder_of(path, TENSORS, torch.float32)
    table = json.loads((path / "config.json").read_text())
    table = {k: v for k, v in table.items() if k not in ("dtype", "torch_dtype")}
    (path / "config.json").write_text(json.dumps(table | said))
    root = Root(tmp_path / "root")
    back = to_hf(stored(root, import_folder(path, root)))
    files = load_file(path / "model.safetensors")
    assert all(torch.equal(back[name].double(), files[name].double()) for name in files)


def test_masters_of_a_run_in_bf16_are_what_was_imported(lab, tmp_path):
  """Its parameters are rounded, their masters are not; the command says how to come there."""
  run = lab.record()
  lab.attempt(run)
  out, console = tmp_path / "hf", Console(record=True, width=300)
  export.run(run, out, None, None, 5.0, "tensors", lab.root, console)
  assert "rounded" not in console.export_text()
  (out / "config.json").write_text((out / "config.json").read_text().replace("float32", "bfloat16"))
  imports.run(out, tmp_path / "made.toml", lab.root, console)
  said = console.export_text()
  assert (
    "tensors of other types than bf16, the first is lm_head.weight: all are stored in fp" in said
  )
  made = configs.load(tmp_path / "made.toml", env={})
  assert made.target.dtype == "fp32"
  rates = {"optim__dense_lr": 0.0, "optim__expert_lr": 0.0, "optim__router_lr": 0.0}
  values = {"model__init": made.model.init, "target__dtype": "bf16", **rates}
  on, pair = lab.record(**values), lab.record(**values, launch__ranks=2, train__micro_batch=4)
  assert lab.attempt(on) == 0
  launched = launch.run(Launcher(lab.root), Job(pair, configs.loads(lab.run(pair).toml)))
  assert launched.poll() == 0, launched.tail()
  before = lab.state(run)
  for after in (lab.state(on), lab.state(pair)):
    masters = [name for name in after if name.endswith(".master")]
    assert any(".experts." in name for name in masters) and "embed.weight.master" in masters
    for name in masters:
      weight = before[name.removesuffix(".master")]
      assert torch.equal(after[name], weight)
      assert torch.equal(after[name.removesuffix(".master")], weight.bfloat16())


def test_an_export_that_rounds_says_so(lab, tmp_path):
  run, console = lab.record(), Console(record=True, width=200)
  lab.attempt(run)
  export.run(run, tmp_path / "hf", None, "bf16", 5.0, "tensors", lab.root, console)
  assert "25 read again, bit-equal to the checkpoint, rounded to bf16" in console.export_text()
