"""Rows between ranks of one host, written straight into the peers' shared memory.

The contract is kernels.exchange. A signal is stored after the rows that it announces; x86-64 keeps
that order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from kernels.buffers import COUNTS, DISPATCH, RETURN, Buffers, Route
from kernels.formats import BlockScaled, quantize_rows
from kernels.ops import Product
from kernels.places import Places, places
from kernels.reference.blockscale import quantize
from kernels.reference.products import multiply
from kernels.sizes import BLOCK, row_parts

YIELDS = 200  # polls that only yield the core; later ones sleep
PAUSE_S = 1e-4


class Fetched:
  """Values that are on the host."""

  def __init__(self, value: list):
    self._value = value

  def __call__(self) -> list:
    return self._value

  def here(self) -> list | None:
    return self._value


class Exchange:
  """The movers of one rank (kernels.exchange.Exchange)."""

  def __init__(self, peers: list[Buffers], rank: int, deadline_s: float):
    self.peers, self.rank, self.deadline_s = peers, rank, deadline_s
    self.mine = peers[rank]
    self.capacity, self.rows = self.mine.gate_C.shape[0], self.mine.back_ND.shape[0]
    self.in_place = self.mine.row_CD.shape[0] > self.capacity
    self.mine.origin_C.fill_(-1)
    self.blocks: int | None = None
    self.fused = True
    self.full = False
    self.higher = 0  # by which a replay's trips are

  def post_counts(self, trip: int, count_E: Tensor) -> None:
    for peer in self.peers:
      peer.count_RE[self.rank] = count_E
    self._signal(COUNTS, trip)

  def send(
    self,
    trip: int,
    x_TD: Tensor,
    gate_TK: Tensor | None,
    route: Route,
    low: int,
    format: str,
    slot: int = 0,
  ) -> None:
    row_TD = x_TD if format == "bf16" else packed(x_TD, format)
    expert_N, base_E = route.expert_TK.flatten().long(), route.base_RE[self.rank]
    owner_N = expert_N // (base_E.shape[0] // len(self.peers))
    within_N = route.layout.row_TK.flatten() - route.layout.offset_E1[expert_N]
    place_N = base_E[expert_N] + within_N - low
    inside_N = (place_N >= 0) & (place_N < self.capacity)
    for rank, peer in enumerate(self.peers):
      item = (inside_N & (owner_N == rank)).nonzero().flatten()
      place = place_N[item]
      row = row_TD[item // route.expert_TK.shape[1]]
      peer.row_CD[:, : row.shape[1]].index_copy_(0, place + slot * self.capacity, row)
      if gate_TK is not None:
        peer.gate_C.index_copy_(0, place, gate_TK.flatten()[item])
      peer.origin_C.index_copy_(0, place, (item + self.rank * self.rows).int())
    self._signal(DISPATCH, trip)

  def receive(self, num_rows: int, format: str, slot: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    origin = self.mine.origin_C[:num_rows].clone()
    self.mine.origin_C[:num_rows] = -1
    start = slot * self.capacity
    row = self.mine.row_CD[start : start + num_rows]
    if self.in_place:  # `data`: autograd would take a write to another slot for one to this
      return row.data, self.mine.gate_C[:num_rows].clone(), origin
    row = row.clone() if format == "bf16" else unpacked(row, format, self.mine.back_ND)
    row[origin < 0] = 0
    return row, self.mine.gate_C[:num_rows].clone(), origin

  def multiply(
    self, product: Product, origin_C: Tensor, gate_C: Tensor | None = None
  ) -> Tensor | None:
    row_CD = multiply(product)
    if not self.fused:
      return row_CD
    self._write_back(origin_C, row_CD, gate_C)
    return None

  def reply(
    self,
    trip: int,
    origin_C: Tensor,
    row_CD: Tensor | None,
    gate_C: Tensor | None,
    route: Route,
    low: int,
  ) -> None:
    if row_CD is not None:
      self._write_back(origin_C, row_CD, gate_C)
    self._signal(RETURN, trip)

  def collect(self, route: Route) -> tuple[Tensor, Tensor]:
    shape = route.expert_TK.shape
    items = shape.numel()
    back_TKD = self.mine.back_ND[:items].unflatten(0, shape)
    return back_TKD, self.mine.back_gate_N[:items].view(shape)

  def wait(self, kind: int, trip: int) -> list[int]:
    signal_R, trip = self.mine.signal_KRS[kind, :, 0], trip + self.higher
    end, polls = time.monotonic() + self.deadline_s, 0
    while (behind := signal_R < trip).any():
      if time.monotonic() > end:
        return behind.nonzero().flatten().tolist()
      time.sleep(0 if polls < YIELDS else PAUSE_S)
      polls += 1
    return []

  def late(self) -> tuple[int, int, list[int]] | None:
    return None

  def beside(self) -> AbstractContextManager[None]:
    return nullcontext()

  def leaving(self) -> AbstractContextManager[None]:
    return nullcontext()

  def join(self) -> None:
    """All work is done when it is called."""

  def places(self, alignment: int) -> tuple[Tensor, Places]:
    count_RE = self.mine.count_RE.long()
    found = places(count_RE, alignment)
    self.full |= int(found.end_R.max()) > self.capacity
    return count_RE, found

  def mark(self) -> None:
    """What is queued is done."""

  def overflowed(self) -> bool:
    full, self.full = self.full, False
    return full

  def fetch(self, x: Tensor, before: Fetched | None = None) -> Fetched:
    return Fetched(x.tolist())

  @contextmanager
  def replayed(self, trips: int) -> Iterator[None]:
    self.higher = trips
    yield
    self.higher = 0

  def _write_back(self, origin_C: Tensor, row_CD: Tensor, gate_C: Tensor | None) -> None:
    source_C = torch.where(origin_C < 0, -1, origin_C // self.rows)
    for rank, peer in enumerate(self.peers):
      row = (source_C == rank).nonzero().flatten()
      item = (origin_C[row] % self.rows).long()
      peer.back_ND.index_copy_(0, item, row_CD[row])
      if gate_C is not None:
        peer.back_gate_N.index_copy_(0, item, gate_C[row])

  def _signal(self, kind: int, trip: int) -> None:
    for peer in self.peers:
      peer.signal_KRS[kind, self.rank, 0] = trip + self.higher


def packed(x_TD: Tensor, format: str) -> Tensor:
  """uint8 [T, …]: the rows' bytes without padding, as kernels.sizes orders them."""
  q = quantize_rows(x_TD, format, quantize)
  parts = (q.data, q.scale) if q.tensor_scale is None else (q.data, q.tensor_scale, q.scale)
  return torch.cat([part.view(torch.uint8) for part in parts], 1)


def unpacked(row_C: Tensor, format: str, like_ND: Tensor) -> Tensor:
  """The rows [C, D] that these bytes stand for, in the other tensor's width and dtype."""
  sizes = row_parts(like_ND.shape[1], format)
  data, own, scale = row_C[:, : sum(sizes)].split(sizes, 1)
  if format == "fp8":
    data, scale, own = data.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu), None
  else:
    scale, own = scale.view(torch.float8_e4m3fn), own.view(torch.float32)
  return BlockScaled(format, data, scale, own, -1, (1, BLOCK[format])).dequantize(like_ND.dtype)
