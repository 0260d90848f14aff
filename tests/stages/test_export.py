"""`nmoe export` end to end: a run that trained, its folder, and what transformers makes of it."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from contextlib import closing
from pathlib import Path

import pytest
import torch
from labs import whole_experts
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from nmoe.errors import CheckpointError, ConfigError
from nmoe.model.export import Source, compare_tensors, unfinished, write_folder
from nmoe.model.names import from_hf
from nmoe.model.safetensors import Folder, ShardWriter
from nmoe.records import checkpoint
from nmoe.records.reader import Reader
from stages import export
from stages.checkpoints import exportable, step_folder


def exported(lab, out, level=None, dtype=None, shard_gb=5.0, **values):
  """The run, its source, and what the command said."""
  run = lab.record(**values)
  assert lab.attempt(run) == 0
  console = Console(record=True, width=200)
  export.run(run, out, None, dtype, shard_gb, level, lab.root, console)
  return run, console.export_text()


def weights(lab, run) -> dict[str, torch.Tensor]:
  """What a checkpoint says of weights and biases, read whole."""
  state = lab.state(run)
  return whole_experts({n: x for n, x in state.items() if checkpoint.kind(n) in KINDS})


KINDS = ("weights", "router biases")


def test_a_trained_run_is_exported_checked_and_loaded(lab, tmp_path):
  """Experts under the checkpoint's global ids become one matrix each."""
  out = tmp_path / "out"
  run, said = exported(lab, out)
  assert "25 read again, bit-equal" in said
  assert "logits (full, fp32, 64 + 64 tokens)" in said and "32 of 32 tokens equal" in said
  with Folder(out) as files:
    found = dict(from_hf(files, lab.config))
  state = weights(lab, run)
  assert found.keys() == state.keys()
  assert all(torch.equal(found[name], state[name]) for name in state)
  theirs = AutoModelForCausalLM.from_pretrained(out)
  assert theirs.dtype == torch.float32
  tokenizer = AutoTokenizer.from_pretrained(out)
  ends = (theirs.config.eos_token_id, theirs.generation_config.eos_token_id, tokenizer.eos_token_id)
  assert ends == (256, 256, 256)
  pads = (theirs.config.pad_token_id, theirs.generation_config.pad_token_id, tokenizer.pad_token_id)
  assert pads == (256, 256, 256)
  told = json.loads((out / "nmoe.json").read_text())
  assert told["run"] == run and told["step"] == 12 and told["check"]["logit_max_abs"] < 1e-4
  with closing(Reader(lab.root)) as reader:
    (kept,) = reader.exports(run)
  assert (kept.step, kept.path, kept.check) == (12, str(out), told["check"])
  assert kept.digest == hashlib.sha256((out / "nmoe.json").read_bytes()).hexdigest()
  card = (out / "README.md").read_text()
  assert "It learns." in card and "lm_eval" in card and "transformers only" in card


def test_shards_hold_every_tensor_once_and_their_hashes_are_right(lab, tmp_path):
  run = lab.record()
  lab.attempt(run)
  source = Source.open(lab.checkpoints(run) / "step_00000012", "bfloat16")
  writer = write_folder(source, tmp_path, 20_000)
  assert compare_tensors(source, tmp_path) == 25
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  names = []
  for file in sorted(tmp_path.glob("*.safetensors")):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    held = [name for name in header if name != "__metadata__"]
    assert all(index["weight_map"][name] == file.name for name in held)
    assert len(held) == 1 or len(data) - 8 - length <= 20_000
    names += held
  assert sorted(names) == sorted(index["weight_map"]) == sorted(writer.sha256)
  assert len(set(index["weight_map"].values())) > 3
  with Folder(tmp_path) as files:
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in files.values())
    routers = {n: x.dtype for n, x in files.items() if ".gate." in n}
    assert set(routers.values()) == {torch.float32} and len(routers) == 2
    assert files["lm_head.weight"].dtype == torch.bfloat16
  model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert model.dtype == torch.bfloat16


def test_masters_are_what_a_bf16_run_exports_in_fp32(lab, tmp_path):
  run, said = exported(lab, tmp_path / "out", dtype="fp32", target__dtype="bf16")
  state = lab.state(run)
  with Folder(tmp_path / "out") as files:
    assert torch.equal(files["lm_head.weight"], state["head.weight.master"])
    assert not torch.equal(files["lm_head.weight"], state["head.weight"].float())
  assert "32 of 32" in said


def test_a_bf16_run_keeps_its_bits(lab, tmp_path):
  run, _ = exported(lab, tmp_path / "out", target__dtype="bf16")
  with Folder(tmp_path / "out") as files:
    assert torch.equal(files["lm_head.weight"], lab.state(run)["head.weight"])


@pytest.mark.parametrize(
  ("values", "why"),
  [
    ({"moe__num_shared": 0}, "computes moe.num_shared = 0"),
    ({"moe__score": "softmax"}, "moe.normalize = true"),
  ],
)
def test_what_no_class_computes_is_refused_before_anything_is_written(lab, tmp_path, values, why):
  with pytest.raises(ConfigError, match=why):
    exported(lab, tmp_path / "out", **values)
  assert not list(tmp_path.glob("out*"))


def test_a_softmax_run_without_bias_is_a_deepseek_v2(lab, tmp_path):
  values = {"moe__score": "softmax", "moe__normalize": False, "moe__bias_update_rate": 0.0}
  _, said = exported(lab, tmp_path / "out", **values)
  assert "32 of 32" in said
  assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek_v2"


def test_the_error_of_the_latent_norms_is_bounded_or_refused(lab, tmp_path):
  _, said = exported(lab, tmp_path / "a", model__norm_eps=1e-5)
  assert "latent norms: HuggingFace's eps is 1e-6, a relative error of at most" in said
  with pytest.raises(CheckpointError, match="train with model.norm_eps = 1e-6"):
    exported(lab, tmp_path / "b", model__norm_eps=1e-1)
  assert not list(tmp_path.glob("b*"))


def test_other_logits_are_refused():
  found = {"latent_error": 0.0, "logit_largest": 5.0, "layers": 2, "greedy_margin": 0.0}
  found["logit_max_abs_served"] = 0.0
  found |= {"greedy_equal": 32, "greedy_tokens": 32}
  export.judge(found | {"logit_max_abs": 4e-4})
  for wrong in ({"logit_max_abs": 6e-4}, {"logit_max_abs": float("nan")}):
    with pytest.raises(CheckpointError, match="computes other logits"):
      export.judge(found | wrong)
  with pytest.raises(CheckpointError, match="computes other logits"):
    export.judge(found | {"logit_max_abs": 0.0, "greedy_margin": 0.1})


def test_a_full_disk_leaves_nothing_half_written(lab, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(ShardWriter, "finish", full)
  with pytest.raises(CheckpointError, match="out was not written .*No space.*GiB free"):
    exported(lab, tmp_path / "out")
  assert not list(tmp_path.glob("out*"))


def test_a_folder_in_the_way_is_left_as_it_is(lab, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "mine").write_text("precious")
  with pytest.raises(CheckpointError, match="out is there already"):
    exported(lab, out)
  assert [file.name for file in out.iterdir()] == ["mine"]
  assert not out.with_name("out.partial").exists()
  with pytest.raises(CheckpointError, match="mine is there already"), unfinished(out / "mine"):
    pass


def test_places_that_no_folder_can_replace_are_refused_at_once(lab, tmp_path, monkeypatch):
  """The finished folder is renamed to its place: not to this one, a link, or a mount's root."""
  run = lab.record()
  lab.attempt(run)
  place = tmp_path / "place"
  place.mkdir()
  (tmp_path / "link").symlink_to(place)
  monkeypatch.chdir(place)
  monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "mount")
  (tmp_path / "mount").mkdir()
  for out in (Path("."), place, tmp_path / "link", tmp_path / "mount"):
    with pytest.raises(ConfigError, match=f"{out} .*; name a new folder in it"):
      exportable(run, out, None, None, None, lab.root)


def test_numbers_that_are_not_finite_are_not_exported(lab, tmp_path, monkeypatch):
  """A checkpoint never has them; a file that was changed on disk and hashed anew may."""
  read = Source.read

  def spoilt(self, names):
    state = read(self, names)
    for name, tensor in state.items():
      if name == "layers.1.moe.experts.w2":
        tensor.view(-1)[7] = math.nan
    return state

  monkeypatch.setattr(Source, "read", spoilt)
  with pytest.raises(CheckpointError, match="experts.0.down_proj.weight has numbers that are not"):
    exported(lab, tmp_path / "out", level="tensors")
  assert not list(tmp_path.glob("out*"))


def test_a_changed_file_is_seen(lab, tmp_path):
  run, _ = exported(lab, tmp_path / "out")
  source = Source.open(lab.checkpoints(run) / "step_00000012", None)
  file = next((tmp_path / "out").glob("*.safetensors"))
  data = bytearray(file.read_bytes())
  data[-3] ^= 1
  file.write_bytes(data)
  with pytest.raises(CheckpointError, match="head.weight differs from"):
    compare_tensors(source, tmp_path / "out")


def test_unknown_runs_and_steps_are_named(lab, tmp_path):
  run = lab.record()
  with pytest.raises(CheckpointError, match=f"run {run} .* has no checkpoint"):
    step_folder(run, None, lab.root)
  lab.attempt(run)
  with pytest.raises(CheckpointError, match="has the steps 9, 12, not 4"):
    step_folder(run, 4, lab.root)
  assert step_folder(run, 9, lab.root).name == "step_00000009"
