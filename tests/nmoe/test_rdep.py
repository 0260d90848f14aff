"""RDEP on 1, 2 and 4 processes against one rank and against the definition in float64."""

from __future__ import annotations

import math
import os
import signal
import time
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import ranks
import torch
from torch import Tensor

import kernels.reference as ops
from kernels.buffers import COUNTS, DISPATCH, RETURN
from kernels.ops import Recipe
from kernels.reference import exchange, symmetric
from nmoe.config.file import changed, loads
from nmoe.config.sections import Config
from nmoe.distributed.rdep import Rdep
from nmoe.errors import CommError
from nmoe.train.watch import rdep_values

E, K, D, F, TOKENS = 8, 2, 16, 8, 40  # TOKENS: the most that a rank may hold
ITERATIONS = 6
RDEP_TAGS = ("rdep/rounds", "rdep/rows", "rdep/rows_again")
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
      steps.append(rdep.run(passes, lambda ran=ran: ran.append(-1)))
      attempts.append(ran)
      waited.append(len(waits) - before)
    found[name] = (steps, attempts, waited, [rdep.rounds[0], rdep.rounds[1]])
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
def test_steps_that_do_not_ask_for_counts_have_the_same_bits(num_ranks: int) -> None:
  """No wait for counts in a layer; one that overflows is forgotten and repeated with waits, and so
  are the steps after it from their start.
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
      wanted = (max(math.ceil(most / room), 1), rows[rank], again[rank])
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


class Recording(exchange.Exchange):
  """Notes what is called, in order."""

  calls: list[str]

  def _signal(self, kind: int, trip: int) -> None:
    self.calls.append({COUNTS: "counts", DISPATCH: "send", RETURN: "reply"}[kind])
    super()._signal(kind, trip)

  def wait(self, kind: int, trip: int) -> list[int]:
    self.calls.append({COUNTS: "wait counts", DISPATCH: "wait rows", RETURN: "wait replies"}[kind])
    return super().wait(kind, trip)

  def fetch(self, x: Tensor):
    fetched = super().fetch(x)

    def value() -> list:
      self.calls.append("host has counts")
      return fetched()

    value.here = fetched.here
    return value


class _Noted(torch.autograd.Function):
  """x, noting when its forward and backward passes run."""

  @staticmethod
  def forward(ctx, x: Tensor, calls: list[str]) -> Tensor:
    ctx.calls = calls
    calls.append("shared")
    return x.clone()

  @staticmethod
  def backward(ctx, dy: Tensor) -> tuple:
    ctx.calls.append("shared backward")
    return dy, None


def recorded(group) -> list[list[str]]:
  """The calls of a forward pass, and of its backward pass."""
  case = CASES["uniform"]
  rdep = Rdep(config(group.size(), case), ops, group, symmetric)
  rdep.exchange = Recording(rdep.heap.peers, rdep.rank, 20.0)
  rdep.exchange.calls = calls = []
  d = share(case, make(case, 0), group.rank(), group.size())
  tensors = d.x_TD, d.expert_TK, d.gate_TK, d.w13, d.w2
  y_TD = rdep.experts(*tensors, RECIPE, layer=0, shared=lambda x: _Noted.apply(x, calls))
  forward = calls.copy()
  calls.clear()
  y_TD.backward(d.dy_TD)
  return [forward, calls]


def test_rows_travel_beside_shared_experts_and_the_host_waits_last() -> None:
  """Nothing of a first round depends on the counts' values on the host."""
  forward, backward = ranks.run(recorded, 2)[0]
  assert forward == [
    *("counts", "wait counts", "send", "shared", "wait rows", "reply"),
    *("host has counts", "wait replies"),
  ]
  assert backward == ["send", "shared backward", "wait rows", "reply", "wait replies"]


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


DEADLINE_S = 1.0


class Dying(exchange.Exchange):
  """Kills its process in the given trip's call of one method, before its signal is given."""

  method, trip = "", 0

  def _signal(self, kind: int, trip: int) -> None:
    kinds = {COUNTS: "post_counts", DISPATCH: "send", RETURN: "reply"}
    if (self.method, self.trip) == (kinds[kind], trip):
      os.kill(os.getpid(), signal.SIGKILL)
    super()._signal(kind, trip)


def dying(group, victim: int, method: str, trip: int) -> None:
  """Three steps, of which each has two trips; the victim dies in one of them."""
  case = CASES["uniform"]
  settings = config(group.size(), case, **{"rdep.deadline_s": DEADLINE_S})
  rdep = Rdep(settings, ops, group, symmetric)
  if group.rank() == victim:
    Dying.method, Dying.trip = method, trip
    rdep.exchange = Dying(rdep.heap.peers, rdep.rank, DEADLINE_S)
  for i in range(3):
    data = share(case, make(case, i), group.rank(), group.size())
    begun = time.monotonic()
    try:
      step(rdep, data, layer=7)
    except CommError as error:
      waited = time.monotonic() - begun
      whole = nothing_half_written(make(case, i), data, group.rank())
      raise CommError(f"{error} | waited {waited:.3f} whole {whole} iteration {i}") from error


def nothing_half_written(everything: Data, mine: Data, rank: int) -> bool:
  """No gradient of a token; of the experts none, or the gradient of all ranks' tokens."""
  if mine.x_TD.grad is not None or mine.gate_TK.grad is not None:
    return False
  if mine.w13.grad is None:
    return mine.w2.grad is None
  exact = oracle(everything)
  held = slice(rank * E // 4, (rank + 1) * E // 4)
  return all(
    deviation(found.grad.numpy(), want[held]) < 2e-6
    for found, want in ((mine.w13, exact.dw13), (mine.w2, exact.dw2))
  )


@pytest.mark.parametrize(
  ("method", "trip", "what", "phase"),
  [
    ("post_counts", 3, "counts", "forward"),
    ("send", 3, "rows", "forward"),
    ("reply", 3, "returned rows", "forward"),
    ("send", 4, "rows", "backward"),
    ("reply", 4, "returned rows", "backward"),
  ],
)
def test_a_killed_rank_stops_the_others(method: str, trip: int, what: str, phase: str) -> None:
  num_ranks, victim = 4, 2
  found = ranks.outcomes(dying, num_ranks, victim, method, trip, timeout_s=20)
  assert found[victim].exitcode == -signal.SIGKILL
  case = CASES["uniform"]
  data = make(case, 1)  # the second iteration, where trips 3 and 4 are
  for rank, outcome in enumerate(found):
    if rank == victim:
      continue
    assert outcome.exitcode == 1
    message = outcome.error.strip().splitlines()[-1]
    assert (
      f"CommError: rank {rank} of 4, layer 7, {phase}, round 0: {what} of rank 2 did" in message
    )
    waited = float(message.split("waited ")[1].split()[0])
    assert DEADLINE_S <= waited < DEADLINE_S + 3  # the cores may be shared
    assert "whole True iteration 1" in message
    if what == "counts":
      assert "the number of rows was not yet known" in message
    else:
      total, missing = expected_rows(case, data, rank, victim, what)
      expected = (
        f"of {total} rows expected {total - missing} arrived; missing {missing} from rank 2"
      )
      if not missing:
        expected = "no rows were expected of it, but its signal that it had sent all"
      assert expected in message


@pytest.mark.faults
def test_a_late_rank_of_which_no_rows_were_expected() -> None:
  """Its signal is what is missing: no sum of nothing."""
  trip = SimpleNamespace(number=5, counts=lambda: [], round=0, layer=7, phase="forward")
  rank = SimpleNamespace(
    trips=[trip],
    rank=0,
    names=[0, 1, 2, 3],
    config=SimpleNamespace(launch=SimpleNamespace(ranks=4), rdep=SimpleNamespace(deadline_s=30)),
    _expected=lambda *_: [128, 128, 128, 0],
  )
  message = Rdep.post_mortem(rank, DISPATCH, 5, [3])
  assert "rows of rank 3 did not come within 30 s (no rows were expected of it, but" in message
  rank._expected = lambda *_: [128, 128, 0, 128]
  assert "of 384 rows expected 256 arrived; missing 128 from rank 3" in Rdep.post_mortem(
    rank, DISPATCH, 5, [3]
  )


def expected_rows(case: Case, data: Data, rank: int, victim: int, what: str) -> tuple[int, int]:
  """(rows in all, rows of the victim) that a rank of 4 awaits, from the routing itself."""
  source_T = torch.repeat_interleave(torch.arange(4), torch.tensor(case.tokens))
  owner_TK = data.expert_TK.long() // (E // 4)
  if what == "rows":
    mine = source_T[:, None].expand(-1, K)[owner_TK == rank]
  else:
    mine = owner_TK[source_T == rank].flatten()
  return len(mine), int((mine == victim).sum())


def too_many(group) -> str:
  case = Case("uniform", tokens=(41, 1, 1, 1))
  rdep = Rdep(config(group.size(), case), ops, group, symmetric)
  if group.rank() > 0:
    return ""
  with pytest.raises(CommError) as caught:
    step(rdep, share(case, make(case, 0), 0, 4), layer=1)
  return str(caught.value)


def test_more_tokens_than_the_buffers_hold() -> None:
  message = ranks.run(too_many, 4)[0]
  assert "41 tokens of 2 experts do not fit the 80 rows" in message
  assert "train.micro_batch" in message
