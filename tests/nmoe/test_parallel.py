"""A whole model on 1, 2 and 4 processes: losses, gradients, norms, updates and router biases."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from model_configs import tiny
from torch import nn

import kernels.reference as ops
from kernels.reference import symmetric
from nmoe import parallel
from nmoe.checkpoint import split_experts
from nmoe.config import Config
from nmoe.errors import ConfigError
from nmoe.model import Model, update_router_bias
from nmoe.optim import Optimizer, clip_factor
from nmoe.parallel import Parallel
from nmoe.rdep import Rdep
from nmoe.target import select

STEPS, BATCH = 3, 8
# Adam divides a gradient by its own size, so rounding shows in the updates of the smallest ones.
UPDATE_TOLERANCE = 0.05 * 1e-3  # of the learning rate, by which each step moves a weight


class Trace(NamedTuple):
  losses: list[float]
  norms: list[dict[str, float]]
  grads: dict[str, np.ndarray]  # of the first step, experts by global id
  weights: dict[str, np.ndarray]  # after the last
  rounds: dict[int, int]


def settings(num_ranks: int, capacity: float) -> Config:
  per_rank = BATCH // num_ranks
  return tiny(
    launch__ranks=num_ranks,
    schedule__batch_tokens=BATCH * 24,
    train__micro_batch=per_rank // 2,
    rdep__capacity=capacity,
    rdep__deadline_s=20.0,
  )


def train(group, num_ranks: int, capacity: float) -> Trace:
  """Three steps of two micro-batches each, as nmoe.train does them."""
  config = settings(num_ranks, capacity)
  together = Parallel()
  if num_ranks > 1:
    rdep = Rdep(config, ops, group, symmetric)
    together = Parallel(group.rank(), num_ranks, rdep, rdep.first, group)
  model = Model(config, ops, together.rdep)
  model.init_weights(0)
  optimizer = Optimizer(model, config, ops)
  generator = torch.Generator().manual_seed(1)
  losses, norms, grads = [], [], {}
  for _ in range(STEPS):
    batch = torch.randint(0, 97, (BATCH, 25), generator=generator)
    tokens = batch.chunk(num_ranks)[together.rank]
    loss, counts = torch.zeros(()), 0
    for micro in tokens.chunk(2):
      out = model(micro[:, :-1], micro[:, 1:])
      mean = out.loss_sum / config.schedule.batch_tokens + out.balance_loss / (2 * num_ranks)
      mean.backward()
      loss += out.loss_sum.detach()
      counts = counts + out.count_LE
    together.reduce_gradients(model)
    grads = grads or by_global_name(model, together.first_expert, lambda p: p.grad)
    losses.append(float(together.sum(loss)) / config.schedule.batch_tokens)
    norm = optimizer.grad_norms(together.sum_squares)
    norms.append({k: float(v) for k, v in norm.items()})
    optimizer.step(1.0, clip_factor(norm["all"], config.optim.clip_norm))
    update_router_bias(model, together.sum(counts), config.moe.bias_update_rate)
  weights = by_global_name(model, together.first_expert, lambda p: p.detach())
  weights |= {f"bias.{i}": r.bias.numpy().copy() for i, r in enumerate(model.routers)}
  return Trace(losses, norms, grads, weights, together.rdep.rounds if together.rdep else {})


def by_global_name(model: nn.Module, first: int, of) -> dict[str, np.ndarray]:
  named = split_experts({name: of(p) for name, p in model.named_parameters()}, first)
  return {name: tensor.numpy().copy() for name, tensor in named.items()}


@cache
def traces(num_ranks: int, capacity: float = 2.0) -> list[Trace]:
  return ranks.run(train, num_ranks, num_ranks, capacity)


def deviation(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


@pytest.mark.parametrize(("num_ranks", "capacity"), [(2, 2.0), (4, 2.0), (4, 0.4)])
def test_ranks_train_the_model_that_one_rank_trains(num_ranks: int, capacity: float) -> None:
  (single,) = traces(1)
  found = traces(num_ranks, capacity)
  names = set()
  for rank, trace in enumerate(found):
    assert trace.losses == pytest.approx(single.losses, rel=1e-6)
    for mine, wanted in zip(trace.norms, single.norms, strict=True):
      assert mine == pytest.approx(wanted, rel=1e-6)
    for name, grad in trace.grads.items():
      assert deviation(grad, single.grads[name]) < 1e-6, f"gradient of {name}, rank {rank}"
    for name, weight in trace.weights.items():
      moved = np.abs(weight - single.weights[name]).max()
      assert moved < UPDATE_TOLERANCE, f"{name}, rank {rank}"
    names |= set(trace.weights)
  assert names == set(single.weights)
  if capacity < 1:
    assert min(max(trace.rounds.values()) for trace in found) > 1


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_replicas_hold_the_same_bits(num_ranks: int) -> None:
  first, *others = traces(num_ranks)
  for other in others:
    assert other.losses == first.losses and other.norms == first.norms
    for name in set(first.weights) & set(other.weights):
      assert other.weights[name].tobytes() == first.weights[name].tobytes(), name


def test_two_runs_repeat_their_bits() -> None:
  for a, b in zip(traces(2), ranks.run(train, 2, 2, 2.0), strict=True):
    assert a.losses == b.losses and a.norms == b.norms
    assert all(a.weights[name].tobytes() == b.weights[name].tobytes() for name in a.weights)


def decide(group) -> tuple[bool, bool, list[float]]:
  rank, size = group.rank(), group.size()
  together = Parallel(rank, size, None, 0, group)
  model = nn.Linear(300, 3).bfloat16()
  model.weight.grad = torch.full_like(model.weight, 1 + rank)
  model.bias.grad = torch.full_like(model.bias, 2.0**-8 if rank else 1.0)
  together.reduce_gradients(model)
  assert bool((model.weight.grad == 3).all())
  return together.any(rank == 1), together.any(False), model.bias.grad.tolist()


def test_sums_and_decisions() -> None:
  """1 + 2⁻⁸ has no bf16: the fp32 sum is rounded once, to even."""
  assert ranks.run(decide, 2) == [(True, False, [1.0] * 3)] * 2


def test_one_rank_needs_no_group() -> None:
  together = Parallel()
  model = nn.Linear(2, 2)
  together.reduce_gradients(model)
  x = torch.ones(3)
  assert together.sum(x) is x and together.sum_squares(x) is x and x.tolist() == [1, 1, 1]
  assert together.any(True) and not together.any(False)


def lose(group) -> None:
  together = Parallel(group.rank(), group.size(), None, 0, group)
  together.sum(torch.ones(3))
  if group.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  with together.explained():
    together.sum(torch.ones(3))


def test_a_lost_rank_is_named_by_the_collectives_too() -> None:
  alive, lost = ranks.outcomes(lose, 2, timeout_s=20)
  assert lost.exitcode == -signal.SIGKILL and alive.exitcode == 1
  assert "CommError: rank 0 of 2: a collective failed" in alive.error


def join(group, meet: Path) -> tuple[int, int, int, bool]:
  rank = group.rank()
  dist.destroy_process_group()
  config = settings(2, 2.0)
  together = parallel.init(config, select(config, rank), rank, meet)
  assert together.rdep.first == together.first_expert
  found = together.rank, together.ranks, together.first_expert, together.any(rank == 1)
  together.close()
  assert not dist.is_initialized()
  return found


def test_init_joins_the_ranks(tmp_path: Path) -> None:
  assert ranks.run(join, 2, tmp_path / "meet") == [(0, 2, 0, True), (1, 2, 4, True)]
  apart = settings(2, 2.0).with_values(**{"rdep.peer_access": False})
  with pytest.raises(ConfigError, match="set it to true"):
    select(apart)
  alone = settings(1, 2.0)
  assert parallel.init(alone, select(alone), 0, None) == Parallel()
