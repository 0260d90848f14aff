"""A production configuration cut down for a proof, a bench or a check is a valid one."""

from pathlib import Path

import pytest

from nmoe.config import file as configs
from nmoe.config.sections import leaves
from nmoe.model.agreement import alone
from stages.proofs.bench_rdep import layer_config
from stages.proofs.shortened import at_ranks, shortened
from stages.proxy import coords
from stages.proxy.file import CoordsKeys

FILE = Path(__file__).parents[2] / "configs" / "moonlight" / "moonlight.toml"
BATCH = 32 * 4096


@pytest.fixture
def large():
  """Sixteen ranks on two hosts, with keys that only a long run reaches."""
  config = configs.load(FILE, env={})
  return configs.changed(
    config,
    {
      "launch.ranks": 16,
      "launch.ranks_per_node": 8,
      "launch.engine": "slurm",
      "rdep.group": 8,
      "rdep.payload": "mxfp8",
      "train.micro_batch": 1,
      "data.seq_len": 4096,
      "data.weights_from": [[4 * BATCH, 1.0, 2.0], [1e9, 2.0, 1.0]],
      "schedule.batch_tokens": BATCH,
      "schedule.total_tokens": 10_000 * BATCH,
      "schedule.warmup_tokens": 10 * BATCH,
      "schedule.decay_tokens": 10 * BATCH,
      "precision.finish_tokens": 9_000 * BATCH,
    },
  )


def test_its_first_steps(large):
  made = shortened(large, 6)
  assert made.steps == 6 and made.nodes == 2
  assert made.precision.finish_tokens == 0 and len(made.data.weights_from) == 1
  kept = shortened(configs.changed(large, {"precision.finish_tokens": 3 * BATCH}), 6)
  assert kept.precision.finish_tokens == 3 * BATCH


@pytest.mark.parametrize(("held_out", "evaluated"), [(64 * BATCH, BATCH), (4096, 4096)])
def test_its_evaluation_is_no_longer_than_a_step(large, held_out, evaluated):
  """After the last step of few: else most of a check's time is that."""
  made = shortened(configs.changed(large, {"data.val_tokens": held_out}), 6)
  assert made.data.val_tokens == evaluated


@pytest.mark.parametrize("ranks", [1, 4])
def test_other_ranks(large, ranks):
  made = at_ranks(shortened(large, 6), ranks)
  assert (made.launch.ranks, made.nodes, made.sequences) == (ranks, 1, large.sequences)


def test_its_moe_layer(large):
  plain = configs.changed(large, {"rdep.payload": "bf16"})
  made = layer_config(plain, FILE, 2, 512, None)
  assert (made.launch.ranks, made.nodes, made.steps, made.rank_tokens) == (2, 1, 1, 512)


def test_on_one_cpu(large):
  """What an export compares: all that makes the model is as it was."""
  made = alone(large, large.model.num_layers)
  assert (made.launch.ranks, made.target.arch, made.target.dtype) == (1, "cpu", "fp32")
  model = [key for key in leaves(large) if key.startswith(("model.", "moe.", "yarn."))]
  assert all(leaves(made)[key] == leaves(large)[key] for key in model)


def test_a_coordinate_check(large):
  """Of a base that is quantized on many ranks."""
  file = type("File", (), {"coords": CoordsKeys(), "base": large})
  made = coords._config(file, "width", 2, "muon")
  assert (made.launch.ranks, made.target.dtype, made.model.dim) == (1, "fp32", 2 * large.model.dim)
