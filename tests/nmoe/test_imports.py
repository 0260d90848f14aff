"""`nmoe import`: folders as transformers writes them, back to bits, and on into training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from folder_cases import folder_of, model_of
from labs import same_bits, whole_experts
from model_configs import YARN, tiny
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.data.tokenizer import get
from nmoe.errors import CheckpointError
from nmoe.model.hf_folder import described_in, values_of
from nmoe.model.imports import import_folder
from nmoe.model.safetensors import BLOCK, dequantized
from nmoe.records import checkpoint
from nmoe.records.root import Root
from stages import export, imports
from stages.admission import admit
from stages.launch import local as launch
from stages.launch.local import Job, Launcher

V2 = {"moe__score": "softmax", "moe__normalize": False, "moe__bias_update_rate": 0.0}


@pytest.fixture
def root(tmp_path):
  return Root(tmp_path / "root")


def state_at(root, digest):
  return whole_experts(checkpoint.read(root.imported(digest) / "step_00000000"))


def same(state, model):
  wanted = model.state_dict()
  return state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)


SHAPES = {
  "default": {},
  "q_lora, YaRN, groups": {
    "model__q_lora_rank": 24,
    "yarn__factor": 4.0,
    "yarn__original_seq_len": 8,
    "yarn__mscale_all_dim": 0.707,
    "moe__num_groups": 4,
    "moe__topk_groups": 2,
  },
  "tied": {"model__tie_embeddings": True},
  "deepseek_v2 without bias": V2,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_becomes_the_same_model(tmp_path, root, name):
  config = tiny(**SHAPES[name])
  found = import_folder(folder_of(tmp_path, config), root)
  assert not found.unknown and not found.left
  assert same(state_at(root, found.digest), model_of(config))
  for section in ("model", "moe", "yarn"):
    mine, theirs = getattr(config, section), getattr(found.config, section)
    free = {"init", "balance_alpha", "embed_std", "beta_fast", "beta_slow", "original_seq_len"}
    free |= {"mscale_all_dim"} if config.yarn.factor == 1 else set()
    differing = {k for k in vars(mine) if getattr(mine, k) != getattr(theirs, k)}
    assert differing <= free
  again = import_folder(tmp_path / "hf", root)
  assert again.digest == found.digest


def test_files_of_transformers_default_and_fused(tmp_path, root):
  """What save_pretrained writes: one matrix an expert, or one tensor for all."""
  config = tiny()
  source = folder_of(tmp_path, config)
  theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
  for name, options in {"default": {}, "fused": {"save_original_format": False}}.items():
    theirs.save_pretrained(tmp_path / name, **options)
    (tmp_path / name / "config.json").write_text((source / "config.json").read_text())
    found = import_folder(tmp_path / name, root)
    assert same(state_at(root, found.digest), model_of(config))


def test_frequencies_and_layers_of_multi_token_prediction_are_listed(tmp_path, root):
  more = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.3.eh_proj.weight": torch.ones(2, 2),
    "model.layers.3.mlp.experts.0.up_proj.weight": torch.ones(2, 2),
    "model.layers.4.eh_proj.weight": torch.ones(2, 2),
  }
  found = import_folder(folder_of(tmp_path, tiny(), lambda tensors: tensors | more), root)
  assert found.left == sorted(more)
  assert same(state_at(root, found.digest), model_of(tiny()))


def test_fp8_blocks_with_a_ragged_edge(tmp_path, root):
  """Scales per 128 x 128 block, of which the last is cut: 300 rows and 200 columns."""
  torch.manual_seed(0)
  weight, scale = torch.randn(300, 200), torch.rand(3, 2) + 0.5
  coded = weight.to(torch.float8_e4m3fn)
  wanted = torch.empty(300, 200)
  for i in range(300):
    for j in range(0, 200, BLOCK):
      end = min(j + BLOCK, 200)
      wanted[i, j:end] = coded[i, j:end].float() * scale[i // BLOCK, j // BLOCK]
  assert torch.equal(dequantized("w", coded, scale), wanted.bfloat16())
  with pytest.raises(
    CheckpointError, match=r"w: an fp8 weight \(300, 200\) has scales \(2, 2\), \(3, 2\) are needed"
  ):
    dequantized("w", coded, scale[:2])

  def quantized(tensors):
    for name in [n for n in tensors if "_proj.weight" in n]:
      scale = torch.rand([-(-s // BLOCK) for s in tensors[name].shape]) + 0.5
      tensors[name] = tensors[name].to(torch.float8_e4m3fn)
      tensors[name + "_scale_inv"] = scale
    return tensors

  config = tiny(model__dense_dim=200)
  folder = folder_of(tmp_path, config, quantized)
  found = import_folder(folder, root)
  files = load_file(folder / "model.safetensors")
  name = "model.layers.0.mlp.gate_proj.weight"
  gate = state_at(root, found.digest)["layers.0.mlp.w13"][0::2]
  assert torch.equal(gate, dequantized(name, files[name], files[name + "_scale_inv"]).float())


def test_a_folder_may_have_any_name_that_people_give(tmp_path):
  name = 'moon 🌙 "${HOME}" \\x'
  folder = folder_of(tmp_path, tiny(), name=name)
  assert described_in(folder).config.experiment.name == name


def test_what_is_not_understood_of_rope_is_listed(tmp_path):
  folder = folder_of(tmp_path, tiny())
  table = json.loads((folder / "config.json").read_text())
  table |= {"rope_parameters": YARN | {"ntk": 3}, "rope_scaling": None, "swiglu_limit": 7}
  (folder / "config.json").write_text(json.dumps(table))
  assert described_in(folder).unknown == ["rope_parameters.ntk", "swiglu_limit"]


MOONLIGHT = {  # as its own file has it, in the names of an older transformers
  "model_type": "deepseek_v3",
  "hidden_size": 2048,
  "num_hidden_layers": 27,
  "first_k_dense_replace": 1,
  "intermediate_size": 11264,
  "moe_intermediate_size": 1408,
  "num_attention_heads": 16,
  "num_key_value_heads": 16,
  "q_lora_rank": None,
  "kv_lora_rank": 512,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "v_head_dim": 128,
  "n_routed_experts": 64,
  "num_experts_per_tok": 6,
  "n_shared_experts": 2,
  "n_group": 1,
  "topk_group": 1,
  "scoring_func": "sigmoid",
  "topk_method": "noaux_tc",
  "norm_topk_prob": True,
  "routed_scaling_factor": 2.446,
  "rms_norm_eps": 1e-5,
  "rope_theta": 50000.0,
  "rope_scaling": None,
  "vocab_size": 163840,
  "max_position_embeddings": 8192,
  "torch_dtype": "bfloat16",
}


def test_moonlight_s_configuration():
  values = values_of(MOONLIGHT, "config.json")
  assert values["model.rope_theta"] == 50000.0 and values["model.q_lora_rank"] == 0
  assert values["moe.num_shared"] == 2 and values["moe.route_scale"] == 2.446
  assert values["target.dtype"] == "bf16" and "yarn.factor" not in values
  lite = {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"}
  lite |= {"norm_topk_prob": False, "rope_theta": 10000}
  lite["rope_scaling"] = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
  lite["rope_scaling"] |= {"mscale": 0.707, "mscale_all_dim": 0.707}
  values = values_of(MOONLIGHT | lite, "config.json")
  assert values["moe.score"] == "softmax" and values["moe.bias_update_rate"] == 0
  assert values["yarn.factor"] == 40 and values["yarn.mscale_all_dim"] == 0.707


def test_an_exported_run_is_imported_and_trained_on(lab, tmp_path):
  """The bits survive, and the first step of the new run is at the old one's loss."""
  run = lab.record()
  lab.attempt(run)
  out = tmp_path / "hf"
  export.run(run, out, None, None, 5.0, "tensors", lab.root, Console(quiet=True))
  console = Console(record=True, width=200)
  imports.run(out, tmp_path / "made.toml", lab.root, console)
  made = configs.load(tmp_path / "made.toml", env={})
  digest = made.model.init.removeprefix("import:")
  said = console.export_text()
  assert made.data.tokenizer == "byte" and digest in said
  assert made.run.root == str(lab.root)  # where the weights are, whatever root it is run from
  assert "made.toml: set [data] mixture, [optim] and [schedule], then train it" in said
  state = lab.state(run)
  weights = {n: x for n, x in state.items() if checkpoint.kind(n) in ("weights", "router biases")}
  back = checkpoint.read(Root(lab.root).imported(digest) / "step_00000000")
  assert back.keys() == weights.keys()
  assert all(torch.equal(back[name], weights[name]) for name in back)
  on = lab.record(
    model__init=made.model.init,
    optim__dense_lr=0.0,
    optim__expert_lr=0.0,
    optim__router_lr=0.0,
    moe__bias_update_rate=0.0,
  )
  assert lab.attempt(on) == 0
  before, after = lab.run(run).results["val/bpb"], lab.run(on).results["val/bpb"]
  assert after == before
  assert "import:" in configs.to_toml(changed(lab.config, {"model.init": made.model.init}))
  other = lab.record(model__init=made.model.init, moe__top_k=3)
  with pytest.raises(CheckpointError, match="weights of another model: moe.top_k: 2, now 3"):
    lab.attempt(other)
  with pytest.raises(CheckpointError, match="moe.top_k: 2, now 3; set these keys as they were"):
    admit(configs.loads(lab.run(other).toml), Root(lab.root))  # before it is recorded
  lost = lab.record(model__init="import:0123")
  with pytest.raises(CheckpointError, match="0123 is not there; run `nmoe import`"):
    lab.attempt(lost)


def test_what_two_ranks_wrote_survives_export_and_import(lab, tmp_path):
  """Each wrote its experts; every tensor comes back with its bits."""
  run = lab.record(launch__ranks=2, train__micro_batch=4)
  launched = launch.run(Launcher(lab.root), Job(run, configs.loads(lab.run(run).toml)))
  assert launched.poll() == 0, launched.tail()
  out = tmp_path / "hf"
  export.run(run, out, None, None, 5.0, "tensors", lab.root, Console(quiet=True))
  imports.run(out, tmp_path / "made.toml", lab.root, Console(quiet=True))
  digest = configs.load(tmp_path / "made.toml", env={}).model.init.removeprefix("import:")
  state = lab.state(run)
  weights = {n: x for n, x in state.items() if checkpoint.kind(n) in ("weights", "router biases")}
  back = checkpoint.read(Root(lab.root).imported(digest) / "step_00000000")
  assert len({f.name[:4] for f in (lab.checkpoints(run) / "step_00000012").glob("*.distcp")}) == 2
  assert same_bits(back, weights)


def test_a_full_disk_leaves_nothing_of_an_import(lab, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  run = lab.record()
  lab.attempt(run)
  out = tmp_path / "hf"
  export.run(run, out, None, None, 5.0, "tensors", lab.root, Console(quiet=True))
  monkeypatch.setattr(checkpoint, "_seal", full)
  with pytest.raises(CheckpointError, match="No space left on device; .* GiB free.; make room"):
    imports.run(out, tmp_path / "made.toml", lab.root, Console(quiet=True))
  assert not (tmp_path / "made.toml").exists() and not list(Root(lab.root).imports.iterdir())


def test_a_folder_s_tokenizer_comes_along(lab, tmp_path):
  """hf:PATH gives the ids of the byte tokenizer that the export wrote."""
  run = lab.record()
  lab.attempt(run)
  out = tmp_path / "hf"
  export.run(run, out, None, None, 5.0, "tensors", lab.root, Console(quiet=True))
  file = out / "tokenizer.json"
  assert get(f"hf:{file}").encode("a b").tolist() == [97, 32, 98]
  table = json.loads((out / "config.json").read_text()) | {"eos_token_id": 255}
  (out / "config.json").write_text(json.dumps(table))
  found = import_folder(out, Root(lab.root))
  assert found.config.data.tokenizer == f"hf:{file}"
  assert (Root(lab.root).imported(found.digest) / "tokenizer.json").is_file()
  step = Root(lab.root).imported(found.digest) / "step_00000000"
  export.run(str(step), tmp_path / "on", None, None, 5.0, "full", lab.root, Console(quiet=True))
  assert AutoTokenizer.from_pretrained(tmp_path / "on").eos_token_id == 256
  table = json.loads(file.read_text())
  table["added_tokens"].append(table["added_tokens"][0] | {"id": 300, "content": "<|more|>"})
  file.write_text(json.dumps(table))
  get.cache_clear()
  console = Console(record=True, width=300)
  imports.run(out, tmp_path / "more.toml", lab.root, console)
  said = console.export_text()
  assert "is not for training: it has 258 ids, the model 257 rows; take those beyond out" in said
  shutil.rmtree(Root(lab.root).imported(found.digest))
  file.unlink()
  assert import_folder(out, Root(lab.root)).config.data.tokenizer == "byte"
