"""Benches of an MoE layer: whole, by its parts, and RDEP's rows in one GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from kernels.buffers import COUNTS, Route, views
from kernels.cuda.combine import combine, sum_rows
from kernels.cuda.exchange import Exchange
from kernels.cuda.experts import experts, grouped_mlp, grouped_mlp_backward, grouped_mlp_forward
from kernels.cuda.gemms import rows as rows_of_experts
from kernels.cuda.layout import layout
from kernels.cuda.router import route
from kernels.ops import Product, Recipe, RouterSpec
from kernels.sizes import BufferLayout
from kernels.tools.rates import Case, How, Row, normal, num_sets, rows
from kernels.tools.timing import SETS

BF16 = Recipe()


@dataclass(frozen=True)
class Moe:
  """An expert layer's shape. `skew` is the heaviest expert's rows over the mean."""

  tokens: int = 32768
  dim: int = 2048
  width: int = 1408
  num_experts: int = 64
  top_k: int = 6
  skew: float = 1.0

  @property
  def rows(self) -> int:
    return self.tokens * self.top_k

  @property
  def flops(self) -> float:
    """Of the routed experts, forward and backward; the router's are not counted."""
    return 18.0 * self.rows * self.dim * self.width


MOES = (
  Moe(),
  Moe(skew=5.0),
  Moe(width=512, num_experts=256, top_k=8),
  Moe(tokens=4096),
  Moe(tokens=8192, width=768, num_experts=128, top_k=8),  # Qwen3-30B-A3B's
)
SPECS = {
  64: RouterSpec(6),
  128: RouterSpec(8),
  256: RouterSpec(8, num_groups=8, topk_groups=4),
}


def skewed_routing(moe: Moe) -> Tensor:
  """int32 [T, K] random distinct experts; expert 0 gets `skew` times the mean."""
  noise = torch.rand(moe.tokens, moe.num_experts, device="cuda")
  if moe.skew != 1.0:
    chosen = torch.rand(moe.tokens, device="cuda") < moe.skew * moe.top_k / moe.num_experts
    noise[:, 0] = torch.where(chosen, -1.0, 2.0)
  return noise.argsort(1)[:, : moe.top_k].int()


class MoeLayer:
  """Inputs and parameters of one shape, and the layer's forward and backward on input set i."""

  def __init__(self, moe: Moe):
    self.moe = moe
    self.x = [normal(moe.tokens, moe.dim, grad=True) for _ in range(SETS)]
    self.dy = [normal(moe.tokens, moe.dim) for _ in range(SETS)]
    shape13 = (moe.num_experts, 2 * moe.width, moe.dim)
    self.w13 = normal(*shape13, scale=moe.dim**-0.5, grad=True)
    self.w2 = normal(moe.num_experts, moe.dim, moe.width, scale=moe.width**-0.5, grad=True)
    self.router = normal(
      moe.num_experts, moe.dim, scale=moe.dim**-0.5, dtype=torch.float32, grad=True
    )
    self.bias = torch.zeros(moe.num_experts, device="cuda")
    self.picked = skewed_routing(moe)
    self.gate = torch.rand(moe.tokens, moe.top_k, device="cuda").requires_grad_()
    self.parameters = [self.w13, self.w2, self.router, self.gate, *self.x]

  def clear(self) -> None:
    for t in self.parameters:
      t.grad = None

  def forward(self, i: int) -> Tensor:
    """Router, layout, experts, combine."""
    spec = RouterSpec(self.moe.top_k)
    routing = route(self.x[i], self.router, self.bias, spec)
    order = layout(routing.expert_TK, self.moe.num_experts)
    return experts(routing.x_TD, routing.gate_TK, order, self.w13, self.w2, BF16)

  def step(self, i: int) -> None:
    """The whole layer, forward and backward."""
    self.clear()
    self.forward(i).backward(self.dy[i])

  def given(self, i: int) -> None:
    """The same with routing given: layout, experts and combine."""
    self.clear()
    order = layout(self.picked, self.moe.num_experts)
    experts(self.x[i], self.gate, order, self.w13, self.w2, BF16).backward(self.dy[i])


def kept(forward: Callable[[], Tensor]) -> int:
  """Bytes that a forward pass keeps for its backward, its output and inputs not counted."""
  torch.cuda.synchronize()
  before = torch.cuda.memory_allocated()
  y = forward()
  torch.cuda.synchronize()
  return torch.cuda.memory_allocated() - before - y.nbytes


def bench_moe(how: How) -> Iterator[Row]:
  for moe in MOES:
    layer = MoeLayer(moe)
    runs = {"experts, routing given": layer.given}
    if moe.skew == 1.0:
      runs["whole layer"] = layer.step
    cases = [Case(what, run, moe.flops, asdict(moe)) for what, run in runs.items()]
    yield from rows(cases, "TFLOP/s", how)


class Grouped:
  """Rows sorted by expert, as an owner receives them, and both halves of their experts."""

  def __init__(self, moe: Moe):
    held = moe.num_experts
    self.x, self.dy = ([normal(moe.rows, moe.dim) for _ in range(SETS)] for _ in range(2))
    self.w13 = normal(held, 2 * moe.width, moe.dim, scale=moe.dim**-0.5, grad=True)
    self.w2 = normal(held, moe.dim, moe.width, scale=moe.width**-0.5, grad=True)
    self.offset = layout(skewed_routing(moe), held).offset_E1
    self.gate = torch.rand(moe.rows, device="cuda")

  def step(self, i: int) -> None:
    """By autograd."""
    self.w13.grad = self.w2.grad = None
    x = self.x[i].detach().requires_grad_()
    grouped_mlp(x, self.offset, self.w13, self.w2, BF16).backward(self.dy[i])

  @torch.no_grad()
  def halves(self, i: int) -> None:
    """As RDEP calls them, the products' rows not returned."""
    y, kept = grouped_mlp_forward(self.x[i], self.offset, self.w13, self.w2, BF16, True)
    dx, _, weights = grouped_mlp_backward(kept, self.dy[i], self.gate, self.w13, self.w2)
    for product in (y, dx):
      rows_of_experts(*product)
    weights()


def bench_grouped(how: How) -> Iterator[Row]:
  moe = replace(MOES[0], tokens=8192)
  grouped = Grouped(moe)
  runs = {"grouped_mlp": grouped.step, "its halves": grouped.halves}
  cases = [Case(what, run, moe.flops, asdict(moe)) for what, run in runs.items()]
  yield from rows(cases, "TFLOP/s", how)


def bench_combine(how: How) -> Iterator[Row]:
  """Forward in place and gathered, and backward; every row crosses memory once."""
  moe = MOES[0]
  shape = {"T": moe.tokens, "K": moe.top_k, "D": moe.dim}
  y = [normal(moe.tokens, moe.top_k, moe.dim, grad=True) for _ in range(SETS)]
  gate = torch.rand(moe.tokens, moe.top_k, device="cuda").requires_grad_()
  dy = [normal(moe.tokens, moe.dim) for _ in range(SETS)]
  row = layout(skewed_routing(moe), moe.num_experts).row_TK
  out = [combine(y_TKD, gate) for y_TKD in y]

  def forward(i: int) -> None:
    with torch.no_grad():
      combine(y[i], gate)

  def gathered(i: int) -> None:
    with torch.no_grad():
      sum_rows(y[i].flatten(0, 1), row, gate)

  def backward(i: int) -> None:
    torch.autograd.grad(out[i], [y[i], gate], dy[i], retain_graph=True)

  wide, narrow = 2.0 * moe.rows * moe.dim, 2.0 * moe.tokens * moe.dim
  cases = [
    Case("combine", forward, wide + narrow, shape),
    Case("combine, rows gathered", gathered, wide + narrow, shape),
    Case("combine, backward", backward, 2 * wide + narrow, shape),
  ]
  yield from rows(cases, "GB/s", how)


def router_cases(moe: Moe) -> list[Case]:
  """The bytes are those of x, scores, experts and gates, and of their gradients."""
  spec = SPECS[moe.num_experts]
  x = [normal(moe.tokens, moe.dim, grad=True) for _ in range(SETS)]
  weight = normal(moe.num_experts, moe.dim, scale=moe.dim**-0.5, dtype=torch.float32, grad=True)
  bias = torch.zeros(moe.num_experts, device="cuda")
  dgate = torch.rand(moe.tokens, moe.top_k, device="cuda")
  dx = [normal(moe.tokens, moe.dim) for _ in range(SETS)]
  routings = [route(x_TD, weight, bias, spec) for x_TD in x]

  def forward(i: int) -> None:
    with torch.no_grad():
      route(x[i], weight, bias, spec)

  def backward(i: int) -> None:
    outs = [routings[i].gate_TK, routings[i].x_TD]
    torch.autograd.grad(outs, [x[i], weight], [dgate, dx[i]], retain_graph=True)

  added = 2.0 * moe.tokens * moe.dim
  read = added + 4.0 * weight.numel()
  chosen = 8.0 * moe.rows
  shape = {"T": moe.tokens, "D": moe.dim, "E": moe.num_experts, "K": moe.top_k}
  return [
    Case("route", forward, read + 4.0 * moe.tokens * moe.num_experts + chosen, shape),
    Case("route, backward", backward, 2 * read + added + 1.5 * chosen, shape),
  ]


def bench_router(how: How) -> Iterator[Row]:
  shapes = [moe for moe in MOES if moe.skew == 1.0]
  yield from rows([case for moe in shapes for case in router_cases(moe)], "GB/s", how)


def layout_case(moe: Moe, sets: int) -> Case:
  picked = [skewed_routing(moe) for _ in range(sets)]
  shape = {"T": moe.tokens, "K": moe.top_k, "E": moe.num_experts}
  return Case("layout", lambda i: layout(picked[i], moe.num_experts), 16.0 * moe.rows, shape)


def bench_layout(how: How) -> Iterator[Row]:
  """Its inputs fit the L2 many times over; what counts is its latency."""
  shapes = [moe for moe in MOES if moe.skew == 1.0]
  sets = min(64, num_sets(4 * min(moe.rows for moe in shapes)))
  yield from rows([layout_case(moe, sets) for moe in shapes], "GB/s", how, sets)


class Owner:
  """The rows of half of the experts and the way back to their sources, two ranks.

  Both ranks' buffers lie in this GPU's memory: the second stands for a peer's. A call overwrites
  what an earlier one returned.
  """

  def __init__(self, moe: Moe):
    self.moe, items, held = moe, moe.rows, moe.num_experts // 2
    order = layout(torch.cat([skewed_routing(moe) for _ in range(2)]), moe.num_experts)
    self.offset = order.offset_E1[: held + 1]
    self.origin = order.source_N[: int(self.offset[-1])]  # rank · items + t · K + k
    self.exchange = exchanges(moe, len(self.origin))[0]
    assert self.exchange.rows == items
    self.gate = torch.rand(len(self.origin), device="cuda")
    self.act = [normal(len(self.origin), moe.width) for _ in range(SETS)]
    self.dpreact = [normal(len(self.origin), 2 * moe.width) for _ in range(SETS)]
    self.w13 = normal(held, 2 * moe.width, moe.dim, scale=moe.dim**-0.5)
    self.w2 = normal(held, moe.dim, moe.width, scale=moe.width**-0.5)

  def y(self, i: int) -> tuple[Product, None]:
    return Product(self.act[i], self.w2, self.offset), None

  def dx(self, i: int) -> tuple[Product, Tensor]:
    return Product(self.dpreact[i], self.w13.mT, self.offset), self.gate

  def back(self, fused: bool, product: Product, gate: Tensor | None) -> None:
    """The product's rows at their origins, and the signal."""
    self.exchange.fused = fused
    rows = self.exchange.multiply(product, self.origin, gate)
    self.exchange.reply(1, self.origin, rows, gate, None, 0)  # direct stores need no route

  def cases(self, name: str, of: Callable[[int], tuple], flops: float) -> list[Case]:
    shape = {**asdict(self.moe), "ranks": 2, "rows": len(self.origin)}
    runs = {
      f"{name}, not returned": lambda i: rows_of_experts(*of(i)[0]),
      f"{name}, then returned": lambda i: self.back(False, *of(i)),
      f"{name}, returned by its product": lambda i: self.back(True, *of(i)),
    }
    return [Case(what, run, flops, shape) for what, run in runs.items()]


def bench_return(how: How) -> Iterator[Row]:
  """What decided kernels.cuda.exchange.FUSED, but for NVLink, which is slower than this memory."""
  owner = Owner(MOES[0])
  flops = 2.0 * len(owner.origin) * owner.moe.dim * owner.moe.width
  cases = [*owner.cases("y", owner.y, flops), *owner.cases("dx", owner.dx, 2 * flops)]
  yield from rows(cases, "TFLOP/s", how)


def exchanges(moe: Moe, capacity: int, slots: int = 1) -> list[Exchange]:
  """Those of two ranks, both in this GPU's memory."""
  sizes = BufferLayout(2, moe.num_experts, capacity, moe.rows, moe.dim, "bf16", slots=slots)
  blocks = [torch.zeros(sizes.nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
  peers = [views(sizes, block) for block in blocks]
  return [Exchange(peers, rank, 1.0) for rank in range(2)]


class Trips:
  """Two ranks' movers in one GPU's memory, and the trips that rank 0 makes with rows of its own."""

  def __init__(self, moe: Moe, slots: int = 1):
    self.moe, self.trip = moe, 0
    self.movers = exchanges(moe, 2 * moe.rows, slots)
    self.mover = self.movers[0]
    self.x = [normal(moe.tokens, moe.dim) for _ in range(SETS)]
    expert_TK = skewed_routing(moe)
    order = layout(expert_TK, moe.num_experts)
    self.count_E = order.offset_E1.diff()
    self.counts(0)
    count_RE, where = self.mover.places(1)
    self.route = Route(expert_TK, order, count_RE, where.base_RE)
    self.received = int(where.end_R[0])  # of both ranks, for this rank's half of the experts
    for mover in self.movers:
      mover.send(self.trip, self.x[0], None, self.route, 0, "bf16")
    self.row_CD, _, self.origin_C = self.mover.receive(self.received, "bf16")

  def counts(self, _: int) -> None:
    """The counts' part of a trip: post, wait, places."""
    self.trip += 1
    for mover in self.movers:
      mover.post_counts(self.trip, self.count_E)
    self.mover.wait(COUNTS, self.trip)
    self.mover.places(1)

  def send(self, i: int) -> None:
    self.mover.send(self.trip, self.x[i], None, self.route, 0, "bf16")

  def receive(self, _: int) -> None:
    """With its origins put back, which it resets: they are a thousandth of the bytes."""
    self.mover.peers[0].origin_C[: self.received].copy_(self.origin_C)
    self.mover.receive(self.received, "bf16")

  def reply(self, _: int) -> None:
    self.mover.reply(self.trip, self.origin_C, self.row_CD, None, self.route, 0)


def bench_trip(how: How) -> Iterator[Row]:
  """RDEP's movers without NVLink: on the SMs that they take, and the counts, which are latency."""
  moe = replace(MOES[0], tokens=8192)
  trips, in_place = Trips(moe), Trips(moe, slots=2)
  size = 2.0 * moe.dim
  shape = {**asdict(moe), "ranks": 2, "sms": trips.mover.blocks}
  counted = 4.0 * 2 * moe.num_experts
  cases = [
    Case("counts and places", trips.counts, 4 * counted, shape),
    Case("send", trips.send, size * (moe.tokens + moe.rows), shape),
    Case("receive", trips.receive, 2 * size * trips.received, shape),
    Case("receive, rows in place", in_place.receive, 16.0 * in_place.received, shape),
    Case("reply", trips.reply, 2 * size * trips.received, shape),
  ]
  yield from rows(cases, "GB/s", how)


BENCHES: dict[str, Callable[[How], Iterator[Row]]] = {
  "moe": bench_moe,
  "grouped": bench_grouped,
  "combine": bench_combine,
  "router": bench_router,
  "layout": bench_layout,
  "return": bench_return,
  "trip": bench_trip,
}
