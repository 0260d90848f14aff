"""RDEP: expert parallelism by direct writes, forward and backward, without all-to-all.

R ranks; expert e lives on rank e // (E/R). A layer's forward pass on every rank:
  1. counts   write the tokens per expert into every rank's count[source]; all ranks then hold the
              same [R, E] matrix and compute the same places: expert-major, then source rank, then
              token, then k.
  2. dispatch write each row (t, k) of x to its place in its owner's buffer, as it is or, as
              rdep.payload says, quantized at the source (kernels.sizes) and dequantized there.
  3. experts  the owner runs the grouped products over the rows where they lie, or copies them out
              first (nmoe.config.buffers says when).
  4. return   write each result to back[t·K + k] of the rank that it came from: by the exchange's
              reply, or, with `exchange.fused`, by the last product itself.
  5. combine  y[t] = Σ_k gate[t, k] · back[t, k] in fp32, k ascending.
Backward dispatches dy and the gates to the same places, and returns dx rows and one gate gradient
per row; the products of the weights' gradients come after, while rows travel. A place is a pure
function of the routing, so N ranks multiply the same rows in the same order as one.

Payload. With "mxfp8" the dispatched rows, x and dy, have 33 bytes per 32 elements; with "nvfp4" x
has 18 and a scale per row, dy is MXFP8 (kernels.sizes says why). The returned rows stay bf16
(DeepSeek-V3, arXiv 2412.19437 section 3.3). An owner's dequantized rows are exact in bf16 (infinite
from 1.9375 · 2^127 on in MXFP8, above 1.96875 · 2^127 in NVFP4). Recipe "fp8", which quantizes x's
along D again, finds MXFP8's values again, but rounds NVFP4's once more, as recipe "nvfp4" does. One
rank sends nothing, but quantizes x and dy too, so that N ranks train the same model. The
dequantized x's gradient is taken for x's.

Rounds. A rank's buffer holds C = capacity · T·K rows. If some rank has more, all ranks know it from
the counts and run ⌈rows / C⌉ rounds over windows of C places; nothing is dropped. The first round
keeps for backward what grouped_mlp_forward keeps (in bf16 the received rows and the pre-activation,
C rows a layer); later rounds keep nothing: backward dispatches their x again. So neither buffers
nor kept activations exceed C rows, whatever the imbalance.

The host. Every size is C's, and where the rows end is known on the device, so the host queues a
layer's first round without knowing the counts. Alone, a layer then waits for them, to learn the
number of rounds. A forward pass of training does not (`Rdep.run`): it queues one round a layer, and
the host learns once, when the last layer's rows are sent, whether a rank ran full in any: it queues
the backward pass while that layer's experts and the head are at work. If a rank did, all ranks of
the group know it, forget what the pass computed and repeat it with a wait in every layer, and so go
the next CROWDED passes. One round or several, the bits are the same; only an abandoned attempt's
rows beyond C are lost, with all that was computed from it. All passes of a step may be one attempt
(`Rdep.attempt`): if each layer has one round, they may be captured in a CUDA graph and replayed
(`Rdep.captured`, `Rdep.replayed`): their trips then have new numbers.

Shared experts run while rows travel: forward while counts and x do, backward while dy does. Their
first product leaves the SMs that this takes; in Moonlight's shape the rows are there by its end, or
almost. Their graph is a part of this layer's node: autograd would run its backward pass after it.

Why buffers are never overwritten too early, without a barrier. Trip s (see
kernels.exchange) is: all send, all receive, all reply to all, all wait for the replies.
Each rank goes through the trips in order, and it signals every rank in every trip, with or without
rows.
  * gate and origin of q, and its row if there is one slot, are written by r in trip s+1 only after
    r had the reply s of q, which q sends after it has copied its rows of trip s out.
  * of several slots, trip s writes slot L + s mod 2 but in a first round that keeps its rows. What
    q reads of trip s there is queued before its reply to s, or behind it, dw's products, and then
    before its reply to s+1; r writes the slot in trip s+2, which follows that reply. With several
    rounds x, sent in trip s, is read again with dy of s+1: then q replies to s+1 behind dw's
    products. A replay writes the slots that its capture wrote, so it begins an even number of trips
    after it; where that is odd, a trip of replies alone comes before.
  * a layer's own slot is written by r in a first round, and kept until q's backward pass has read
    it. r sends such rows only after it had the counts of q for that trip, which q sends after all
    that it has queued before.
  * back of r is written by q in trip s+1 only after q had the rows s+1 of r, which r sends after it
    has read what it wanted from trip s. Rounds of one pass write disjoint items of back, and r
    reads them after the last.
  * count of q is written by r for the next layer only after r had the reply of q to the layer
    before, which q sends after it has used the counts.
A rank that stops stops the others at their deadline, before they use anything incomplete.

One file: the argument above holds for the order of the calls below, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.buffers import COUNTS, DISPATCH, RETURN, Route
from kernels.exchange import Fetched, Memory
from kernels.ops import Ops, Product, Recipe
from kernels.places import places
from kernels.sizes import PAYLOADS
from nmoe.config.buffers import TRANSIENT, buffer_layout, row_slots
from nmoe.config.sections import Config
from nmoe.distributed.aside import Back, aside
from nmoe.distributed.heap import Heap
from nmoe.distributed.payload import as_received
from nmoe.distributed.trips import Trip, Trips, unknown
from nmoe.errors import CommError
from nmoe.wording import counted

Passes = TypeVar("Passes")  # what one or several passes return

# Forward passes that wait for the counts of every layer after one that overflowed. A repeated pass
# was predicted to cost as much as the waits of five (27 layers: configs/moonlight/RESULTS.md).
CROWDED = 4
KIND_NAMES = {COUNTS: "counts", DISPATCH: "rows", RETURN: "returned rows"}


class _Capture(NamedTuple):
  """The trips of passes in a CUDA graph, and what is known of their layers."""

  after: int  # the last trip before
  trips: list[Trip]
  counts: dict[int, Tensor]
  rounds: dict[int, int]


class Rdep:
  """The communication of all MoE layers of one process; owns the symmetric heap.

  `ops` and `symmetric` are of the target's kernels: the contract's operations, and the shared
  memory with its row movers. group: the ranks, a gloo group; None for one rank, needing only ops.
  Collective. Of each layer's last forward pass, `rounds[layer]` is the number of rounds and
  `counts[layer]` the tokens [R, E] that each rank sent to each expert, on the device.
  """

  def __init__(
    self,
    config: Config,
    ops: Ops,
    group: dist.ProcessGroup | None = None,
    symmetric: Memory | None = None,
  ):
    self.config, self.ops = config, ops
    self.payload = PAYLOADS[config.rdep.payload]
    self.rank, self.num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    self.names = [0] if group is None else dist.get_process_group_ranks(group)  # in the whole run
    self.num_experts = config.moe.num_experts
    self.num_local = self.num_experts // self.num_ranks
    self.first = self.num_local * self.rank
    self.rounds: dict[int, int] = {}
    self.most = 1  # of a layer, since a pass that asks began
    self.counts: dict[int, Tensor] = {}
    # Layers queue one round and do not ask whether it was enough, which on one rank it always is.
    self.one_round = self.num_ranks == 1
    self.crowded = 0  # passes to come that ask
    self.waited = self.full = 0  # passes of `run` that asked, and those in which a rank ran full
    self.last_layer = config.model.num_layers - 1
    self.marks = False  # whether it says that all places are queued
    self.fetched: dict[int, Fetched] = {}  # by layer, of its last forward pass
    self.capture: _Capture | None = None
    self.slot: dict[int, int] = {}  # of a layer's kept rows
    self.kept: dict[int, int] = {}  # the trip that wrote them
    self.trips = Trips()
    self.slots = row_slots(config)
    if self.num_ranks > 1:
      self.heap = Heap(buffer_layout(config), symmetric, group)
      self.exchange = symmetric.Exchange(self.heap.peers, self.rank, config.rdep.deadline_s)

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
      sent_TD = as_received(x_TD, self.payload.x, self.ops.quantize, of_gradient=False)
      y_TD = self.ops.experts(sent_TD, gate_TK, layout, w13, w2, recipe)
      y_TD = as_received(y_TD, self.payload.dy, self.ops.quantize, of_gradient=True)
      return y_TD if shared is None else y_TD + shared(x_TD)
    grad = torch.is_grad_enabled()
    if grad and not x_TD.requires_grad:
      x_TD = x_TD.detach().requires_grad_()  # all ranks must come to the backward pass
    call = _Call(self, layer, recipe, keep=grad)
    sent = _Send.apply(call, x_TD, gate_TK, expert_TK)
    return _Receive.apply(call, sent, x_TD, w13, w2, shared)

  def run(self, forward: Callable[[], Passes], forget: Callable[[], None], *, last: bool) -> Passes:
    """forward(), a forward pass through all layers whose results count only when it returns.

    The layers inside do not wait for the host. If a rank had more rows than its buffer holds,
    `forget` undoes what else forward() did, and it runs once more. Inside `attempt` it runs once,
    and what is known from the last layer of the `last` pass is whether all fitted.
    """
    self.marks = last or not self.one_round
    if self.one_round:
      return forward()
    if not self.crowded:
      done, results = self.attempt(forward)
      if done:
        return results
      forget()
      self.crowded = 1
    self.waited += 1
    self.most = 1
    results = forward()
    full = self.most > 1
    self.full += full
    self.crowded = CROWDED if full else self.crowded - 1
    return results

  def attempt(self, passes: Callable[[], Passes]) -> tuple[bool, Passes | None]:
    """Whether one round did in every layer of passes(), which do not wait for the host; and their
    results. If not, None: what they did is wrong, gradients above all. Collective.
    """
    if self.num_ranks == 1:
      return True, passes()
    self.exchange.overflowed()  # by passes that asked
    self.one_round = True
    try:
      results = passes()
    finally:
      self.one_round = False
    with self.explained():
      full = self.exchange.overflowed()
    return (False, None) if full else (True, results)

  @contextmanager
  def captured(self) -> Iterator[None]:
    """Inside, passes are captured in a CUDA graph, which computes nothing. To be asked for while
    `one_round` holds; of several captures the last is the one to replay.
    """
    with self.trips.aside() as trips:
      yield
    self.capture = _Capture(self.trips.done, trips, dict(self.counts), dict(self.rounds))

  @contextmanager
  def replayed(self) -> Iterator[None]:
    """Inside, the captured passes are queued once more. Collective."""
    if self.num_ranks == 1:
      yield
      return
    after, trips, counts, rounds = self.capture
    if (self.trips.done - after) % TRANSIENT:
      self._pause()
    higher = self.trips.done - after
    self.trips.repeat(trips, higher)
    with self.exchange.replayed(higher):
      yield
    self.trips.done = self.trips.last
    self.counts.update(counts)
    self.rounds.update(rounds)

  def _pause(self) -> None:
    """A trip that moves nothing."""
    number = self.trips.begin(0, "pause")
    self.exchange.reply(number, self.exchange.peers[self.rank].origin_C, None, None, None, 0)
    self.wait(RETURN, number)

  def received(self) -> tuple[int, int, float]:
    """Rows that came to this rank in each layer's last forward pass, summed over layers; and those
    of them that came after the first round, which backward dispatches again. And the rdep.capacity
    at which one round would have done for every rank and layer. Waits for the device.
    """
    if not self.counts:
      return 0, 0, 0.0
    count_LRE = torch.stack(list(self.counts.values())).cpu()
    where = places(count_LRE, self.config.rdep.alignment)
    mine = slice(self.first, self.first + self.num_local)
    rows = int(count_LRE[..., mine].sum())
    first = int(self._in_round(count_LRE, where.base_RE, 0)[..., mine].sum())
    return rows, rows - first, int(where.end_R.max()) / self.config.rows

  @contextmanager
  def explained(self) -> Iterator[None]:
    """Around device work: an error that a missed deadline caused becomes a CommError."""
    try:
      yield
    except RuntimeError as error:
      late = self.exchange.late() if self.num_ranks > 1 else None
      if late is None:
        raise
      raise CommError(self.post_mortem(*late)) from error

  def post_mortem(self, kind: int, number: int, late: list[int]) -> str:
    """Who is late, at what, and how many rows were expected and have arrived."""
    trip = self.trips.of(number)
    counts = None if kind == COUNTS else trip.counts()  # else those of the layer's pass before
    if counts is None:
      rows = "the number of rows was not yet known"
    else:
      expected_R = self._expected(kind, torch.tensor(counts), trip.round)
      here = sum(n for r, n in enumerate(expected_R) if r not in late)
      missing = ", ".join(f"{expected_R[r]} from rank {self.names[r]}" for r in late)
      rows = f"of {sum(expected_R)} rows expected {here} arrived; missing {missing}"
      if here == sum(expected_R):
        rows = "no rows were expected of it, but its signal that it had sent all"
    others = ", ".join(str(self.names[r]) for r in late)
    return (
      f"rank {self.names[self.rank]} of {self.config.launch.ranks}, layer {trip.layer}, "
      f"{trip.phase}, round {trip.round}: {KIND_NAMES[kind]} of rank {others} did not come within "
      f"{self.config.rdep.deadline_s:g} s ({rows}). See that rank's log; if it is alive but slow, "
      "raise rdep.deadline_s"
    )

  def wait(self, kind: int, number: int) -> None:
    """Let what follows come after every rank's signal of this kind and trip; with RETURN the trip
    is over. CommError if a rank misses the deadline.
    """
    late = self.exchange.wait(kind, number)
    if late:
      raise CommError(self.post_mortem(kind, number, late))
    if kind == RETURN:
      self.trips.done = number

  @property
  def nbytes(self) -> int:
    """Of the symmetric heap, which torch does not count."""
    return self.heap.nbytes if self.num_ranks > 1 else 0

  def close(self) -> None:
    """Give the heap back. Collective; to be called after the last backward pass."""
    if self.num_ranks > 1:
      del self.exchange
      self.heap.close()

  def slot_of(self, layer: int) -> int:
    """The slot in which this layer's rows stay until its backward pass."""
    slot = self.slot.setdefault(layer, len(self.slot))
    most = self.slots - TRANSIENT
    assert slot < most, f"RDEP: layer {layer} is one more than the {most} MoE layers of the model"
    return slot

  def _expected(self, kind: int, count_RE: Tensor, number: int) -> list[int]:
    """Rows of a round by peer: sent to this rank (DISPATCH) or coming back to it (RETURN)."""
    base_RE = places(count_RE, self.config.rdep.alignment).base_RE
    rows_RE = self._in_round(count_RE, base_RE, number)
    if kind == DISPATCH:
      return rows_RE[:, self.first : self.first + self.num_local].sum(1).tolist()
    return rows_RE[self.rank].view(self.num_ranks, -1).sum(1).tolist()

  def _in_round(self, count_RE: Tensor, base_RE: Tensor, number: int) -> Tensor:
    """Of the counts [..., R, E] those whose places, from base_RE on, are in a round's window."""
    begin = number * self.exchange.capacity
    low = base_RE.clamp(min=begin)
    high = (base_RE + count_RE).clamp(max=begin + self.exchange.capacity)
    return (high - low).clamp(min=0)


class _Send(torch.autograd.Function):
  """Counts and the first dispatch; backward: the returned dx rows and gate gradients."""

  @staticmethod
  def forward(ctx: Any, call: _Call, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
    ctx.call = call
    call.start(x_TD, gate_TK, expert_TK)
    return x_TD.new_empty(0)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, _: Tensor) -> tuple:
    dx_TD, dgate_TK = ctx.call.finish_backward()
    return None, dx_TD, dgate_TK, None


class _Receive(torch.autograd.Function):
  """Shared experts; experts, return, combine; backward: dispatch of dy, the shared experts'
  gradients, the experts' gradients, return of dx.
  """

  @staticmethod
  def forward(
    ctx: Any,
    call: _Call,
    sent: Tensor,
    x_TD: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared: Callable[[Tensor], Tensor] | None,
  ) -> Tensor:
    ctx.call = call
    ctx.save_for_backward(w13, w2)
    return call.forward(x_TD, w13, w2, shared)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy_TD: Tensor) -> tuple:
    dx_TD, dw13, dw2 = ctx.call.start_backward(dy_TD.contiguous(), *ctx.saved_tensors)
    return None, dy_TD.new_empty(0), dx_TD, dw13, dw2, None


class _Kept(NamedTuple):
  """One round on the owner: what the experts need for backward, and the sources' items."""

  experts: Any
  origin_C: Tensor


class _Call:
  """One layer's forward pass and its backward pass on one rank."""

  def __init__(self, rdep: Rdep, layer: int, recipe: Recipe, *, keep: bool):
    self.rdep, self.exchange, self.payload = rdep, rdep.exchange, rdep.payload
    self.layer, self.recipe, self.keep = layer, recipe, keep
    self.phase, self.counts = "forward", unknown
    self.kept: _Kept | None = None
    self.back: Back | None = None  # the shared experts' backward pass
    self.under_way: tuple = ()
    self.slot, self.first = 0, 0

  def start(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> None:
    """Counts and the first dispatch, beside what follows."""
    self.x_TD, self.gate_TK = x_TD.detach(), gate_TK.detach()
    self._check(expert_TK)
    self._next(0)
    with self.exchange.beside():
      layout = self.rdep.ops.layout(expert_TK, self.rdep.num_experts)
      self.exchange.post_counts(self.trip, layout.offset_E1.diff())
      self._wait(COUNTS)
      count_RE, self.places = self.exchange.places(self.rdep.config.rdep.alignment)
      self.route = Route(expert_TK, layout, count_RE, self.places.base_RE)
      self._send(self.x_TD, None, self.payload.x, self.keep)
      self.offset_L1 = self._offsets()
      before = self.rdep.fetched.get(self.layer)
      self.fetched = self.rdep.fetched[self.layer] = self.exchange.fetch(count_RE, before)
      self.counts = self.fetched.here
      self.rdep.trips.know(self.counts)

  def forward(
    self,
    x_TD: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared: Callable[[Tensor], Tensor] | None,
  ) -> Tensor:
    """[T, D] combined, plus shared(x); called after `start`."""
    beside_TD = None
    if shared is not None:
      with self.exchange.leaving():
        beside_TD, self.back = aside(shared, x_TD, keep=self.keep)
    self.exchange.join()
    if self.rdep.marks and self.layer == self.rdep.last_layer:
      self.exchange.mark()
    self._round_forward(w13, w2, self.keep)
    self.rounds = 1 if self.rdep.one_round else self._needed()
    self.rdep.rounds[self.layer] = self.rounds
    self.rdep.most = max(self.rdep.most, self.rounds)
    self.rdep.counts[self.layer] = self.route.count_RE
    self._wait(RETURN)
    for number in range(1, self.rounds):
      self._next(number)
      self._send(self.x_TD, None, self.payload.x)
      self._round_forward(w13, w2, False)
      self._wait(RETURN)
    if self.rounds == 1:
      self.x_TD = None
    y_TD = self.rdep.ops.combine(self.exchange.collect(self.route)[0], self.gate_TK)
    return y_TD if beside_TD is None else y_TD + beside_TD

  def start_backward(self, dy_TD: Tensor, w13: Tensor, w2: Tensor) -> list[Tensor | None]:
    """The shared experts' dx, and the experts' gradients, summed over rounds in fp32 and rounded
    once; leaves the last trip's replies under way for `finish_backward`.
    """
    assert self.kept is not None, "RDEP: backward ran twice, or after a pass without gradients"
    assert self.rdep.kept.get(self.layer, self.first) == self.first, (
      f"RDEP: layer {self.layer} ran forward again before this backward pass, over its rows"
    )
    self.phase, kept, self.kept = "backward", self.kept, None
    self._next(0)
    with self.exchange.beside():
      self._send(dy_TD, self.gate_TK, self.payload.dy)
    dx_TD = None
    if self.back is not None:
      with self.exchange.leaving():
        dx_TD = self.back(dy_TD)
      self.back = None
    self.exchange.join()
    found = self._round_backward(kept, w13, w2)
    dtypes = [None if part is None else part.dtype for part in found]
    for number in range(1, self.rounds):
      self.exchange.join()
      self._wait(RETURN)
      kept = self._again(number, w13, w2)
      self._next(number)
      self._send(dy_TD, self.gate_TK, self.payload.dy)
      more = self._round_backward(kept, w13, w2)
      found = [b if a is None else a.float().add_(b) for a, b in zip(found, more, strict=True)]
    kinds = zip(found, dtypes, strict=True)
    return [dx_TD, *(total if total is None else total.to(dtype) for total, dtype in kinds)]

  def finish_backward(self) -> tuple[Tensor, Tensor]:
    """dx [T, D], summed over k in fp32, and the gates' gradients [T, K]."""
    assert self.trip == self.rdep.trips.last, "RDEP: another layer ran inside this one"
    self.exchange.join()
    self.under_way = ()
    self._wait(RETURN)
    dx_TKD, dgate_TK = self.exchange.collect(self.route)
    dx_TD = self.rdep.ops.combine(dx_TKD, torch.ones_like(self.gate_TK))
    return dx_TD, dgate_TK.to(self.gate_TK.dtype, copy=True)

  def _needed(self) -> int:
    """The number of rounds; waits for the counts, the layer's one host synchronisation."""
    rdep = self.rdep
    with rdep.explained():
      count_RE = torch.tensor(self.fetched())
    most = int(places(count_RE, rdep.config.rdep.alignment).end_R.max())
    return max(-(-most // self.exchange.capacity), 1)

  def _round_forward(self, w13: Tensor, w2: Tensor, keep: bool) -> None:
    """The rest of a trip: rows come, through the experts, and go back."""
    x_CD, _, origin_C = self._receive(self.payload.x)
    y, kept = self._run(x_CD, w13, w2, keep)
    self._reply(origin_C, self._multiplied(y, origin_C, None), None)
    if keep:
      self.kept = _Kept(kept, origin_C)

  def _round_backward(
    self, kept: _Kept, w13: Tensor, w2: Tensor
  ) -> tuple[Tensor | None, Tensor | None]:
    """The rest of a trip: dy and gates come, dx rows and gate gradients go. Returns dw13, dw2."""
    dy_CD, gate_C, _ = self._receive(self.payload.dy)
    ops, origin_C = self.rdep.ops, kept.origin_C
    dx, dgate_C, weights = ops.grouped_mlp_backward(kept.experts, dy_CD, gate_C, w13, w2)
    dx_CD = self._multiplied(dx, origin_C, dgate_C)
    grads = weights() if self.rounds > 1 else None  # the next round's rows come over this one's
    with self.exchange.beside():
      self._reply(origin_C, dx_CD, dgate_C)
    self.under_way = (dx_CD, dgate_C, origin_C)  # read beside, so not to be freed before join
    return weights() if grads is None else grads

  def _again(self, number: int, w13: Tensor, w2: Tensor) -> _Kept:
    """A later round's rows, from another dispatch of x, through the experts."""
    self._next(number)
    self._send(self.x_TD, None, self.payload.x)
    x_CD, _, origin_C = self._receive(self.payload.x)
    self._reply(origin_C, None, None)
    self._wait(RETURN)
    return _Kept(self._run(x_CD, w13, w2, True)[1], origin_C)

  def _run(self, x_CD: Tensor, w13: Tensor, w2: Tensor, keep: bool) -> tuple[Tensor | Product, Any]:
    """The grouped experts over this round's rows: results, and what backward needs."""
    offset_L1 = self.offset_L1 if self.round == 0 else self._offsets()
    return self.rdep.ops.grouped_mlp_forward(x_CD, offset_L1, w13, w2, self.recipe, keep)

  def _offsets(self) -> Tensor:
    """int32 [L + 1]: where this round's rows of each local expert begin, and the last one's end."""
    edge_L1 = self.places.edge_RL1[self.rdep.rank] - self._low()
    return edge_L1.clamp(0, self.exchange.capacity).int()

  def _multiplied(
    self, rows: Tensor | Product, origin_C: Tensor, gate_C: Tensor | None
  ) -> Tensor | None:
    """The rows that are to be replied; None if they are on their way already."""
    if isinstance(rows, Product):
      return self.exchange.multiply(rows, origin_C, gate_C)
    return rows

  def _next(self, number: int) -> None:
    """Begin this pass's next trip, of the given round."""
    self.trip = self.rdep.trips.begin(self.layer, self.phase, number, self.counts)
    self.round = number

  def _send(self, x_TD: Tensor, gate_TK: Tensor | None, format: str, keep: bool = False) -> None:
    """Dispatch; `keep`: to where the rows stay until the backward pass."""
    self.slot = 0
    if self.exchange.in_place:
      self.slot = self.rdep.slots - TRANSIENT + self.trip % TRANSIENT
      if keep:
        self.slot, self.first = self.rdep.slot_of(self.layer), self.trip
        self.rdep.kept[self.layer] = self.trip
    self.exchange.send(self.trip, x_TD, gate_TK, self.route, self._low(), format, self.slot)

  def _reply(self, origin_C: Tensor, row_CD: Tensor | None, gate_C: Tensor | None) -> None:
    self.exchange.reply(self.trip, origin_C, row_CD, gate_C, self.route, self._low())

  def _receive(self, format: str) -> tuple[Tensor, Tensor, Tensor]:
    self._wait(DISPATCH)
    return self.exchange.receive(self.exchange.capacity, format, self.slot)

  def _low(self) -> int:
    """The first place of this round."""
    return self.round * self.exchange.capacity

  def _wait(self, kind: int) -> None:
    self.rdep.wait(kind, self.trip)

  def _check(self, expert_TK: Tensor) -> None:
    (num_tokens, top_k), rows = expert_TK.shape, self.exchange.rows
    if num_tokens * top_k > rows:
      raise CommError(
        f"rank {self.rdep.rank}, layer {self.layer}: {num_tokens} tokens of "
        f"{counted(top_k, 'expert')} do not fit the {rows} rows of train.micro_batch · "
        "data.seq_len · moe.top_k; raise train.micro_batch or pass fewer tokens"
      )
