"""The host side of kernels.cuda.puts against kernels.reference.exchange, ranks in one process.

Started by test_without_gpu.py in the environment of an architecture. Device code is compiled, and
its effect (bytes from one block to another) is done here by copies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import reference
from kernels.buffers import DISPATCH, Buffers, Route, views
from kernels.cuda import exchange as direct
from kernels.cuda import jit, puts
from kernels.places import places
from kernels.reference.exchange import Exchange
from kernels.sizes import BufferLayout

R, HELD, K, D, ROWS = 3, 2, 2, 8, 12
E = R * HELD


class Copies(puts.Exchange):
  """Pieces copied between the ranks' blocks, which stand in `memory`."""

  def __init__(self, memory: list[Tensor], peers: list[Buffers], rank: int):
    super().__init__(peers, rank, 1.0)
    self.memory = memory

  def _put(self, piece_P4: Tensor) -> None:
    for source, target, size, rank in piece_P4.tolist():
      self.memory[rank][target : target + size] = self.memory[self.rank][source : source + size]

  def _signal(self, kind: int, trip: int) -> None:
    pass

  def _launch_send(self, x_TD, gate_TK, route: Route, low: int, format: str, packed: bool) -> None:
    """What the kernel Send does when packed: rows of this window to the layout's order."""
    assert packed
    expert_N = route.expert_TK.flatten().long()
    row_N = route.layout.row_TK.flatten().long()
    within_N = row_N - route.layout.offset_E1[expert_N]
    place_N = route.base_RE[self.rank, expert_N] + within_N - low
    item = ((place_N >= 0) & (place_N < self.capacity)).nonzero().flatten()
    self.mine.back_ND[row_N[item]] = x_TD[item // K]
    if gate_TK is not None:
      self.mine.back_gate_N[row_N[item]] = gate_TK.flatten()[item]


def blocks(layout: BufferLayout) -> tuple[list[Tensor], list[Buffers]]:
  memory = [torch.zeros(layout.nbytes + 256, dtype=torch.uint8) for _ in range(R)]
  memory = [m[-m.data_ptr() % 256 :][: layout.nbytes] for m in memory]
  return memory, [views(layout, m) for m in memory]


def check(capacity: int, seed: int, tokens: list[int]) -> int:
  """Two passes (with and without gates) in all rounds; the buffers' contents must agree."""
  torch.manual_seed(seed)
  layout = BufferLayout(R, E, capacity, ROWS, D, "fp32")
  (memory, ours), (_, theirs) = blocks(layout), blocks(layout)
  expert = [torch.randint(0, E, (t, K), dtype=torch.int32) for t in tokens]
  order = [reference.layout(e, E) for e in expert]
  movers = [Copies(memory, ours, r) for r in range(R)]
  assert all((m.put, m.signal) == puts._kernels() for m in movers)  # one library a process
  wanted = [Exchange(theirs, r, 1.0) for r in range(R)]
  for group in (movers, wanted):
    for r, mover in enumerate(group):
      mover.post_counts(1, order[r].offset_E1.diff())
  assert all(torch.equal(a.count_RE, b.count_RE) for a, b in zip(ours, theirs, strict=True))
  count_RE = ours[0].count_RE.long()
  where = places(count_RE, 1)
  routes = [Route(e, o, count_RE, where.base_RE) for e, o in zip(expert, order, strict=True)]
  rounds = max(math.ceil(int(where.end_R.max()) / capacity), 1)
  for gates in (None, [torch.rand(t, K) for t in tokens]):
    x = [torch.randn(t, D) for t in tokens]
    for low in range(0, rounds * capacity, capacity):
      for group in (movers, wanted):
        for r, mover in enumerate(group):
          mover.send(DISPATCH, x[r], gates and gates[r], routes[r], low, "bf16")
      for r, (mover, other) in enumerate(zip(movers, wanted, strict=True)):
        num_rows = min(max(int(where.end_R[r]) - low, 0), capacity)
        row, gate, origin = mover.receive(num_rows, "bf16")
        want_row, want_gate, want_origin = other.receive(num_rows, "bf16")
        assert torch.equal(row, want_row)
        assert gates is None or torch.equal(gate, want_gate)
        mover.reply(1, origin, row * 3, gate if gates else None, routes[r], low)
        other.reply(1, want_origin, want_row * 3, want_gate if gates else None, routes[r], low)
    for r in range(R):
      found, want = movers[r].collect(routes[r]), wanted[r].collect(routes[r])
      assert torch.equal(found[0], want[0])
      assert gates is None or torch.equal(found[1], want[1])
  return rounds


if __name__ == "__main__":
  direct.check_device = lambda device: None
  with jit.compile_mode():
    seen = {
      check(capacity, seed, tokens)
      for capacity in (1, 5, 30)
      for seed, tokens in enumerate(([6, 6, 6], [0, 3, 6], [0, 0, 1]))
    }
  assert min(seen) == 1 and max(seen) > 5
