"""A whole model on 1, 2 and 4 processes: losses, gradients, norms, updates and router biases."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
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
from nmoe.config.file import changed
from nmoe.config.parameters import owned_rows, parameter_shapes
from nmoe.config.sections import Config, LaunchConfig
from nmoe.distributed import buckets, parallel
from nmoe.distributed.buckets import Shared, shared
from nmoe.distributed.meeting import Meeting
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.rdep import Rdep
from nmoe.errors import ConfigError
from nmoe.machine.target import select
from nmoe.model.decoder import Model, parameter_group
from nmoe.model.router import update_bias
from nmoe.records.checkpoint import split_experts
from nmoe.train.optim import Optimizer, clip_factor

STEPS, BATCH = 3, 8
# Adam divides a gradient by its own size, so rounding shows in the updates of the smallest ones.
UPDATE_TOLERANCE = 0.05 * 1e-3  # of the learning rate, by which each step moves a weight


class Trace(NamedTuple):
  losses: list[float]
  norms: list[dict[str, float]]
  grads: dict[str, tuple[int, np.ndarray]]  # of the first step: owned rows and the first's place
  weights: dict[str, np.ndarray]  # after the last, experts by global id
  rounds: dict[int, int]
  early: list[int]  # buckets of each step that were reduced inside its backward pass
  late: list[int]  # buckets of weights under way when block 1 of a pass was used


def settings(num_ranks: int, capacity: float, group: int = 0) -> Config:
  per_rank = BATCH // num_ranks
  return tiny(
    launch__ranks=num_ranks,
    schedule__batch_tokens=BATCH * 24,
    train__micro_batch=per_rank // 2,
    rdep__capacity=capacity,
    rdep__group=group,
    rdep__deadline_s=20.0,
    optim__matrices="muon",
  )


def gather(config: Config, group) -> Parallel:
  """What `parallel.init` makes of a group of ranks."""
  inside, replicas = parallel.expert_groups(config, group, *2 * [timedelta(seconds=20)])
  rdep = Rdep(config, ops, inside, symmetric)
  parts = shared(config, group.rank(), replicas)
  return Parallel(group.rank(), group.size(), rdep, rdep.first, group, None, parts)


def train(group, num_ranks: int, capacity: float, expert_ranks: int, beside: bool = False) -> Trace:
  """Three steps of two micro-batches each, as nmoe.train.loop does them."""
  buckets.BUCKET = 5000  # this process's: parameters and parts lie across buckets
  config = settings(num_ranks, capacity, expert_ranks)
  together = gather(config, group) if num_ranks > 1 else Parallel()
  model = Model(config, ops, together.rdep)
  model.init_weights(0)
  optimizer = Optimizer(model, config, ops, together.owned)
  generator = torch.Generator().manual_seed(1)
  losses, norms, grads, early, late = [], [], {}, [], []

  def use(block: int) -> None:
    together.arrive(block)
    late.extend([len(together.arriving)] * (block == 1))

  for _ in range(STEPS):
    batch = torch.randint(0, 97, (BATCH, 25), generator=generator)
    tokens = batch.chunk(num_ranks)[together.rank]
    loss, counts = torch.zeros(()), 0
    for i, micro in enumerate(tokens.chunk(2)):
      model.on_final = together.reduce_final(model) if beside and i == 1 else None
      out = model(micro[:, :-1], micro[:, 1:])
      mean = out.loss_sum / config.schedule.batch_tokens + out.balance_loss / (2 * num_ranks)
      mean.backward()
      loss += out.loss_sum.detach()
      counts = counts + out.count_LE
    early.append(len(together.reduced))
    together.reduce_gradients(model)
    grads = grads or owned_gradients(model, together)
    losses.append(float(together.sum(loss)) / config.schedule.batch_tokens)
    norm = optimizer.grad_norms(together.sum)
    norms.append({k: float(v) for k, v in norm.items()})
    optimizer.step(1.0, clip_factor(norm["all"], config.optim.clip_norm))
    together.send_weights(model)
    if beside:
      model.on_use = use
    else:
      together.arrive()
    update_bias(model.routers, together.sum(counts), config.moe.bias_update_rate)
  together.arrive()
  named = {name: p.detach() for name, p in model.named_parameters()}
  weights = {
    name: p.numpy().copy() for name, p in split_experts(named, together.first_expert).items()
  }
  weights |= {f"bias.{i}": r.bias.numpy().copy() for i, r in enumerate(model.routers)}
  rounds = together.rdep.rounds if together.rdep else {}
  return Trace(losses, norms, grads, weights, rounds, early, late)


def owned_gradients(model: nn.Module, together: Parallel) -> dict[str, tuple[int, np.ndarray]]:
  found = {}
  for name, parameter in model.named_parameters():
    start, stop = (
      (0, len(parameter)) if together.owned is None else together.owned.get(name, (0, 0))
    )
    first = together.first_expert if parameter_group(name) == "expert" else 0
    if start < stop:
      found[name] = (first + start, parameter.grad[start:stop].numpy().copy())
  return found


@cache
def traces(num_ranks: int, capacity: float = 2.0, group: int = 0) -> list[Trace]:
  return ranks.run(train, num_ranks, num_ranks, capacity, group)


CASES = [(2, 2.0, 0), (4, 2.0, 0), (4, 0.4, 0), (4, 2.0, 2), (2, 2.0, 1)]  # ranks, capacity, group


@pytest.mark.parametrize(("num_ranks", "capacity", "group"), CASES)
def test_ranks_train_the_model_that_one_rank_trains(
  num_ranks: int, capacity: float, group: int
) -> None:
  (single,) = traces(1)
  found = traces(num_ranks, capacity, group)
  names, owners = set(), Counter()
  for rank, trace in enumerate(found):
    assert trace.losses == pytest.approx(single.losses, rel=1e-6)
    for mine, wanted in zip(trace.norms, single.norms, strict=True):
      assert mine == pytest.approx(wanted, rel=1e-6)
    for name, (start, grad) in trace.grads.items():
      _, whole = single.grads[name]
      error = np.abs(grad - whole[start : start + len(grad)]).max() / np.abs(whole).max()
      assert error < 1e-6, f"gradient of {name}, rank {rank}"
      owners.update((name, start + row) for row in range(len(grad)))
    for name, weight in trace.weights.items():
      moved = np.abs(weight - single.weights[name]).max()
      assert moved < UPDATE_TOLERANCE, f"{name}, rank {rank}"
    names |= set(trace.weights)
  assert names == set(single.weights)
  rows = {(name, row) for name, (_, grad) in single.grads.items() for row in range(len(grad))}
  assert owners == Counter(rows)
  if capacity < 1:
    assert min(max(trace.rounds.values()) for trace in found) > 1


@pytest.mark.parametrize(("num_ranks", "group"), [(2, 0), (4, 0), (4, 2), (2, 1)])
def test_replicas_hold_the_same_bits(num_ranks: int, group: int) -> None:
  first, *others = traces(num_ranks, 2.0, group)
  for other in others:
    assert other.losses == first.losses and other.norms == first.norms
    for name in set(first.weights) & set(other.weights):
      assert other.weights[name].tobytes() == first.weights[name].tobytes(), name


@pytest.mark.parametrize(("num_ranks", "group"), [(2, 0), (4, 2)])
def test_two_runs_repeat_their_bits(num_ranks: int, group: int) -> None:
  again = ranks.run(train, num_ranks, num_ranks, 2.0, group)
  for a, b in zip(traces(num_ranks, 2.0, group), again, strict=True):
    assert a.losses == b.losses and a.norms == b.norms
    assert all(a.weights[name].tobytes() == b.weights[name].tobytes() for name in a.weights)


@pytest.mark.parametrize(
  ("num_ranks", "capacity", "group"), [(2, 2.0, 0), (4, 0.4, 0), (4, 2.0, 2)]
)
def test_what_travels_beside_the_passes_has_the_same_bits(
  num_ranks: int, capacity: float, group: int
) -> None:
  again = ranks.run(train, num_ranks, num_ranks, capacity, group, True)
  for a, b in zip(traces(num_ranks, capacity, group), again, strict=True):
    assert a.losses == b.losses and a.norms == b.norms
    assert all(a.weights[name].tobytes() == b.weights[name].tobytes() for name in a.weights)
    assert a.early == [0] * STEPS
    whole = group in (0, num_ranks)  # else one group's passes may be repeated without the other's
    assert all(n > 1 for n in b.early) if whole else b.early == [0] * STEPS
    first_micro_batches = b.late[::2]
    assert a.late == [] and len(first_micro_batches) == STEPS - 1 and min(first_micro_batches) > 0
    assert b.late[1::2] == [0] * (STEPS - 1)


def decide(group) -> tuple[bool, bool]:
  together = Parallel(group.rank(), group.size(), None, 0, group)
  return together.any(group.rank() == 1), together.any(False)


def test_decisions() -> None:
  assert ranks.run(decide, 2) == [(True, False)] * 2


OWNED = ({"a": (0, 2)}, {"a": (2, 3), "b": (0, 5)})


def share(group) -> dict[str, list]:
  """Gradients 1 and 2⁻⁸ summed to their owners, and the owners' weights, in bf16; this rank's own
  sum. New memory holds NaN.
  """
  buckets.BUCKET = 7
  torch.use_deterministic_algorithms(True)
  torch.utils.deterministic.fill_uninitialized_memory = True
  rank = group.rank()
  part = Shared(OWNED, {"a": 4, "b": 1}, rank, group)
  grad = torch.tensor(2.0**-8 if rank else 1.0)
  grads = {"a": grad.bfloat16().repeat(3, 4), "b": grad.bfloat16().repeat(5)}
  own = torch.zeros(())
  for number in range(len(part.buckets)):
    part.reduce_bucket(number, grads, own)
  weights = {"a": torch.full((3, 4), -1.0).bfloat16(), "b": torch.full((5,), -1.0).bfloat16()}
  for name, (start, stop) in part.owned.items():
    weights[name][start:stop] = rank + torch.arange(start, stop).float().view(
      -1, *[1] * (name == "a")
    )
  for number in range(len(part.buckets)):
    arriving = part.send_bucket(number, weights)
    arriving.work.wait()
    for row, told in zip(arriving.rows, arriving.told, strict=True):
      row.copy_(told)
  named = {f"{n} grad": g for n, g in grads.items()} | weights
  return {name: x.float().tolist() for name, x in named.items()} | {"own": float(own)}


def test_sums_come_to_the_owner_rounded_once_and_weights_from_it() -> None:
  """1 + 2⁻⁸ has no bf16: the fp32 sum is rounded once, to even."""
  zero, one = ranks.run(share, 2)
  assert zero["a grad"][:2] == [[1.0] * 4] * 2 and one["a grad"][2] == [1.0] * 4
  assert one["b grad"] == [1.0] * 5
  assert (zero["own"], one["own"]) == (17.0, 17 * 2.0**-8)
  for found in (zero, one):
    assert found["a"] == [[0.0] * 4, [1.0] * 4, [3.0] * 4]
    assert found["b"] == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("bucket", [1, 100, 5000, 1 << 24])
def test_buckets_hold_every_owned_element_once(bucket: int, monkeypatch) -> None:
  monkeypatch.setattr(buckets, "BUCKET", bucket * 4)
  config = settings(4, 2.0, 2)
  shapes = parameter_shapes(config)
  row = {name: int(np.prod(shape[1:])) for name, shape in shapes.items()}
  for owned in owned_rows(config).values():
    for owner, rows in enumerate(owned):
      seen = {name: np.zeros(shapes[name], int).reshape(-1) for name in rows}
      for pieces in buckets.buckets(owned, row):
        places = Counter()
        for piece in (p for p in pieces if p.owner == owner):
          seen[piece.name][piece.start : piece.stop] += 1
          places.update(range(piece.at, piece.at + piece.stop - piece.start))
        assert max(places.values(), default=1) == 1 and max(places, default=0) < bucket * 4 / len(
          owned
        )
      for name, (start, stop) in rows.items():
        wanted = np.zeros_like(seen[name])
        wanted[start * row[name] : stop * row[name]] = 1
        assert (seen[name] == wanted).all(), name


def test_a_bucket_that_the_backward_pass_does_not_fill_takes_no_stream(monkeypatch) -> None:
  """A capture would end with a stream that nobody joins."""
  entered = []
  monkeypatch.setattr(parallel, "beside", lambda stream: entered.append(stream) or nullcontext())
  owned = {"embed.weight": (0, 1), "layers.0.w": (0, 1)}, {"layers.1.w": (0, 1)}
  whole = Shared(owned, dict.fromkeys(["embed.weight", "layers.0.w", "layers.1.w"], 1), 0)
  assert whole.block == [-1]
  together = Parallel(0, 2, SimpleNamespace(num_ranks=2), shared=(whole,))
  final = together.reduce_final(nn.Module())
  for block in (1, 0):
    final(block)
  assert entered == [] and together.reduced == set()


def test_one_rank_needs_no_group() -> None:
  together = Parallel()
  model = nn.Linear(2, 2)
  together.reduce_gradients(model)
  together.send_weights(model)
  together.arrive()
  x = torch.ones(3)
  assert together.sum(x) is x and x.tolist() == [1, 1, 1] and together.owned is None
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


def join(group, meet: str, expert_ranks: int) -> tuple[int, int, int, bool]:
  rank = group.rank()
  dist.destroy_process_group()
  config = settings(2, 2.0, expert_ranks)
  threads = len(os.listdir("/proc/self/task"))
  together = parallel.init(config, select(config, rank), Meeting(meet, rank, 2))
  assert together.rdep.first == together.first_expert
  sizes = [dist.get_world_size(part.group) for part in together.shared]
  assert sizes[:2] == [2, 2] and together.shared[2].members == 2 // config.expert_ranks
  found = together.rank, together.ranks, together.first_expert, together.any(rank == 1)
  assert len(os.listdir("/proc/self/task")) > threads
  together.close()
  assert not dist.is_initialized()
  assert len(os.listdir("/proc/self/task")) <= threads, "threads of groups outlive close"
  return found


@pytest.mark.parametrize(("expert_ranks", "second"), [(0, 4), (1, 0)])
def test_init_joins_the_ranks(tmp_path: Path, expert_ranks: int, second: int) -> None:
  found = ranks.run(join, 2, f"file://{tmp_path}/meet", expert_ranks)
  assert found == [(0, 2, 0, True), (1, 2, second, True)]


def test_what_the_target_cannot_is_refused() -> None:
  with pytest.raises(ConfigError, match="set it to true"):
    changed(settings(2, 2.0), {"rdep.peer_access": False})


def test_one_rank_joins_nobody() -> None:
  alone = settings(1, 2.0)
  assert parallel.init(alone, select(alone), Meeting()) == Parallel()


class Chosen(Exception):
  """Carries the backend that `init` asks for."""


@pytest.mark.parametrize(
  ("local_ranks", "gpus", "backend"),
  [(8, 8, "nccl"), (None, 16, "nccl"), (None, 8, "gloo"), (16, 1, "gloo")],
)
def test_the_backend_follows_the_ranks_of_a_host(monkeypatch, local_ranks, gpus, backend) -> None:
  """16 ranks on two hosts of eight GPUs speak NCCL, though no host has 16."""

  def choose(name, **_):
    raise Chosen(name)

  monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
  monkeypatch.setattr(parallel.dist, "init_process_group", choose)
  with pytest.raises(Chosen, match=f"^{backend}$"):
    parallel.init(*on_gpus(), local_ranks)


def test_hosts_with_too_few_gpus_do_not_fall_to_gloo(monkeypatch) -> None:
  monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
  with pytest.raises(ConfigError, match="8 ranks on a host with 4 GPUs, 16 in all"):
    parallel.init(*on_gpus(), 8)


def on_gpus():
  """(configuration of 16 ranks, a GPU's target, a meeting whose store nobody serves)."""
  config = replace(settings(2, 2.0), launch=LaunchConfig(ranks=16))
  meeting = Meeting()
  meeting.store = dist.HashStore()
  return config, replace(select(settings(1, 2.0)), device=torch.device("cuda", 0)), meeting
