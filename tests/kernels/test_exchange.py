"""RDEP's reference arithmetic without processes: the places of rows, and that no row is lost."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.reference as ops
from kernels.buffers import RETURN, Route, views
from kernels.places import places
from kernels.reference import exchange
from kernels.sizes import BufferLayout

K = 2

counts = st.integers(1, 4).flatmap(
  lambda r: st.integers(1, 3).flatmap(
    lambda e: st.lists(
      st.lists(st.integers(0, 5), min_size=r * e, max_size=r * e), min_size=r, max_size=r
    )
  )
)


@settings(max_examples=60, deadline=None)
@given(counts, st.sampled_from([1, 4, 16]))
def test_places(count: list[list[int]], alignment: int) -> None:
  """Each owner: rows by (expert, source), disjoint, experts aligned, no gap inside one."""
  count_RE = torch.tensor(count)
  num_ranks, num_experts = count_RE.shape
  found = places(count_RE, alignment)
  held = num_experts // num_ranks
  for owner in range(num_ranks):
    end = 0
    for e in range(owner * held, (owner + 1) * held):
      end = math.ceil(end / alignment) * alignment
      assert found.edge_RL1[owner, e - owner * held] == end
      for source in range(num_ranks):
        assert found.base_RE[source, e] == end
        end += count[source][e]
    assert found.end_R[owner] == math.ceil(end / alignment) * alignment


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_are_conserved(data: st.DataObject) -> None:
  """Rows sent = received = returned, per expert and source, for any routing, in any rounds."""
  num_ranks, held, capacity = (
    data.draw(st.integers(*bounds)) for bounds in ((1, 4), (1, 3), (1, 9))
  )
  num_experts = num_ranks * held
  routing = [
    torch.tensor(
      data.draw(
        st.lists(st.integers(0, num_experts - 1), max_size=8).filter(lambda x: len(x) % K == 0)
      ),
      dtype=torch.int32,
    ).view(-1, K)
    for _ in range(num_ranks)
  ]
  layout = BufferLayout(num_ranks, num_experts, capacity, 8, 2, "fp32")
  blocks = [views(layout, aligned(layout.nbytes)) for _ in range(num_ranks)]
  movers = [exchange.Exchange(blocks, r, 1.0) for r in range(num_ranks)]
  orders = [ops.layout(expert_TK, num_experts) for expert_TK in routing]
  for mover, order in zip(movers, orders, strict=True):
    mover.post_counts(1, order.offset_E1.diff())
  count_RE = blocks[0].count_RE
  assert all(torch.equal(block.count_RE, count_RE) for block in blocks)
  where = places(count_RE, 1)
  routes = [
    Route(expert_TK, order, count_RE.long(), where.base_RE)
    for expert_TK, order in zip(routing, orders, strict=True)
  ]
  received_RE = torch.zeros(num_ranks, num_experts, dtype=torch.int32)
  for block in blocks:
    block.back_ND.fill_(torch.nan)
  for number in range(max(math.ceil(int(where.end_R.max()) / capacity), 1)):
    low = number * capacity
    for r, mover in enumerate(movers):
      token_T = torch.arange(len(routing[r]))
      x_TD = torch.stack([torch.full_like(token_T, r), token_T], 1).float()
      mover.send(number + 1, x_TD, None, routes[r], low, "bf16")
    for owner, mover in enumerate(movers):
      num_rows = min(max(int(where.end_R[owner]) - low, 0), capacity)
      row_CD, _, origin_C = mover.receive(num_rows, "bf16")
      assert (origin_C >= 0).all() and (blocks[owner].origin_C == -1).all()
      for row, (origin, x) in enumerate(zip(origin_C.tolist(), row_CD.tolist(), strict=True)):
        source, item = divmod(origin, 8)
        expert = int(routing[source].flatten()[item])
        assert x == [source, item // K] and expert // held == owner
        place = int(where.base_RE[source, expert] + received_RE[source, expert])
        assert place == low + row
        received_RE[source, expert] += 1
      mover.reply(number + 1, origin_C, row_CD * 10, None, routes[owner], low)
  assert torch.equal(received_RE, count_RE)
  for r, block in enumerate(blocks):
    items = routing[r].numel()
    token_N = torch.arange(items) // K
    assert torch.equal(
      block.back_ND[:items], torch.stack([torch.full((items,), r), token_N], 1) * 10.0
    )
    assert block.back_ND[items:].isnan().all()


def test_a_replay_counts_its_trips_higher() -> None:
  layout = BufferLayout(1, 1, 4, 8, 2, "fp32")
  block = views(layout, aligned(layout.nbytes))
  mover = exchange.Exchange([block], 0, 0.01)
  with mover.replayed(4):
    mover.reply(3, block.origin_C, None, None, None, 0)
    assert block.signal_KRS[RETURN, 0, 0] == 7
    assert mover.wait(RETURN, 3) == []
    assert mover.wait(RETURN, 4) == [0]
  assert mover.wait(RETURN, 7) == []
  assert mover.wait(RETURN, 8) == [0]


def aligned(nbytes: int) -> Tensor:
  memory = torch.zeros(nbytes + 256, dtype=torch.uint8)
  start = -memory.data_ptr() % 256
  return memory[start : start + nbytes]
