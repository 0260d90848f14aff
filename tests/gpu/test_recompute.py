"""train.recompute on the GPU: the same bits, less memory, for the time that it costs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import kernels.cuda
from gpu.test_step import small
from nmoe.config.file import changed
from nmoe.config.plan import _kept_per_token
from nmoe.config.sections import Config
from nmoe.model.decoder import Model

pytestmark = pytest.mark.gpu
PARTS = ("norm", "qkv", "swiglu")
CHOICES = [[*chosen] for n in (1, 2, 3) for chosen in combinations(PARTS, n)]
SHAPE = 8, 1024  # sequences and tokens
SLOWER = 1.25  # the forward and backward passes of all three, without optimizer and data


def passes(config: Config) -> tuple[dict[str, torch.Tensor], int, float]:
  """Loss and gradients of the second of two passes; bytes kept in between; milliseconds."""
  with torch.device("cuda"):
    model = Model(config, kernels.cuda)
  model.init_weights(0)
  tokens = torch.randint(0, 384, SHAPE, generator=torch.Generator().manual_seed(0)).cuda()
  start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  for _ in range(4):
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    start.record()
    out = model(tokens, tokens.roll(-1, 1))
    kept = torch.cuda.memory_allocated() - before
    (out.loss_sum / tokens.numel() + out.balance_loss).backward()
    end.record()
  end.synchronize()
  found = {name: p.grad for name, p in model.named_parameters()} | {"loss": out.loss_T}
  return found, kept, start.elapsed_time(end)


@pytest.mark.parametrize("parts", [[], *CHOICES], ids="+".join)
def test_a_forward_pass_whose_results_are_dropped_keeps_nothing(parts) -> None:
  with torch.device("cuda"):
    model = Model(changed(small(1), {"train.recompute": parts}), kernels.cuda)
  model.init_weights(0)
  tokens = torch.randint(0, 384, SHAPE, generator=torch.Generator().manual_seed(0)).cuda()
  allocated = []
  for _ in range(3):
    out = model(tokens, tokens.roll(-1, 1))
    kept = torch.cuda.memory_allocated()
    del out
    allocated.append(torch.cuda.memory_allocated())
    assert kept - allocated[-1] > 1 << 28  # 0.34 GiB with all three parts, more with fewer
  assert allocated[0] == allocated[1] == allocated[2]


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, torch.Tensor], int, float]:
  return passes(small(1))


@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
def test_the_same_bits_and_the_memory_that_is_planned(plain, parts) -> None:
  wanted, most, milliseconds = plain
  config, tokens = small(1), SHAPE[0] * SHAPE[1]
  less = changed(config, {"train.recompute": parts})
  found, kept, slower = passes(less)
  assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
  layers = range(config.model.num_layers)
  planned = tokens * sum(_kept_per_token(config, i) - _kept_per_token(less, i) for i in layers)
  assert most - kept == pytest.approx(planned, rel=0.05)
  assert slower < SLOWER * milliseconds
