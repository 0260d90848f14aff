"""A step's forward passes, some of which run again: when layers wait, and what is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import tiny

import kernels.reference as ops
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.rdep import CROWDED, Rdep
from nmoe.model.decoder import Model
from nmoe.train.clock import Clock
from nmoe.train.passes import Passes
from nmoe.train.session import TrainState

MICROS = 3


class Played:
  """The exchange of two ranks, one of which runs full where a test says so."""

  def __init__(self) -> None:
    self.full = False

  def overflowed(self) -> bool:
    found, self.full = self.full, False
    return found

  def late(self) -> None:
    return None


def expected(full: list[bool]) -> list[str]:
  """What is done for forward passes that run full or not, from the words of nmoe.distributed.rdep
  alone.
  """
  done, since = [], CROWDED  # passes since the last that ran full
  for overflows in full:
    if since >= CROWDED:
      done += ["unasked", "forgotten", "asked"] if overflows else ["unasked"]
    else:
      done.append("asked")
    since = 0 if overflows else since + 1
  return done


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=30), st.randoms())
@settings(deadline=None)
def test_passes_wait_for_counts_where_one_before_had_several_rounds(drawn, random) -> None:
  """Rare and frequent overflows: each is followed by up to four passes that fit. What an evaluation
  between them does counts for nothing.
  """
  full = [overflows for first, fit in drawn for overflows in [first, *[False] * fit]]
  rdep, done = Rdep(tiny(), ops), []
  rdep.num_ranks, rdep.one_round, rdep.exchange = 2, False, Played()
  for overflows in full:
    if random.random() < 0.5:
      rdep.exchange.full, rdep.most = True, 2

    def forward(overflows: bool = overflows) -> int:
      done.append("unasked" if rdep.one_round else "asked")
      rdep.exchange.full |= overflows
      if overflows and not rdep.one_round:
        rdep.most = 2
      return len(done)

    assert rdep.run(forward, lambda: done.append("forgotten"), last=True) == len(done)
  assert done == expected(full)
  assert (rdep.waited, rdep.full) == (done.count("asked"), sum(full))


def test_inside_an_attempt_a_forward_pass_runs_once_and_the_attempt_is_judged_whole() -> None:
  rdep, done = Rdep(tiny(), ops), []
  rdep.num_ranks, rdep.one_round, rdep.exchange = 2, False, Played()

  def passes() -> str:
    for overflows in (True, False):
      forward = partial(done.append, overflows)
      rdep.run(forward, lambda: done.append("forgotten"), last=not overflows)
      rdep.exchange.full |= overflows
    return "wrong"

  assert rdep.attempt(passes) == (False, None) and done == [True, False]
  assert rdep.attempt(lambda: "right") == (True, "right")
  assert (rdep.waited, rdep.full, rdep.one_round) == (0, 0, False)

  def dies() -> None:
    raise RuntimeError("of a kernel")

  with pytest.raises(RuntimeError, match="of a kernel"):
    rdep.attempt(dies)
  assert not rdep.one_round


class Repeating(Parallel):
  """One rank whose forward passes run again where `again` says so."""

  again: Iterator[bool]

  def run(self, forward: Callable, forget: Callable[[], None], *, last: bool):
    if next(self.again):
      forward()
      forget()
    return forward()


def a_step(again: list[bool]) -> dict[str, np.ndarray]:
  """All that a step of MICROS micro-batches leaves, sampled by both recorders."""
  config = tiny(
    target__emulate_blockscale=True,
    target__dtype="fp8",
    precision__linears=("q", "o"),
    moe__expert_dim=32,
    train__micro_batch=2,
    train__flight_every=1,
    train__routing_every=1,
    schedule__batch_tokens=2 * MICROS * 24,
  )
  ranks = Repeating()
  ranks.again = iter(again)
  model = Model(config, ops)
  model.init_weights(0)
  source_B = np.arange(2 * MICROS) % 2
  loader = SimpleNamespace(
    data=SimpleNamespace(sources=[SimpleNamespace(name="a"), SimpleNamespace(name="b")]),
    seq_len=24,
    locate=lambda ids: (source_B[ids], None, None),
  )
  device = torch.device("cpu")
  session = SimpleNamespace(config=config, parallel=ranks, target=SimpleNamespace(device=device))
  passes = Passes(session, TrainState(model, None), Clock(device), loader)
  batch = torch.randint(0, 97, (2 * MICROS, 25), generator=torch.Generator().manual_seed(0))
  loss, count_LE, loss_T = passes(batch[:, :-1], batch[:, 1:])
  assert next(ranks.again, None) is None
  found = {"loss": loss, "counts": count_LE, "losses": loss_T.detach()}
  found |= {name: p.grad for name, p in model.named_parameters()}
  left = {name: x.float().numpy() for name, x in found.items()}
  return left | passes.routing.stop() | passes.flight.stop()


@pytest.mark.parametrize("again", [[True, False, False], [False, True, True]])
def test_a_pass_that_runs_again_leaves_what_it_leaves_alone(again: list[bool]) -> None:
  """Gradients and counts, and what the recorders saw of it and of the passes before."""
  wanted, found = a_step([False] * MICROS), a_step(again)
  assert {"gate", "source a", "source b", "flight/0/q/fprop_x/sqnr_db"} <= wanted.keys()
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
