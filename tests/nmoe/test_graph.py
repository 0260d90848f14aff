"""A step's passes as a CUDA graph: when they are queued one by one, captured, replayed, forgotten.

torch's graphs are played here by Python: a capture computes nothing and notes the memory that it
was given; a replay fills that memory. Rdep and Parallel are the real ones, their rows are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import tiny
from torch import Tensor, nn

import kernels.reference as ops
from kernels.buffers import RETURN
from nmoe.config.buffers import TRANSIENT
from nmoe.distributed import parallel
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.rdep import Rdep
from nmoe.model.decoder import Model
from nmoe.train import graph
from nmoe.train.clock import Clock
from nmoe.train.graph import Graph
from nmoe.train.passes import Passes
from nmoe.train.session import TrainState

RESTS = 3  # of these tests: orders of overflows are short
TRIPS = 4  # of a step's passes


class World:
  """One rank's device, its passes, and how they were queued."""

  def __init__(self, ranks: Parallel):
    self.ranks, self.model = ranks, nn.Linear(3, 2, bias=False)
    self.graphs: list[CudaGraph] = []  # with memory
    self.under_capture: CudaGraph | None = None
    self.queued: list[str] = []
    self.signalled: list[int] = []  # numbers of trips
    self.higher = 0
    self.full = self.runs_full = False  # the flag that places set, and whether they do in this step
    self.running: CudaGraph | None = None  # a replay that may not be over
    self.graph = Graph(self.model, self.passes, ranks)
    if ranks.rdep is not None and ranks.rdep.num_ranks > 1:
      ranks.rdep.exchange = self
      ranks.rdep.heap = SimpleNamespace(close=lambda: None)
      self.peers = [SimpleNamespace(origin_C=None)] * 2

  def passes(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    within, rdep = self.under_capture, self.ranks.rdep
    alone = rdep is None or rdep.one_round
    self.ranks.run(self.forward, lambda: None, last=True)
    for param in self.model.parameters():
      assert param.grad is None
      param.grad = torch.full_like(param, torch.nan)
    out, grad = torch.full((), torch.nan), self.model.weight.grad
    if within is not None:
      within.of = tokens, targets, out, grad
      self.queued.append("captured")
      return (out,)
    self.compute(tokens, targets, out, grad)
    self.queued.append("alone" if alone else "one by one")
    return (out,)

  def forward(self) -> None:
    among = self.ranks.rdep
    if among is None or among.num_ranks == 1:
      return
    told = []
    for _ in range(TRIPS):
      told.append(among.trips.begin(0, "forward"))
      among.wait(RETURN, told[-1])
    if self.under_capture is None:
      self.signal(told)
      self.full |= self.runs_full
      among.most = 2 if self.runs_full and not among.one_round else 1
    else:
      self.under_capture.told = told

  def compute(self, tokens: Tensor, targets: Tensor, out: Tensor, grad: Tensor) -> None:
    out.copy_(tokens.sum() * targets.sum())
    grad.copy_(targets[:, None] * tokens)

  def signal(self, numbers: list[int]) -> None:
    self.signalled += [number + self.higher for number in numbers]

  def overflowed(self) -> bool:
    found, self.full = self.full, False
    return found

  @contextmanager
  def replayed(self, trips: int) -> Iterator[None]:
    self.higher = trips
    yield
    self.higher = 0

  def reply(self, trip: int, *_: object) -> None:
    self.signal([trip])

  def wait(self, kind: int, trip: int) -> list[int]:
    return []

  @contextmanager
  def capture(self, graph: CudaGraph, capture_error_mode: str) -> Iterator[None]:
    self.under_capture = graph
    yield
    self.under_capture = None
    self.graphs.append(graph)

  def step(self, seed: int, runs_full: bool) -> None:
    """One step, its results compared."""
    self.runs_full = runs_full
    draw = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randn(3, generator=draw), torch.randn(2, generator=draw)
    (found,) = self.graph(tokens, targets, self.model.zero_grad)
    wanted, grad = torch.zeros(()), torch.zeros(2, 3)
    self.compute(tokens, targets, wanted, grad)
    assert torch.equal(found, wanted) and torch.equal(self.model.weight.grad, grad)
    assert len(self.graphs) == (self.graph.graph is not None)
    assert self.graph.idle_bytes == 8 * len(self.graphs)
    self.model.zero_grad()

  def synchronize(self) -> None:
    self.running = None

  def evaluate(self) -> None:
    """A trip that is in no graph, of a pass that asks and runs full."""
    self.full = True
    number = self.ranks.rdep.trips.begin(0, "evaluation")
    self.signal([number])
    self.ranks.rdep.wait(RETURN, number)


class CudaGraph:
  """torch.cuda.CUDAGraph of passes of a World."""

  world: World
  told: list[int] = []

  def replay(self) -> None:
    rdep = self.world.ranks.rdep
    assert self in self.world.graphs and (rdep is None or rdep.one_round)
    assert self.world.higher % TRANSIENT == 0, "a replay's slots are those of its capture"
    self.world.compute(*self.of)
    self.world.signal(self.told)
    self.world.full |= self.world.runs_full
    self.world.queued.append("replayed")
    self.world.running = self

  def reset(self) -> None:
    assert self.world.running is not self, "its memory is given back while it runs"
    if self in self.world.graphs:
      self.world.graphs.remove(self)


@contextmanager
def world(ranks: Parallel) -> Iterator[World]:
  with pytest.MonkeyPatch.context() as patch:
    made = World(ranks)
    cuda = torch.cuda
    patch.setattr(cuda, "CUDAGraph", type("OfWorld", (CudaGraph,), {"world": made}))
    patch.setattr(cuda, "graph", made.capture)
    patch.setattr(cuda, "empty_cache", lambda: None)
    patch.setattr(cuda, "synchronize", made.synchronize)
    patch.setattr(cuda, "reset_peak_memory_stats", lambda: None)
    patch.setattr(cuda, "memory_reserved", lambda: 8 * len(made.graphs))
    patch.setattr(cuda, "memory_allocated", lambda: 0)
    patch.setattr(graph, "RESTS", RESTS)
    patch.setattr(parallel.dist, "destroy_process_group", made_sure(made))
    yield made


def made_sure(made: World):
  def destroy() -> None:
    assert not made.graphs, "NCCL waits for a graph that nobody ends"

  return destroy


def two_ranks() -> Parallel:
  """The first of two, whose rows a World plays."""
  among = Rdep(tiny(), ops)
  among.num_ranks, among.names, among.one_round = 2, [0, 1], False
  return Parallel(0, 2, among)


def replicas() -> Parallel:
  """The first of two ranks that hold all experts each: rdep.group = 1."""
  return Parallel(0, 2, Rdep(tiny(launch__ranks=2, rdep__group=1, train__micro_batch=1), ops))


def expected(full: list[bool]) -> list[str]:
  """What is queued in steps that run full or not, from the words of nmoe.train.graph alone."""
  queued, rests, calls = [], 0, 0
  for overflows in full:
    if rests:
      queued.append("one by one")
      rests = RESTS if overflows else rests - 1
      continue
    queued += (["alone"], ["captured", "replayed"], ["replayed"])[min(calls, 2)]
    calls += 1
    if overflows:
      queued.append("one by one")
      rests, calls = RESTS, 0
  return queued


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=40))
@settings(deadline=None)
def test_a_graph_is_replayed_where_one_round_does_and_made_anew_after(steps) -> None:
  full = [drawn == 0 for drawn, _ in steps]
  with world(two_ranks()) as made:
    for seed, (_, evaluations) in enumerate(steps):
      for _ in range(evaluations):
        made.evaluate()
      made.step(seed, full[seed])
    assert made.queued == expected(full)
    assert made.ranks.rdep.full == sum(full)
    assert made.signalled == list(range(1, len(made.signalled) + 1))
    made.ranks.close()


@pytest.mark.parametrize("ranks", [Parallel, replicas])
def test_ranks_that_send_no_rows_replay_from_the_second_step_on(ranks) -> None:
  with world(ranks()) as made:
    for seed in range(4):
      made.step(seed, False)
    assert made.queued == ["alone", "captured", "replayed", "replayed", "replayed"]
    made.ranks.close()
    assert not made.graphs


def test_ranks_that_share_no_memory_have_none() -> None:
  assert replicas().rdep.nbytes == 0


def test_the_last_forward_pass_of_a_step_is_said_to_be_it() -> None:
  """From it on all of the step's places are known."""
  order: list[str] = []

  class Told(Parallel):
    def run(self, forward, forget, *, last: bool):
      order.append("last" if last else "another")
      return forward()

  config, device = tiny(train__micro_batch=2, schedule__batch_tokens=6 * 24), torch.device("cpu")
  model = Model(config, ops, None)
  model.init_weights(0)
  model.register_forward_hook(lambda *_: order.append("forward"))
  model.embed.weight.register_post_accumulate_grad_hook(lambda _: order.append("backward"))
  session = SimpleNamespace(config=config, parallel=Told(), target=SimpleNamespace(device=device))
  nobody = SimpleNamespace(data=SimpleNamespace(sources=[]))
  passes = Passes(session, TrainState(model, None), Clock(device), nobody)
  batch = torch.randint(0, 97, (6, 25))
  passes(batch[:, :-1], batch[:, 1:])
  assert order == [*["another", "forward", "backward"] * 2, "last", "forward", "backward"]
