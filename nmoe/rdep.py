"""RDEP: expert parallelism by direct writes, forward and backward, without all-to-all.

R ranks; expert e lives on rank e // (E/R). A layer's forward pass on every rank:
  1. counts   write the tokens per expert into every rank's count[source]; all ranks then hold the
              same [R, E] matrix and compute the same places: expert-major, then source rank, then
              token, then k.
  2. dispatch write each row (t, k) of x to its place in its owner's buffer.
  3. experts  the owner copies the rows out and runs the grouped products over them.
  4. return   write each result to back[t·K + k] of the rank that it came from.
  5. combine  y[t] = Σ_k gate[t, k] · back[t, k] in fp32, k ascending.
Backward dispatches dy and the gates to the same places, and returns dx rows and one gate gradient
per row. A place is a pure function of the routing, so N ranks multiply the same rows in the same
order as one.

Rounds. A rank's buffer holds C = capacity · T·K rows. If some rank has more, all ranks know it from
the counts and run ⌈rows / C⌉ rounds over windows of C places; nothing is dropped. The first round
keeps for backward the received rows, their results and what grouped_mlp keeps (3 to 5 tensors of at
most C rows a layer); later rounds keep nothing: backward dispatches their x again. So neither
buffers nor kept activations exceed C rows, whatever the imbalance.

Why buffers are never overwritten too early, without a barrier. Trip s (see
kernels.reference.exchange) is: all send, all receive, all reply to all, all wait for the replies.
Each rank goes through the trips in order, and it signals every rank in every trip, with or without
rows.
  * row, gate, origin of q are written by r in trip s+1 only after r had the reply s of q, which q
    sends after it has copied its rows of trip s out.
  * back of r is written by q in trip s+1 only after q had the rows s+1 of r, which r sends after it
    has read what it wanted from trip s. Rounds of one pass write disjoint items of back, and r
    reads them after the last.
  * count of q is written by r for the next layer only after r had the reply of q to the layer
    before, which q sends after it has used the counts.
A rank that stops stops the others at their deadline, before they use anything incomplete.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.buffers import COUNTS, DISPATCH, RETURN
from kernels.ops import Recipe
from nmoe.config import Config
from nmoe.errors import CommError
from nmoe.heap import Heap, buffer_layout

KIND_NAMES = {COUNTS: "counts", DISPATCH: "rows", RETURN: "returned rows"}


class Places(NamedTuple):
  """Where rows lie, as every rank computes it from the counts."""

  base_RE: Tensor  # int64: place of rank r's first row for expert e in the owner's sorted rows
  start_E: Tensor  # int64: place of expert e's first row in its owner's sorted rows, aligned
  end_R: Tensor  # int64: places that rank r's rows take in all, padding included


def places(count_RE: Tensor, alignment: int) -> Places:
  """Expert-major, then source rank; experts start at multiples of `alignment`. A pure function."""
  ranks, experts = count_RE.shape
  count_RE = count_RE.long()
  padded_RL = (-(-count_RE.sum(0) // alignment) * alignment).view(ranks, experts // ranks)
  start_E = (padded_RL.cumsum(1) - padded_RL).flatten()
  before_RE = count_RE.cumsum(0) - count_RE
  return Places(start_E + before_RE, start_E, padded_RL.sum(1))


class Rdep:
  """The communication of all MoE layers of one process; owns the symmetric heap.

  `ops` and `exchange` are of the target's kernels: the contract's operations, and the row movers
  with their shared memory. group: the ranks, a gloo group; None for one rank, which needs only ops.
  Collective. `rounds[layer]` is the number of rounds of the layer's last forward pass.
  """

  def __init__(
    self,
    config: Config,
    ops: ModuleType,
    group: dist.ProcessGroup | None = None,
    exchange: ModuleType | None = None,
  ):
    self.config, self.ops = config, ops
    self.rank, self.num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    self.num_experts = config.moe.num_experts
    self.first = self.num_experts // self.num_ranks * self.rank
    self.rounds: dict[int, int] = {}
    self.trip = self.done = 0  # the last trip begun, and the last whose replies have all come
    if self.num_ranks > 1:
      self.heap = Heap(buffer_layout(config), exchange.allocate, group)
      self.exchange = exchange.Exchange(self.heap.peers, self.rank, config.rdep.deadline_s)

  def experts(
    self,
    x_TD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    recipe: Recipe,
    *,
    layer: int,
    shared: Callable[[Tensor], Tensor] | None = None,
  ) -> Tensor:
    """Σ_k gate · expert(x), plus shared(x) if given, which runs while rows travel: [T, D].

    Collective: every rank calls it for the same layers in the same order, each with its own T (0
    included, at most micro_batch · seq_len). w13 [E/R, 2F, D] and w2 [E/R, D, F] are this rank's
    experts; their gradients sum over the tokens of all ranks. expert_TK holds global ids. Raises
    CommError when a peer misses the deadline.
    """
    if self.num_ranks == 1:
      self.rounds[layer] = 1
      layout = self.ops.layout(expert_TK, self.num_experts)
      y_TD = self.ops.experts(x_TD, gate_TK, layout, w13, w2, recipe)
      return y_TD if shared is None else y_TD + shared(x_TD)
    grad = torch.is_grad_enabled()
    if grad and not x_TD.requires_grad:
      x_TD = x_TD.detach().requires_grad_()  # all ranks must come to the backward pass
    call = _Call(self, layer, recipe, keep=grad)
    sent = _Send.apply(call, x_TD, gate_TK, expert_TK)
    beside_TD = None if shared is None else shared(x_TD)
    y_TD = _Receive.apply(call, sent, w13, w2)
    return y_TD if beside_TD is None else y_TD + beside_TD

  def next_trip(self) -> int:
    """The next handshake's number. The previous one must be over: see the module's docstring."""
    assert self.done == self.trip, "RDEP: a backward pass was left unfinished; use Tensor.backward"
    self.trip += 1
    return self.trip


class _Send(torch.autograd.Function):
  """Counts and the first dispatch; backward: the returned dx rows and gate gradients."""

  @staticmethod
  def forward(ctx: Any, call: _Call, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
    ctx.call = call
    call.start(x_TD, gate_TK, expert_TK)
    return x_TD.new_zeros(())

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, _: Tensor) -> tuple:
    dx_TD, dgate_TK = ctx.call.finish_backward()
    return None, dx_TD, dgate_TK, None


class _Receive(torch.autograd.Function):
  """Experts, return, combine; backward: dispatch of dy, the experts' gradients, return of dx."""

  @staticmethod
  def forward(ctx: Any, call: _Call, sent: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    ctx.call = call
    ctx.save_for_backward(w13, w2)
    return call.forward(w13, w2)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy_TD: Tensor) -> tuple:
    dw13, dw2 = ctx.call.start_backward(dy_TD.contiguous(), *ctx.saved_tensors)
    return None, dy_TD.new_zeros(()), dw13, dw2


class _Kept(NamedTuple):
  """One round on the owner: received rows (a leaf), their results and the sources' items."""

  x_CD: Tensor
  y_CD: Tensor
  weights: tuple[Tensor, Tensor]
  origin_C: Tensor


class _Call:
  """One layer's forward pass and its backward pass on one rank."""

  def __init__(self, rdep: Rdep, layer: int, recipe: Recipe, *, keep: bool):
    self.rdep, self.layer, self.recipe, self.keep = rdep, layer, recipe, keep
    self.kept: _Kept | None = None
    self.phase = "forward"

  def start(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> None:
    rdep = self.rdep
    self.x_TD, self.gate_TK = x_TD.detach(), gate_TK.detach()
    self._check(expert_TK)
    layout = rdep.ops.layout(expert_TK, rdep.num_experts)
    self._next(0)
    rdep.exchange.post_counts(self.trip, layout.offset_E1.diff())
    self.count_RE = None
    self._wait(COUNTS)
    self.count_RE = rdep.heap.mine.count_RE.clone()
    self.places = places(self.count_RE, rdep.config.rdep.alignment)
    expert_N = expert_TK.flatten().long()
    within_N = layout.row_TK.flatten() - layout.offset_E1[expert_N]
    self.owner_N = expert_N // (rdep.num_experts // rdep.num_ranks)
    self.row_N = self.places.base_RE[rdep.rank, expert_N] + within_N
    self._send(self.x_TD, None)

  def forward(self, w13: Tensor, w2: Tensor) -> Tensor:
    """[T, D] combined; called after `start`."""
    rdep = self.rdep
    end_R = (
      self.places.end_R.tolist()
    )  # the one host synchronisation of a layer: sizes of what follows
    self.end, self.rounds = end_R[rdep.rank], max(-(-max(end_R) // rdep.exchange.capacity), 1)
    rdep.rounds[self.layer] = self.rounds
    for number in range(self.rounds):
      if number > 0:
        self._next(number)
        self._send(self.x_TD, None)
      x_CD, _, origin_C = self._receive()
      kept = self._run(x_CD, origin_C, w13, w2, self.keep and number == 0)
      rdep.exchange.reply(self.trip, origin_C, kept.y_CD.detach(), None)
      self._wait(RETURN)
      if self.keep and number == 0:
        self.kept = kept
    return rdep.ops.combine(self._back().clone(), self.gate_TK)

  def start_backward(self, dy_TD: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' gradients; leaves the last trip's replies under way for `finish_backward`."""
    assert self.kept is not None, "RDEP: backward ran twice, or after a pass without gradients"
    self.phase, kept, self.kept = "backward", self.kept, None
    dw13, dw2 = self._round_backward(0, kept, dy_TD)
    for number in range(1, self.rounds):
      self._wait(RETURN)
      more13, more2 = self._round_backward(number, self._again(number, w13, w2), dy_TD)
      dw13, dw2 = dw13 + more13, dw2 + more2
    return dw13, dw2

  def _round_backward(self, number: int, kept: _Kept, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
    """One trip: dy and gates come, dx rows and gate gradients go. Returns dw13 and dw2."""
    self._next(number)
    self._send(dy_TD, self.gate_TK)
    dy_CD, gate_C, _ = self._receive()
    dgate_C = (dy_CD.float() * kept.y_CD.detach().float()).sum(1)
    scaled_CD = (gate_C[:, None] * dy_CD.float()).to(dy_CD.dtype)
    dx_CD, dw13, dw2 = torch.autograd.grad(kept.y_CD, (kept.x_CD, *kept.weights), scaled_CD)
    self.rdep.exchange.reply(self.trip, kept.origin_C, dx_CD, dgate_C)
    return dw13, dw2

  def finish_backward(self) -> tuple[Tensor, Tensor]:
    """dx [T, D], summed over k in fp32, and the gates' gradients [T, K]."""
    assert self.trip == self.rdep.trip, "RDEP: another layer ran inside this layer's backward pass"
    self._wait(RETURN)
    dx_TD = self.rdep.ops.combine(self._back().clone(), torch.ones_like(self.gate_TK))
    dgate_N = self.rdep.heap.mine.back_gate_N[: self.gate_TK.numel()]
    return dx_TD, dgate_N.view_as(self.gate_TK).to(self.gate_TK.dtype, copy=True)

  def _again(self, number: int, w13: Tensor, w2: Tensor) -> _Kept:
    """A later round's rows and results, from another dispatch of x."""
    self._next(number)
    self._send(self.x_TD, None)
    x_CD, _, origin_C = self._receive()
    self.rdep.exchange.reply(self.trip, origin_C, None, None)
    self._wait(RETURN)
    return self._run(x_CD, origin_C, w13, w2, True)

  def _run(self, x_CD: Tensor, origin_C: Tensor, w13: Tensor, w2: Tensor, keep: bool) -> _Kept:
    """The grouped experts over this round's rows."""
    rdep = self.rdep
    start_E1 = torch.cat([self.places.start_E[self._mine()], self.places.end_R[rdep.rank, None]])
    offset_E1 = (start_E1 - self._low()).clamp(0, x_CD.shape[0]).int()
    if keep:
      x_CD = x_CD.requires_grad_()
      w13, w2 = w13.detach().requires_grad_(), w2.detach().requires_grad_()
    with torch.set_grad_enabled(keep):
      y_CD = rdep.ops.grouped_mlp(x_CD, offset_E1, w13, w2, self.recipe)
    return _Kept(x_CD, y_CD, (w13, w2), origin_C)

  def _send(self, x_TD: Tensor, gate_TK: Tensor | None) -> None:
    self.rdep.exchange.send(self.trip, x_TD, gate_TK, self.owner_N, self.row_N, self._low())

  def _receive(self) -> tuple[Tensor, Tensor, Tensor]:
    self._wait(DISPATCH)
    capacity = self.rdep.exchange.capacity
    return self.rdep.exchange.receive(min(max(self.end - self._low(), 0), capacity))

  def _next(self, number: int) -> None:
    """Begin this pass's next trip, of the given round."""
    self.trip, self.round = self.rdep.next_trip(), number

  def _low(self) -> int:
    return self.round * self.rdep.exchange.capacity

  def _back(self) -> Tensor:
    num_tokens, top_k = self.gate_TK.shape
    return self.rdep.heap.mine.back_ND[: num_tokens * top_k].unflatten(0, (num_tokens, top_k))

  def _mine(self) -> slice:
    rdep = self.rdep
    return slice(rdep.first, rdep.first + rdep.num_experts // rdep.num_ranks)

  def _check(self, expert_TK: Tensor) -> None:
    rows = self.rdep.exchange.rows
    if expert_TK.numel() > rows:
      raise CommError(
        f"rank {self.rdep.rank}, layer {self.layer}: {expert_TK.shape[0]} tokens of "
        f"{expert_TK.shape[1]} experts do not fit the {rows} rows of train.micro_batch · "
        "data.seq_len · moe.top_k; raise train.micro_batch or pass fewer tokens"
      )

  def _wait(self, kind: int) -> None:
    late = self.rdep.exchange.wait(kind, self.trip)
    if late:
      raise CommError(self._post_mortem(kind, late))
    if kind == RETURN:
      self.rdep.done = self.trip

  def _post_mortem(self, kind: int, late: list[int]) -> str:
    """Who is late, at what, and how many rows were expected and have arrived."""
    rdep = self.rdep
    if self.count_RE is None:
      rows = "the number of rows was not yet known"
    else:
      expected_R = self._expected(kind)
      here = sum(n for r, n in enumerate(expected_R) if r not in late)
      missing = ", ".join(f"{expected_R[r]} from rank {r}" for r in late)
      rows = f"of {sum(expected_R)} rows expected {here} arrived; missing {missing}"
    return (
      f"rank {rdep.rank} of {rdep.num_ranks}, layer {self.layer}, {self.phase}, round {self.round}:"
      f" {KIND_NAMES[kind]} of rank {', '.join(map(str, late))} did not come within "
      f"{rdep.config.rdep.deadline_s:g} s ({rows}). See that rank's log; if it is alive but slow, "
      "raise rdep.deadline_s"
    )

  def _expected(self, kind: int) -> list[int]:
    """Rows of this round by peer: sent to this rank (DISPATCH) or coming back to it (RETURN)."""
    rdep, count_RE = self.rdep, self.count_RE.long()
    low = self.places.base_RE.clamp(min=self._low())
    high = (self.places.base_RE + count_RE).clamp(max=self._low() + rdep.exchange.capacity)
    rows_RE = (high - low).clamp(min=0)
    if kind == DISPATCH:
      return rows_RE[:, self._mine()].sum(1).tolist()
    return rows_RE[rdep.rank].view(rdep.num_ranks, -1).sum(1).tolist()
