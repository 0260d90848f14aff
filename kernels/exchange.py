"""The contract of RDEP's communication: rows between the ranks of one expert group.

Three classes implement it, and `tests/kernels/test_exchange_contract.py` compares them with it:
`kernels.reference.exchange` (the host's stores, POSIX shared memory), `kernels.cuda.exchange`
(kernels that store through the peers' mapped memory) and `kernels.cuda.puts` (NVSHMEM puts, for
ranks that cannot map each other's memory). A `Memory` is the module that holds one of them, with
the shared memory it needs; a target picks one, once, at start (`nmoe.machine.target`).

A *trip* is one numbered handshake of all ranks: every rank sends rows to their owners (DISPATCH),
and every owner answers every rank (RETURN); the first trip of a layer begins with the counts
(COUNTS). Trip numbers only grow, so a signal is never reset. A rank signals every rank, itself
among them, once a kind and trip, with rows or without, and only after what it announces is written.

A rank's trip is, in this order: post_counts, wait(COUNTS), places; send, wait(DISPATCH), receive;
multiply or rows of one's own, reply, wait(RETURN), collect. A later trip of the same pass has no
counts. On a GPU all work is queued on the current stream; only `overflowed`, a call of `Fetched`
and `late` look at the device from the host.

Shape letters: T tokens of this rank, K experts of a token, N = T·K rows that this rank sends,
R ranks, E experts of all ranks, C rows that a rank's buffer holds, n ≤ C received rows, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from kernels.buffers import Buffers, Route
from kernels.ops import Product
from kernels.places import Places


class Fetched(Protocol):
  """Integers ≥ 0 on their way to the host."""

  def __call__(self) -> list:
    """The values as nested lists; waits for them and for no later work."""

  def here(self) -> list | None:
    """The values if they have come, without waiting; also after a wait failed."""


class Exchange(Protocol):
  """The movers of one rank. Made as Exchange(peers, rank, deadline_s); its origins are then -1."""

  peers: list[Buffers]  # of all ranks, by rank, mapped here; this rank's own among them
  rank: int
  capacity: int  # C
  in_place: bool  # the buffer has several slots of C rows, and `receive` copies none
  rows: int  # the largest N
  blocks: int | None  # SMs that moving rows takes at most; None where there are none
  fused: bool  # `multiply` returns rows itself; may be set between trips

  def post_counts(self, trip: int, count_E: Tensor) -> None:
    """Write this rank's int32 [E] tokens per expert into every rank's count_RE[rank]; COUNTS."""

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
    """Write row (t, k) of x to its place in its owner's slot, if that is in low : low + C.

    The rows of an expert follow its base in the layout's order. fp32 gates go along if given; the
    items' origins do, but where rows come home by their packed places (puts). Then DISPATCH. x has
    the buffers' dtype and width and is quantized here, but as "bf16" travels as it is; all ranks
    send and receive one format in one trip. Raises KernelError for another dtype, width or format
    than the buffers hold.
    """

  def receive(self, num_rows: int, format: str, slot: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The first rows [n, D] of a slot; copies of their gates fp32 [n] and origins int32 [n].

    Comes after the wait for DISPATCH. An origin is source rank · rows + t·K + k, or -1 where nobody
    sent a row, whose gate is undefined. The buffer's origins are reset to -1. With `in_place` the
    rows are the slot's own memory, until a peer writes it again; one that nobody sent is what was
    there before. Else they are copies, the buffer is free, and a row that nobody sent is zero; rows
    of another format than "bf16" are dequantized, in bf16 exactly. Without origins (puts) all are
    -1, and a row that nobody sent is undefined.
    """

  def multiply(
    self, product: Product, origin_C: Tensor, gate_C: Tensor | None = None
  ) -> Tensor | None:
    """The product's rows [n, D], for `reply`; None if they, and the gate gradients, were written to
    their origins here (`fused`): then `reply` has only to say so. Comes between receive and reply.
    """

  def reply(
    self,
    trip: int,
    origin_C: Tensor,
    row_CD: Tensor | None,
    gate_C: Tensor | None,
    route: Route,
    low: int,
  ) -> None:
    """Write each row, and fp32 gate gradient, to back_ND[t·K + k] of its origin; then RETURN.

    row_CD is None if no rows are to be written. route and low are those of the rows' dispatch.
    """

  def collect(self, route: Route) -> tuple[Tensor, Tensor]:
    """What came back: rows [T, K, D] and gate gradients fp32 [T, K], valid until the next trip.

    Comes after the wait for RETURN.
    """

  def wait(self, kind: int, trip: int) -> list[int]:
    """Let what follows come after all ranks' signals of this kind have reached `trip`.

    Returns the ranks that missed the deadline, [] if none did. On a GPU the wait is queued and the
    answer is always []: a missed deadline stops the device, every later call raises CUDA's error,
    and `late` says which wait it was.
    """

  def late(self) -> tuple[int, int, list[int]] | None:
    """(kind, trip, late ranks) of a queued wait that missed its deadline, if one did."""

  def beside(self) -> AbstractContextManager[None]:
    """What is queued inside may run at the same time as what follows, until `join`."""

  def leaving(self) -> AbstractContextManager[None]:
    """Inside, a SwiGLU block's first product leaves `blocks` SMs to what was queued `beside`."""

  def join(self) -> None:
    """What is queued from here on comes after all that was queued inside `beside`."""

  def places(self, alignment: int) -> tuple[Tensor, Places]:
    """(the counts that came, int64 [R, E], a copy; where all rows lie: kernels.places.places)."""

  def mark(self) -> None:
    """Says that all `places` until `overflowed` are queued, and joined. In a CUDA graph it says so
    of each replay, which comes after a call of `overflowed`.
    """

  def overflowed(self) -> bool:
    """Whether some rank had more rows than its buffer holds, in any `places` since the last call;
    the same on every rank. Waits for what was queued before the `mark`, and for no later work;
    without one, for what is queued on the current stream.
    """

  def fetch(self, x: Tensor, before: Fetched | None = None) -> Fetched:
    """x, integers ≥ 0, on its way to the host; the copy is queued now. before: an earlier one of
    x's shape, whose place the values take and which nobody asks any more; until they have come,
    `here` may tell its values.
    """

  def replayed(self, trips: int) -> AbstractContextManager[None]:
    """Calls that were captured in a CUDA graph, and are queued again inside, count their trips so
    much higher than they were told. Other calls do not belong inside.
    """


class MakeExchange(Protocol):
  """How an Exchange is made."""

  def __call__(self, peers: list[Buffers], rank: int, deadline_s: float) -> Exchange:
    """deadline_s: seconds that a wait lasts at most."""


class Memory(Protocol):
  """A module: the memory that ranks share, and the movers that work on it."""

  Exchange: MakeExchange

  def allocate(self, nbytes: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Zeroed uint8 [nbytes] of every rank of the group (gloo), by rank. Collective.

    Where a peer's block cannot be mapped, this rank's own stands in its place (puts). Raises
    KernelError, on every rank, where the memory cannot be had.
    """

  def release(self, mine: Tensor) -> None:
    """Give this rank's block of `allocate` back. Collective; no block may be used after."""
