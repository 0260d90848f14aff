"""Quantized copies of weights on a GPU: what is kept equals what a fresh quantization finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.cuda
from gpu.oracle import normal, raw_bytes
from kernels.copies import Copies
from kernels.cuda.dense import linear, mlp
from kernels.cuda.experts import grouped_mlp, grouped_mlp_backward, grouped_mlp_forward
from kernels.cuda.jit import ARCH
from kernels.cuda.quantization import quantize, quantize_operand
from kernels.ops import Recipe
from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.model.decoder import Linear, Model
from nmoe.records import checkpoint
from nmoe.train.optim import Optimizer

pytestmark = pytest.mark.gpu
SMALL = Path(__file__).parents[2] / "configs" / "moonlet" / "small.toml"
FORMATS = ["fp8", "nvfp4"]
EMULATE = [True] + [False] * ARCH.block_scaled


def fresh(recipe: Recipe, leg: str, weight: Tensor) -> Any:
  """A weight, or its transpose, quantized from scratch along its last dimension."""
  w = weight.detach() if weight.ndim == 3 else weight.detach()[None]
  w = w if leg == "fprop_w" else w.mT.contiguous()
  function = quantize if recipe.emulate else quantize_operand
  return function(w, recipe.format, square=recipe.format == "nvfp4")


def same(a: Any, b: Any) -> bool:
  """Whether two quantized tensors have the same data, scales and tensor's scale."""
  parts = (raw_bytes((q.data, q.scale, q.tensor_scale)) for q in (a, b))
  return all(torch.equal(x, y) for x, y in zip(*parts, strict=True))


def held(model: Model) -> Iterator[tuple[Recipe, str, Tensor, Any]]:
  """(recipe, leg, weight, copy) of all that is kept."""
  for module in model.quantized.values():
    weights = [module.weight] if isinstance(module, Linear) else [module.w13, module.w2]
    for (_, _, leg, salt), copy in module.recipe.copies.made.items():
      yield module.recipe, leg, weights[salt], copy.quantized


def config_of(name: str, emulate: bool, kind: str) -> Config:
  values = {
    "target.arch": ARCH.name,
    "target.dtype": name,
    "target.emulate_blockscale": emulate,
    "precision.linears": ("q", "o", "dense", "shared"),
    "model.vocab_size": 384,
    "model.num_layers": 2,
    "data.tokenizer": "byte",
    "train.micro_batch": 2,
    "train.cuda_graph": False,
    "schedule.batch_tokens": 4096,
    "schedule.total_tokens": 8192,
    "schedule.warmup_tokens": 0,
    "schedule.decay_tokens": 0,
    "optim.matrices": kind,
    "optim.experts": kind,
  }
  return configs.changed(configs.load(SMALL, env={}), values)


def micro_batch(model: Model, seed: int) -> None:
  tokens = torch.randint(0, 384, (2, 1024), generator=torch.Generator().manual_seed(seed)).cuda()
  out = model(tokens, tokens.roll(-1, 1))
  (out.loss_sum / 4096 + out.balance_loss).backward()


def check_copies(model: Model) -> list[Any]:
  found = []
  for recipe, leg, weight, copy in held(model):
    assert same(copy, fresh(recipe, leg, weight)), leg
    found.append(copy)
  assert len(found) == 2 * sum(1 if isinstance(m, Linear) else 2 for m in model.quantized.values())
  return found


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", FORMATS)
def test_copies_follow_the_weights(name: str, kind: str, emulate: bool, tmp_path: Path) -> None:
  """Over two micro-batches, the optimizer's step, a change in place and a loaded checkpoint."""
  config = config_of(name, emulate, kind)
  with torch.device("cuda"):
    model = Model(config, kernels.cuda)
  model.init_weights(0)
  first = {key: x.cpu() for key, x in model.state_dict().items()}
  optimizer = Optimizer(model, config, kernels.cuda)
  micro_batch(model, 1)
  copies = check_copies(model)
  bits = [[c.data.view(torch.uint8).clone() for c in copies]]
  micro_batch(model, 2)
  assert all(a is b for a, b in zip(copies, check_copies(model), strict=True))

  def changed(seed: int) -> None:
    micro_batch(model, seed)
    bits.append([c.data.view(torch.uint8).clone() for c in check_copies(model)])
    assert not any(torch.equal(a, b) for a, b in zip(*bits[-2:], strict=True))

  optimizer.step(1.0, torch.tensor(1.0, device="cuda"))
  changed(3)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.neg_()
  changed(4)
  checkpoint.save(tmp_path, 1, first, 0, {})
  checkpoint.load(tmp_path, 1, model.state_dict(), 0)
  changed(5)
  assert all(torch.equal(a, b) for a, b in zip(bits[0], bits[-1], strict=True))


def once_and_anew(run: Any, recipe: Recipe, *shapes: tuple[int, ...]) -> None:
  """run(recipe, weights) -> tensors: the same bits, and weight gradients, with copies and without.

  The second of two rounds comes after the last weight has changed.
  """
  weights = [normal(*shape, scale=shape[-1] ** -0.5) for shape in shapes]
  found = []
  for copies in (Copies(), None):
    mine = [w.detach().clone().requires_grad_() for w in weights]
    for w in mine:
      w.grad_dtype = torch.float32
    out = []
    for _ in range(2):
      out += run(replace(recipe, copies=copies), mine)
      with torch.no_grad():
        mine[-1].mul_(-3)
    found.append(out + [w.grad for w in mine])
    assert copies is None or len(copies.made) == 2 * len(shapes)
  assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def micro_batches(rows: int, width: int, num: int = 3) -> list[tuple[Tensor, Tensor]]:
  return [(normal(rows, width), normal(rows, width, grad=False)) for _ in range(num)]


OFFSETS = [0, 100, 100, 233]
PRODUCTS = {
  "experts": (
    lambda x, w, recipe: grouped_mlp(x, torch.tensor(OFFSETS).int().cuda(), *w, recipe),
    ((3, 256, 192), (3, 192, 128)),
  ),
  "mlp": (lambda x, w, recipe: mlp(x, *w, recipe), ((256, 192), (192, 128))),
  "linear": (lambda x, w, recipe: linear(x, *w, recipe), ((192, 192),)),
}


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_micro_batches_that_share_copies_change_no_bit(product: str, name: str, emulate: bool):
  torch.manual_seed(0)
  function, shapes = PRODUCTS[product]
  batches = micro_batches(256, 192)

  def run(recipe: Recipe, w: list[Tensor]) -> list[Tensor]:
    out = []
    for x, dy in batches:
      y = function(x, w, recipe)
      y.backward(dy)
      out, x.grad = [*out, y.detach(), x.grad], None
    return out

  once_and_anew(run, Recipe(name, emulate=emulate, seed=5, draw=11), *shapes)


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("name", FORMATS)
def test_the_halves_share_them(name: str, emulate: bool) -> None:
  """What RDEP runs: the weights come as leaves of their own in each micro-batch."""
  torch.manual_seed(1)
  recipe = Recipe(name, emulate=emulate, seed=5)
  offset_E1 = torch.tensor(OFFSETS, dtype=torch.int32).cuda()
  batches, gate = micro_batches(256, 192), torch.rand(256, device="cuda")

  @torch.no_grad()
  def halves(recipe: Recipe, w: list[Tensor]) -> list[Tensor]:
    out = []
    for x, dy in batches:
      y, kept = grouped_mlp_forward(x, offset_E1, *w, recipe, True)
      dx, _, gradients = grouped_mlp_backward(kept, dy, gate, *w)
      for weight, dw in zip(w, gradients(), strict=True):
        weight.grad = weight.grad if dw is None else dw
      out += [y[:233], dx[:233]]
    return out

  once_and_anew(halves, recipe, (3, 256, 192), (3, 192, 128))
