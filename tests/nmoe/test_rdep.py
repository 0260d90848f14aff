"""RDEP on 1, 2 and 4 processes against one rank and against the definition in float64."""

from __future__ import annotations

import math
import time

import pytest
import ranks
import torch
from rdep_cases import (
  CASES,
  ITERATIONS,
  RECIPE,
  TOKENS,
  Case,
  Data,
  E,
  K,
  Result,
  config,
  deviation,
  join,
  make,
  oracle,
  results,
  share,
  step,
)
from torch import Tensor

import kernels.reference as ops
from kernels.reference import exchange, symmetric
from nmoe.distributed.rdep import Rdep
from nmoe.train.watch import rdep_values

NAMES = "rounds", "rows", "rows_again", "capacity_needed", "full_passes", "waiting_passes"
RDEP_TAGS = tuple(f"rdep/{name}" for name in NAMES)


def run_unasked(group, names: list[str]) -> dict[str, tuple[list, list[int], list[int], list[int]]]:
  """Every case, each iteration through `Rdep.run`: the fields of each iteration's Result; per
  iteration how often it ran and how often the host waited for counts; and the last rounds.
  """
  waits = []

  class Counting(exchange.Fetched):
    def __call__(self) -> list:
      waits.append(1)
      return super().__call__()

  exchange.Fetched = Counting
  found = {}
  for name in names:
    case = CASES[name]
    rdep = Rdep(config(group.size(), case), ops, group, symmetric)
    steps, attempts, waited = [], [], []
    for i in range(ITERATIONS):
      ran = []

      def passes(rdep: Rdep = rdep, case: Case = case, i: int = i, ran: list = ran) -> list:
        ran.append(i)
        return step(rdep, share(case, make(case, i % 3), group.rank(), group.size()), layer=i % 2)

      before = len(waits)
      steps.append(rdep.run(passes, lambda ran=ran: ran.append(-1), last=True))
      attempts.append(ran)
      waited.append(len(waits) - before)
    assert rdep.waited == sum(count > 0 for count in waited)
    assert rdep.full == (rdep.waited if waited[0] else 0)  # a case runs full always or never
    found[name] = (steps, attempts, waited, [rdep.rounds[0], rdep.rounds[1]])
  return found


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank_and_definition(num_ranks: int, name: str) -> None:
  steps, _ = results(num_ranks)[name]
  single, _ = results(1)[name]
  for i, found in enumerate(steps):
    want = oracle(make(CASES[name], i % 3))
    for field in Result._fields:
      a, one, exact = (getattr(r, field) for r in (found, single[i], want))
      assert a.shape == one.shape == exact.shape
      assert deviation(a, one) < 1e-6, f"{field}, iteration {i}"
      assert deviation(a, exact) < 2e-6, f"{field}, iteration {i}"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_passes_that_do_not_ask_for_counts_have_the_same_bits(num_ranks: int) -> None:
  """No wait for counts in a layer; one that overflows is forgotten and repeated with waits, and
  those after it have waits from their start.
  """
  found = ranks.run(run_unasked, num_ranks, list(CASES))
  overflowing = 0
  for name, (wanted, rounds) in results(num_ranks).items():
    steps = [join(list(parts)) for parts in zip(*(f[name][0] for f in found), strict=True)]
    for i, (a, b) in enumerate(zip(steps, wanted, strict=True)):
      for field, x, y in zip(Result._fields, a, b, strict=True):
        assert x.tobytes() == y.tobytes(), f"{name}, {field}, iteration {i}"
    for _, attempts, waited, last in (f[name] for f in found):
      assert last == rounds, name
      if max(rounds) == 1:
        assert attempts == [[i] for i in range(ITERATIONS)], name
        assert waited == [0] * ITERATIONS, name
      else:
        overflowing += 1
        assert attempts[0] == [0, -1, 0] and all(len(ran) == 1 for ran in attempts[1:]), name
        assert waited == [1] * ITERATIONS, name
  assert overflowing >= 3 * num_ranks


class Noting(exchange.Exchange):
  """Notes when a pass places rows, says that it has placed all, and takes its rows."""

  def places(self, alignment: int):
    self.noted.append("places")
    return super().places(alignment)

  def mark(self) -> None:
    self.noted.append("mark")
    super().mark()

  def receive(self, *args):
    self.noted.append("receive")
    return super().receive(*args)


def two_layers(group) -> list[list[str]]:
  """What passes through all layers note: three alone, and as many within an attempt."""
  case = CASES["uniform"]
  rdep = Rdep(config(group.size(), case), ops, group, symmetric)
  rdep.exchange = Noting(rdep.heap.peers, rdep.rank, 20.0)
  found = []

  def forward() -> None:
    rdep.exchange.noted = []
    found.append(rdep.exchange.noted)
    for layer in (1, 2):  # behind a dense one
      d = share(case, make(case, 0), group.rank(), group.size())
      rdep.experts(d.x_TD, d.expert_TK, d.gate_TK, d.w13, d.w2, RECIPE, layer=layer)

  def passes() -> None:
    for micro in range(3):
      rdep.run(forward, lambda: None, last=micro == 2)

  passes()
  rdep.attempt(passes)
  return found


def test_the_host_is_told_that_all_fitted_before_the_last_layers_rows_are_taken() -> None:
  """Of every pass alone, and of an attempt's last. Then it queues what follows beside them."""
  layer = ["places", "receive"]
  told = [*layer, "places", "mark", "receive"]
  assert ranks.run(two_layers, 2) == [[told, told, told, 2 * layer, 2 * layer, told]] * 2


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_repeats_its_bits(num_ranks: int) -> None:
  """Iterations i and i + 3 see the same data, with other data in the buffers between them."""
  for name, (steps, _) in results(num_ranks).items():
    for i in range(ITERATIONS - 3):
      for a, b in zip(steps[i], steps[i + 3], strict=True):
        assert a.tobytes() == b.tobytes(), f"{name}, iteration {i}"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rows_that_return_from_the_product_are_the_same(num_ranks: int) -> None:
  for name, (steps, rounds) in results(num_ranks, fused=True).items():
    wanted, same_rounds = results(num_ranks)[name]
    assert rounds == same_rounds
    for i, (found, want) in enumerate(zip(steps, wanted, strict=True)):
      for a, b in zip(found, want, strict=True):
        assert a.tobytes() == b.tobytes(), f"{name}, iteration {i}"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rounds_follow_from_the_counts(num_ranks: int) -> None:
  seen = set()
  for name, (_, rounds) in results(num_ranks).items():
    case = CASES[name]
    rows = config(num_ranks, case).train.micro_batch * TOKENS * K
    room = max(math.ceil(math.ceil(case.capacity * rows) / case.alignment), 1) * case.alignment
    for layer in (0, 1):  # the last iterations are 4 (layer 0) and 5 (layer 1)
      count_E = torch.bincount(make(case, (4 + layer) % 3).expert_TK.flatten(), minlength=E)
      padded_E = -(-count_E // case.alignment) * case.alignment
      most = int(padded_E.view(num_ranks, -1).sum(1).max())
      assert rounds[layer] == max(math.ceil(most / room), 1), name
    seen.update(rounds)
  assert max(seen) >= 3


LOGGED = ["uneven tokens", "overflow", "aligned overflow"]


def logged_values(group) -> list[dict[str, float]]:
  """What a run logs of RDEP after one micro-batch of two layers, of each case in LOGGED."""
  found = []
  for case in map(CASES.get, LOGGED):
    rdep = Rdep(config(group.size(), case), ops, group, symmetric)
    for layer in (0, 1):
      step(rdep, share(case, make(case, layer), group.rank(), group.size()), layer)
    found.append(rdep_values(rdep))
  return found


def test_the_logged_rows_are_those_of_the_routing() -> None:
  """Counted one by one, at the places that the sorted, padded order gives them."""
  found = ranks.run(logged_values, 2)
  for case, logged in zip(map(CASES.get, LOGGED), zip(*found, strict=True), strict=True):
    sent = 2 * TOKENS * K
    room = math.ceil(math.ceil(case.capacity * sent) / case.alignment) * case.alignment
    rows, again, most = [0, 0], [0, 0], 0
    for layer in (0, 1):
      count_E = torch.bincount(make(case, layer).expert_TK.flatten(), minlength=E).tolist()
      for rank in (0, 1):
        place = 0
        for count in count_E[rank * E // 2 : (rank + 1) * E // 2]:
          rows[rank] += count
          again[rank] += sum(place + i >= room for i in range(count))
          place += -(-count // case.alignment) * case.alignment
        most = max(most, place)
    for rank in (0, 1):
      wanted = (max(math.ceil(most / room), 1), rows[rank], again[rank], most / sent, 0, 0)
      assert logged[rank] == dict(zip(RDEP_TAGS, wanted, strict=True))
  assert rdep_values(None) == {}


def one_rank_keeps_gradients_apart(group) -> list:
  """A pass without gradients, with x that needs none, and two graphs open at once."""
  case = CASES["overflow"]
  rdep = Rdep(config(group.size(), case), ops, group, symmetric)
  data = make(case, 0)
  a, b = (share(case, data, group.rank(), group.size()) for _ in range(2))

  def experts(d: Data, layer: int, x_TD: Tensor) -> Tensor:
    return rdep.experts(x_TD, d.expert_TK, d.gate_TK, d.w13, d.w2, RECIPE, layer=layer)

  with torch.no_grad():
    quiet = experts(a, 0, a.x_TD)
  constant = experts(a, 0, a.x_TD.detach())
  constant.backward(a.dy_TD)
  alone = a.w13.grad.clone()
  first, second = experts(b, 0, b.x_TD), experts(b, 1, b.x_TD)
  (first + second).backward(b.dy_TD)
  return [
    torch.equal(quiet, constant),
    torch.equal(first, second) and torch.equal(first, quiet),
    torch.equal(b.w13.grad, 2 * alone),
  ]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_graphs_do_not_disturb_each_other(num_ranks: int) -> None:
  assert ranks.run(one_rank_keeps_gradients_apart, num_ranks) == [[True] * 3] * num_ranks


def delayed(group, late_rank: int) -> list:
  case = CASES["uneven tokens"]
  rdep = Rdep(config(group.size(), case), ops, group, symmetric)
  if group.rank() == late_rank:
    time.sleep(0.5)
  return step(rdep, share(case, make(case, 0), group.rank(), group.size()), layer=0)


def test_a_delayed_sender_changes_nothing() -> None:
  want = results(4)["uneven tokens"][0][0]
  found = join(ranks.run(delayed, 4, 2))
  assert all(a.tobytes() == b.tobytes() for a, b in zip(found, want, strict=True))
