"""RDEP: passes that are queued again with the numbers of the trips that they were first told, as a
CUDA graph queues them, travel in trips of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ranks
import torch
from rdep_cases import CASES, RECIPE, Data, config, make, share, step

import kernels.reference as ops
from kernels.reference import exchange, symmetric
from nmoe.distributed import trips
from nmoe.distributed.rdep import Rdep
from nmoe.distributed.trips import Trips

CASE = CASES["uneven tokens"]
LAYERS = 2


class Noting(exchange.Exchange):
  """Notes each trip's number, as signalled, and the slot that its rows go to."""

  sent: list[tuple[int, int]]

  def send(self, trip, x_TD, gate_TK, route, low, format, slot=0) -> None:
    self.sent.append((trip + self.higher, slot))
    super().send(trip, x_TD, gate_TK, route, low, format, slot)


@contextmanager
def told_again(rdep: Rdep) -> Iterator[None]:
  """Inside, the trips are told the numbers that the captured ones were, as a graph tells them."""
  with rdep.replayed():
    now, rdep.trips = rdep.trips, Trips()
    rdep.trips.repeat([rdep.trips.of(0)], rdep.capture.after)
    rdep.trips.done = rdep.capture.after
    yield
    rdep.trips = now


def both_layers(rdep: Rdep, data: Data) -> list:
  leaves = [share(CASE, data, rdep.rank, rdep.num_ranks) for _ in range(LAYERS)]
  return [step(rdep, d, layer) for layer, d in enumerate(leaves)]


def evaluated(rdep: Rdep, data: Data) -> None:
  """One layer forward: an odd number of trips."""
  d = share(CASE, data, rdep.rank, rdep.num_ranks)
  with torch.no_grad():
    rdep.experts(d.x_TD, d.expert_TK, d.gate_TK, d.w13, d.w2, RECIPE, layer=0)


def replays(group, between: int) -> tuple[list, list, list[tuple[int, int]], list[int], int]:
  """What passes of two layers give when replayed behind `between` evaluations, twice; what they
  give anew; the trips with rows, all trips that a post-mortem knows, and the last slot.
  """
  rdep = Rdep(config(group.size(), CASE), ops, group, symmetric)
  rdep.exchange = Noting(rdep.heap.peers, rdep.rank, 20.0)
  rdep.exchange.sent = []
  data = make(CASE, 1)
  both_layers(rdep, make(CASE, 0))
  with rdep.captured():
    both_layers(rdep, make(CASE, 0))
  for _ in range(2 * LAYERS):  # a capture sends nothing: these numbers are spent here
    rdep._pause()
  counts = [t.clone() for t in rdep.capture.counts.values()]
  rdep.exchange.sent.clear()
  found = []
  for _ in range(2):
    for _ in range(between):
      evaluated(rdep, make(CASE, 2))
    with told_again(rdep):
      found.append(both_layers(rdep, data))
  assert all(torch.equal(rdep.counts[i], count) for i, count in enumerate(counts))
  known = [trip.number for trip in rdep.trips._told]
  sent, transient = list(rdep.exchange.sent), rdep.slots - 2
  return found, both_layers(rdep, data), sent, known, transient


@pytest.mark.parametrize("captured", [3, 4, 11])
def test_a_post_mortem_knows_every_trip_of_a_replay(captured: int, monkeypatch) -> None:
  """They begin at once, more of them than are told of otherwise; and those just before."""
  monkeypatch.setattr(trips, "TOLD", 4)
  told = Trips()
  with told.aside() as found:
    for layer in range(captured):
      told.done = told.begin(layer, "forward")
  assert (told.last, told.done) == (0, 0)
  for higher in (0, 2 * captured):
    told.repeat(found, higher)
    for layer in range(captured):
      assert told.of(higher + 1 + layer).layer == layer
    told.done = told.last
    while told.last < 2 * captured:
      told.done = told.begin(0, "evaluation")
  assert told.of(2 * captured).phase == "evaluation"


@pytest.mark.parametrize("between", [0, 1, 2, 3])
def test_a_replay_computes_the_same_in_trips_of_its_own(between: int) -> None:
  for found, wanted, sent, known, transient in ranks.run(replays, 2, between):
    for again in found:
      for mine, anew in zip(again, wanted, strict=True):
        for a, b in zip(mine, anew, strict=True):
          assert (a == b).all()
    numbers = [number for number, _ in sent]
    assert numbers == sorted(set(numbers)), "no number is told twice"
    assert known == sorted(set(known)) and set(numbers) <= set(known)
    slots = dict(sent)
    for number, slot in slots.items():
      if slot >= transient:
        assert slots.get(number + 1) != slot, f"trips {number} and the next share a slot"
