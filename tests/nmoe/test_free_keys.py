"""Keys of [train] that are tagged free change no bit of what is learnt; those that do are not."""

from dataclasses import fields

import pytest
from labs import Lab, same_bits

from nmoe.config.file import changed
from nmoe.config.sections import TrainConfig, fingerprint, kind

SHORT = {
  "schedule__total_tokens": 3072,
  "schedule__warmup_tokens": 512,
  "schedule__decay_tokens": 1024,
  "train__micro_batch": 4,
  "train__checkpoint_every": 0,
}
OTHER = {  # another value of every free key
  "recompute": ("norm", "qkv", "swiglu"),
  "log_every": 3,
  "flight_every": 2,
  "routing_every": 2,
  "eval_every": 2,
  "checkpoint_every": 1,
  "keep_checkpoints": 7,
}
ON_A_GPU = {"cuda_graph"}  # tests/gpu/test_step.py

FREE = [f.name for f in fields(TrainConfig) if kind(f"train.{f.name}") == "free"]


def run(lab: Lab, **values) -> str:
  name = lab.record(**SHORT | values)
  assert lab.attempt(name) == 0
  return name


@pytest.mark.faults
def test_every_free_key_is_tried():
  assert set(FREE) == OTHER.keys() | ON_A_GPU


@pytest.mark.faults
@pytest.mark.parametrize("key", [key for key in FREE if key not in ON_A_GPU])
def test_a_free_key_changes_no_bit(lab, key):
  """Neither of the losses, at the steps that both log, nor of the state at the end."""
  ours, theirs = run(lab), run(lab, **{f"train__{key}": OTHER[key]})
  logged = [dict(lab.logged(name)["train/loss"]) for name in (ours, theirs)]
  both = logged[0].keys() & logged[1].keys()
  assert 6 in both
  assert {step: logged[0][step] for step in both} == {step: logged[1][step] for step in both}
  assert lab.run(ours).results["val/bpb"] == lab.run(theirs).results["val/bpb"]
  assert same_bits(lab.state(ours, 6), lab.state(theirs, 6))


@pytest.mark.faults
def test_chunks_of_the_loss_are_another_computation(lab):
  """Their sums round apart: a run under another chunk must not stand in."""
  other = changed(lab.config, {"train.loss_chunk": 100})
  assert fingerprint(other) != fingerprint(lab.config)
