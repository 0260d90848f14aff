"""RDEP: what happens beside what, and when the host waits."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import ranks
import torch
from rdep_cases import CASES, RECIPE, config, make, share
from torch import Tensor

import kernels.reference as ops
from kernels.buffers import COUNTS, DISPATCH, RETURN
from kernels.reference import exchange, symmetric
from nmoe.distributed.rdep import Rdep


class Recording(exchange.Exchange):
  """Notes what is called, in order."""

  calls: list[str]

  def _signal(self, kind: int, trip: int) -> None:
    self.calls.append({COUNTS: "counts", DISPATCH: "send", RETURN: "reply"}[kind])
    super()._signal(kind, trip)

  def wait(self, kind: int, trip: int) -> list[int]:
    self.calls.append({COUNTS: "wait counts", DISPATCH: "wait rows", RETURN: "wait replies"}[kind])
    return super().wait(kind, trip)

  @contextmanager
  def leaving(self) -> Iterator[None]:
    self.calls.append("SMs are left")
    yield
    self.calls.append("none is left")

  def fetch(self, x: Tensor, before=None):
    fetched = super().fetch(x, before)

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
    *("counts", "wait counts", "send", "SMs are left", "shared", "none is left"),
    *("wait rows", "reply", "host has counts", "wait replies"),
  ]
  assert backward == [
    *("send", "SMs are left", "shared backward", "none is left"),
    *("wait rows", "reply", "wait replies"),
  ]


def what_is_kept(group) -> list[bool]:
  """The shared experts' result, between forward and backward; and whether their weights got no
  gradient.
  """
  case = CASES["uniform"]
  rdep = Rdep(config(group.size(), case), ops, group, symmetric)
  d = share(case, make(case, 0), group.rank(), group.size())
  made: list[weakref.ref] = []

  def shared(x_TD: Tensor) -> Tensor:
    y_TD = x_TD @ d.shared_DD
    made.append(weakref.ref(y_TD))
    return y_TD

  y_TD = rdep.experts(d.x_TD, d.expert_TK, d.gate_TK, d.w13, d.w2, RECIPE, layer=0, shared=shared)
  kept = [made[0]() is not None]
  y_TD.backward(d.dy_TD)
  return [*kept, d.shared_DD.grad is None]


def test_the_shared_experts_result_is_not_kept_for_their_backward_pass() -> None:
  assert ranks.run(what_is_kept, 2) == [[False, False]] * 2
