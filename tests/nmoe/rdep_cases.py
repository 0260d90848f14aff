"""Routings, from even to none at all, and what RDEP and the definition in float64 make of them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import ranks
import torch
from torch import Tensor

import kernels.reference as ops
from kernels.ops import Recipe
from kernels.reference import symmetric
from nmoe.config.file import changed, loads
from nmoe.config.sections import Config
from nmoe.distributed.rdep import Rdep

E, K, D, F, TOKENS = 8, 2, 16, 8, 40  # TOKENS: the most that a rank may hold
ITERATIONS = 6
RECIPE = Recipe()

BASE = """
[target]
arch = "cpu"
dtype = "fp32"
[model]
vocab_size = 32
dim = 16
num_layers = 3
dense_dim = 16
num_heads = 1
[moe]
num_experts = 8
top_k = 2
expert_dim = 8
[data]
mixture = "none"
seq_len = 40
[optim]
dense_lr = 1e-3
router_lr = 1e-3
expert_lr = 1e-3
[schedule]
total_tokens = 160
batch_tokens = 160
[train]
micro_batch = 1
[experiment]
name = "rdep"
statement = "test"
"""


class Case(NamedTuple):
  """tokens of each of 4 ranks (2 ranks hold pairs, 1 rank all of them) and a routing by name."""

  routing: str
  tokens: tuple[int, int, int, int] = (10, 10, 10, 10)
  capacity: float = 2.0
  alignment: int = 1


CASES = {
  "uniform": Case("uniform"),
  "one expert": Case("one expert", capacity=4.0),
  "one expert in rounds": Case("one expert", capacity=0.2),
  "rank without tokens": Case("uniform", tokens=(16, 0, 13, 11)),
  "only the last rank has tokens": Case("uniform", tokens=(0, 0, 0, 20)),
  "no tokens at all": Case("uniform", tokens=(0, 0, 0, 0)),
  "experts without tokens": Case("experts 1 to 5"),
  "uneven tokens": Case("uniform", tokens=(1, 17, 3, 19)),
  "five times the mean": Case("skew", capacity=1.0),
  "overflow": Case("skew", tokens=(7, 9, 4, 20), capacity=0.15),
  "aligned": Case("experts 1 to 5", tokens=(3, 12, 6, 19), alignment=8),
  "aligned overflow": Case("skew", tokens=(7, 9, 4, 20), capacity=0.2, alignment=8),
}


class Data(NamedTuple):
  x_TD: Tensor
  expert_TK: Tensor
  gate_TK: Tensor
  dy_TD: Tensor
  w13: Tensor
  w2: Tensor
  shared_DD: Tensor


class Result(NamedTuple):
  """Of all ranks, in rank order; gradients of everything that Data holds but dy."""

  y_TD: np.ndarray
  dx_TD: np.ndarray
  dgate_TK: np.ndarray
  dw13: np.ndarray
  dw2: np.ndarray
  dshared_DD: np.ndarray


def config(num_ranks: int, case: Case, **values: float) -> Config:
  case_values = {"rdep.capacity": case.capacity, "rdep.alignment": case.alignment}
  case_values["rdep.deadline_s"] = 20.0
  if num_ranks == 1:
    case_values["train.micro_batch"] = 4
  elif num_ranks == 2:
    case_values["train.micro_batch"] = 2
  return changed(loads(BASE, env={}), {"launch.ranks": num_ranks, **case_values, **values})


def route(name: str, num_tokens: int, generator: torch.Generator) -> Tensor:
  """int32 [T, K]."""
  shape = (num_tokens, K)
  if name == "uniform":
    chosen = torch.rand(num_tokens, E, generator=generator).argsort(1)[:, :K]
  elif name == "one expert":
    chosen = torch.full(shape, 5)
  elif name == "experts 1 to 5":
    chosen = torch.randint(1, 6, shape, generator=generator)
  else:  # expert 3 gets 5 of every 8 rows, five times the mean
    chosen = torch.randint(0, E, shape, generator=generator)
    chosen[torch.rand(shape, generator=generator) < 4 / 7] = 3
  return chosen.int()


def make(case: Case, seed: int) -> Data:
  generator = torch.Generator().manual_seed(seed)
  num_tokens = sum(case.tokens)

  def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)

  expert_TK = route(case.routing, num_tokens, generator)
  gate_TK = torch.rand(num_tokens, K, generator=generator)
  weights = (normal(E, 2 * F, D) / 4, normal(E, D, F) / 3, normal(D, D) / 4)
  return Data(normal(num_tokens, D), expert_TK, gate_TK, normal(num_tokens, D), *weights)


def share(case: Case, data: Data, rank: int, num_ranks: int) -> Data:
  """One rank's tokens and experts, as leaves."""
  each, held = 4 // num_ranks, E // num_ranks
  start = sum(case.tokens[: rank * each])
  rows = slice(start, start + sum(case.tokens[rank * each : (rank + 1) * each]))
  mine = slice(rank * held, (rank + 1) * held)
  tokens = [t[rows].clone() for t in data[:4]]
  weights = [w[mine].clone() for w in (data.w13, data.w2)] + [data.shared_DD.clone()]
  leaves = Data(*tokens, *weights)
  for t in (leaves.x_TD, leaves.gate_TK, *leaves[4:]):
    t.requires_grad_()
  return leaves


def step(rdep: Rdep, d: Data, layer: int) -> list[np.ndarray]:
  """Forward and backward on one rank: Result's fields, before they are joined."""
  y_TD = rdep.experts(
    d.x_TD,
    d.expert_TK,
    d.gate_TK,
    d.w13,
    d.w2,
    RECIPE,
    layer=layer,
    shared=lambda x: x @ d.shared_DD,
  )
  y_TD.backward(d.dy_TD)
  found = (y_TD.detach(), *(t.grad for t in (d.x_TD, d.gate_TK, d.w13, d.w2, d.shared_DD)))
  return [t.numpy().copy() for t in found]


def run_cases(group, names: list[str], fused: bool) -> dict[str, tuple[list, list[int]]]:
  """Every case on one rank: the fields of each iteration's Result, and the layers' rounds."""
  found = {}
  for name in names:
    case = CASES[name]
    rdep = Rdep(config(group.size(), case), ops, group, symmetric)
    if group.size() > 1:
      rdep.exchange.fused = fused
    steps = [
      step(rdep, share(case, make(case, i % 3), group.rank(), group.size()), layer=i % 2)
      for i in range(ITERATIONS)
    ]
    found[name] = (steps, [rdep.rounds[0], rdep.rounds[1]])
  return found


def join(parts: list[list[np.ndarray]]) -> Result:
  y, dx, dgate, dw13, dw2, dshared = zip(*parts, strict=True)
  return Result(*map(np.concatenate, (y, dx, dgate, dw13, dw2)), np.sum(dshared, axis=0))


@cache
def results(num_ranks: int, fused: bool = False) -> dict[str, tuple[list[Result], list[int]]]:
  """Each case's iterations and rounds."""
  found = ranks.run(run_cases, num_ranks, list(CASES), fused)
  joined = {}
  for name in CASES:
    steps = [join(list(parts)) for parts in zip(*(f[name][0] for f in found), strict=True)]
    rounds = {tuple(f[name][1]) for f in found}
    assert len(rounds) == 1, f"ranks disagree about rounds: {rounds}"
    joined[name] = (steps, list(rounds.pop()))
  return joined


def oracle(data: Data) -> Result:
  """The definition, token by token, in float64: y[t] = Σ_k gate · W2 (silu(W1 x) · (W3 x))."""
  floating = [t.double().requires_grad_() for t in (data.x_TD, data.gate_TK, *data[4:])]
  x, gate, w13, w2, shared = floating
  y = x @ shared
  for k in range(K):
    chosen = data.expert_TK[:, k].long()
    h = torch.einsum("tfd,td->tf", w13[chosen], x)
    a = torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2]
    y = y + gate[:, k, None] * torch.einsum("tdf,tf->td", w2[chosen], a)
  y.backward(data.dy_TD.double())
  return Result(y.detach().numpy(), *(t.grad.numpy() for t in floating))


def deviation(a: np.ndarray, b: np.ndarray) -> float:
  """|a - b| / |b| by the largest elements."""
  if a.size == 0:
    return 0.0
  return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
