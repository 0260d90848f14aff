"""train.recompute over several steps of a whole run: every logged value and the whole state at the
end have the bits of a run that keeps all. On a GPU small.toml's model, without one that of labs.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from labs import Lab, open_lab, same_bits

from kernels.arch import ARCHS
from nmoe.config import file as configs
from nmoe.config.sections import leaves

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
SMALL = Path(__file__).parents[2] / "configs" / "moonlet" / "small.toml"
PARTS = ("norm", "qkv", "swiglu")
CHOICES = [[*chosen] for n in (1, 2, 3) for chosen in combinations(PARTS, n)]
STEPS = 8
MODEL = ("target.", "model.", "moe.", "optim.")


def values() -> dict[str, Any]:
  """The keys of a run of STEPS steps, each of two micro-batches, with a checkpoint in between."""
  keys: dict[str, Any] = {"model.num_layers": 3}
  sequences, length = 8, 64
  if GPU:
    found = torch.cuda.get_device_capability()
    keys = {k: v for k, v in leaves(configs.load(SMALL)).items() if k.startswith(MODEL)}
    keys["target.arch"] = next(a.name for a in ARCHS.values() if a.capability == found)
    keys["model.vocab_size"] = 384
    sequences, length = 16, 1024
  batch = sequences * length
  return keys | {
    "data.seq_len": length,
    "train.micro_batch": sequences // 2,
    "train.checkpoint_every": STEPS // 2,
    "schedule.batch_tokens": batch,
    "schedule.total_tokens": STEPS * batch,
    "schedule.warmup_tokens": 2 * batch,
    "schedule.decay_tokens": 2 * batch,
  }


def trained(lab: Lab, **more: Any) -> tuple[dict[str, torch.Tensor], dict[str, list]]:
  """(the state at the end, all that was logged) of a run in this process."""
  run = lab.record(**{key.replace(".", "__"): value for key, value in (values() | more).items()})
  assert lab.attempt(run) == 0
  return lab.state(run, STEPS), lab.logged(run)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
  with open_lab(tmp_path_factory.mktemp("recompute")) as made:
    yield made


@pytest.fixture(scope="module")
def plain(lab):
  return {graph: trained(lab, **{"train.cuda_graph": graph}) for graph in {False, GPU}}


@pytest.mark.parametrize("graph", [False, True] if GPU else [False], ids=lambda graph: f"{graph=}")
@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
def test_a_run_has_the_same_bits(lab, plain, parts, graph):
  state, logged = trained(lab, **{"train.recompute": parts, "train.cuda_graph": graph})
  wanted, told = plain[graph]
  assert [step for step, _ in logged["train/loss"]] == list(range(1, STEPS + 1))
  assert {tag: v for tag, v in logged.items() if v != told[tag]} == {}
  assert logged.keys() == told.keys()
  assert same_bits(state, wanted)
  averages = [name for name in state if name.endswith((".exp_avg", ".momentum"))]
  averages = [name for name in averages if ".experts." not in name]  # one may get no token
  assert averages and all(state[name].any() for name in averages)


def test_a_difference_is_seen(lab, plain):
  """Another seed's run is another one."""
  state, logged = trained(lab, **{"train.seed": 1})
  wanted, told = plain[False]
  assert logged["train/loss"] != told["train/loss"]
  assert not same_bits(state, wanted)
