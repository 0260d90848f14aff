"""The quantized copies of a model's weights, through all that changes weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from model_configs import tiny

from kernels import reference
from kernels.formats import BlockScaled
from kernels.reference import quantize, symmetric
from nmoe.config.plan import plan
from nmoe.config.sections import Config
from nmoe.distributed import parallel
from nmoe.distributed.buckets import shared
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.rdep import Rdep
from nmoe.model.decoder import Linear, Model
from nmoe.records import checkpoint
from nmoe.train.optim import Optimizer

ONE = torch.tensor(1.0)
LINEARS = ("q", "kv_a", "kv_b", "o", "dense", "shared")


def config_of(dtype: str, **values: Any) -> Config:
  """All products quantized, two micro-batches a step."""
  values = {"precision__linears": LINEARS, "moe__expert_dim": 32, "target__dtype": dtype} | values
  return tiny(target__emulate_blockscale=True, train__micro_batch=1, **values)


def model_of(config: Config, rdep: Rdep | None = None) -> Model:
  model = Model(config, reference, rdep)
  model.init_weights(0)
  return model


def without_copies(model: Model) -> Model:
  """The model, whose weights are then quantized at every use."""
  for module in model.quantized.values():
    module.recipe = replace(module.recipe, copies=None)
  return model


def micro_batch(model: Model, seed: int) -> torch.Tensor:
  """Forward and backward of one sequence; the loss."""
  generator = torch.Generator().manual_seed(seed)
  tokens = torch.randint(0, 97, (1, model.config.data.seq_len + 1), generator=generator)
  model.set_draw(seed, 0)
  out = model(tokens[:, :-1], tokens[:, 1:])
  (out.loss_sum / 48 + out.balance_loss).backward()
  return out.loss_sum.detach()


def held(model: Model) -> Iterator[tuple[str, torch.Tensor, BlockScaled]]:
  """(leg, weight, its copy) of every copy that is kept."""
  for module in model.quantized.values():
    weights = [module.weight] if isinstance(module, Linear) else [module.w13, module.w2]
    for (_, _, leg, salt), copy in module.recipe.copies.made.items():
      yield leg, weights[salt], copy.quantized


def bits(q: BlockScaled) -> list[torch.Tensor]:
  whole = [q.data.view(torch.uint8), q.scale.view(torch.uint8)]
  return whole if q.tensor_scale is None else [*whole, q.tensor_scale.view(1).view(torch.int32)]


def same(a: BlockScaled, b: BlockScaled) -> bool:
  return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def check_copies(model: Model, format: str) -> list[BlockScaled]:
  """They are what the weights are quantized to from scratch, two of each; returned in order."""
  found = []
  for leg, weight, copy in held(model):
    w = weight.detach() if weight.ndim == 3 else weight.detach()[None]
    how = {"square": True} if format == "nvfp4" else {"axis": -1 if leg == "fprop_w" else -2}
    assert same(copy, quantize(w, format, **how)), leg
    found.append(copy)
  assert len(found) == 2 * sum(1 if isinstance(m, Linear) else 2 for m in model.quantized.values())
  return found


def step(model: Model, config: Config, folder: Path) -> None:
  model.zero_grad()
  optimizer = Optimizer(model, config, reference)
  for parameter in model.parameters():
    parameter.grad = torch.randn_like(parameter).to(parameter.grad_dtype)
  optimizer.step(1.0, ONE)


def load(model: Model, config: Config, folder: Path) -> None:
  other = model_of(config)
  other.init_weights(1)
  checkpoint.save(folder, 1, other.state_dict(), 0, {})
  checkpoint.load(folder, 1, model.state_dict(), 0)


def load_state(model: Model, config: Config, folder: Path) -> None:
  other = model_of(config)
  other.init_weights(1)
  model.load_state_dict(other.state_dict())


def init(model: Model, config: Config, folder: Path) -> None:
  model.init_weights(1)


@torch.no_grad()
def in_place(model: Model, config: Config, folder: Path) -> None:
  for parameter in model.parameters():
    parameter.mul_(1.5)


FAST = {"optim__dense_lr": 0.1, "optim__expert_lr": 0.1}  # a step that four bits can tell
CHANGES = {
  "adamw": (step, FAST),
  "adamw, bf16": (step, FAST | {"optim__moments": "bf16"}),
  "muon": (step, FAST | {"optim__matrices": "muon", "optim__experts": "muon"}),
  "checkpoint": (load, {}),
  "state": (load_state, {}),
  "init": (init, {}),
  "in place": (in_place, {}),
}


@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
@pytest.mark.parametrize("name", CHANGES)
def test_copies_are_of_the_weights_as_they_are(name: str, dtype: str, tmp_path: Path) -> None:
  change, values = CHANGES[name]
  config = config_of(dtype, **values)
  model = model_of(config)
  micro_batch(model, 1)
  before = check_copies(model, dtype)
  micro_batch(model, 2)
  assert all(a is b for a, b in zip(before, check_copies(model, dtype), strict=True))
  change(model, config, tmp_path)
  micro_batch(model, 3)
  after = check_copies(model, dtype)
  assert not any(same(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("rows", [None, 2])
def test_adamw_is_given_what_keeps_each_weight_s_copies(rows: int | None) -> None:
  """In each parameter's place, also of the rows that a rank owns; None where nothing is kept."""
  config = config_of("fp8", precision__linears=("o", "shared"))
  model, given = model_of(config), {}

  def adamw(params: list, *_: list, copies: list, **rule: Any) -> None:
    given.update({p.data_ptr(): c for p, c in zip(params, copies, strict=True)})

  owned = rows and {name: (0, min(rows, len(p))) for name, p in model.named_parameters()}
  model.zero_grad()
  optimizer = Optimizer(model, config, SimpleNamespace(adamw=adamw), owned)
  for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter).to(parameter.grad_dtype)
  optimizer.step(1.0, ONE)
  want = dict.fromkeys((p.data_ptr() for p in model.parameters()), None)
  for module in model.quantized.values():
    want |= {p.data_ptr(): module.recipe.copies for p in module.parameters()}
  assert given == want and len(set(map(id, want.values()))) == len(model.quantized) + 1


def steps(model: Model, optimizer: Optimizer, together: Parallel) -> list[torch.Tensor]:
  """Three steps of two micro-batches, the last with bf16 forward products: losses, then weights."""
  losses = []
  for number in range(3):
    model.set_forward_bf16(number == 2)
    losses += [micro_batch(model, 10 * number + micro + 5 * together.rank) for micro in range(2)]
    together.reduce_gradients(model)
    optimizer.step(1.0, ONE)
    together.send_weights(model)
  together.arrive()
  return losses + [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_training_is_that_of_weights_quantized_at_every_use(dtype: str, kind: str) -> None:
  config = config_of(dtype, optim__matrices=kind, optim__experts=kind)
  found = []
  for change in (lambda model: model, without_copies):
    model = change(model_of(config))
    found.append(steps(model, Optimizer(model, config, reference), Parallel()))
  assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def on_ranks(group: Any, dtype: str, expert_ranks: int) -> list[list[np.ndarray]]:
  """The steps with copies and without."""
  values = {"launch__ranks": 2, "rdep__group": expert_ranks, "rdep__deadline_s": 20.0}
  config = config_of(dtype, schedule__batch_tokens=96, **values)
  found = []
  for change in (lambda model: model, without_copies):
    inside, replicas = parallel.expert_groups(config, group, *2 * [timedelta(seconds=20)])
    rdep = Rdep(config, reference, inside, symmetric)
    parts = shared(config, group.rank(), replicas)
    together = Parallel(group.rank(), 2, rdep, rdep.first, group, None, parts)
    model = change(model_of(config, rdep))
    optimizer = Optimizer(model, config, reference, together.owned)
    found.append([x.float().numpy().copy() for x in steps(model, optimizer, together)])
    rdep.close()
  return found


@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_rows_that_come_from_their_owners_are_seen(expert_ranks: int) -> None:
  """Experts on two ranks as replicas, then each on one."""
  for with_copies, without in ranks.run(on_ranks, 2, "fp8", expert_ranks):
    assert all(np.array_equal(a, b) for a, b in zip(with_copies, without, strict=True))


@pytest.mark.parametrize(
  "values",
  [
    {},
    {"precision__linears": ()},
    {"precision__experts": False, "precision__bf16_last_layers": 1},
    {"model__q_lora_rank": 32, "precision__linears": ("q", "dense"), "moe__num_shared": 1},
  ],
  ids=str,
)
@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_the_plan_counts_their_bytes(dtype: str, values: dict[str, Any]) -> None:
  """Of the emulation's, in dimensions that blocks divide; but for the tensors' own scales."""
  sizes = {
    "model__dim": 64,
    "model__dense_dim": 96,
    "model__kv_lora_rank": 32,
    "model__qk_nope_dim": 32,
    "model__qk_rope_dim": 32,
    "model__v_dim": 32,
  }
  config = config_of(dtype, **(sizes | values))
  model = model_of(config)
  micro_batch(model, 1)
  kept = sum(q.data.nbytes + q.scale.nbytes for _, _, q in held(model))
  terms = {term.name: term.value for term in plan(config).memory}
  assert terms["quantized weights"] == kept > 0
