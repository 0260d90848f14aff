"""One rank's MoE layer, its inputs, and what `nmoe bench rdep` times of them.

All variants of a comparison are interleaved (kernels.tools.timing), work on inputs that rotate, and
count the slowest rank's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.buffers import DISPATCH, DTYPES, RETURN, Route
from kernels.ops import Product, Recipe
from kernels.places import places
from kernels.tools import timing
from kernels.tools.timing import SETS, Name, Variant
from nmoe.bench.all_to_all import AllToAll, offsets
from nmoe.config.parameters import parameter_dtype
from nmoe.config.sections import Config
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.streams import beside, join
from nmoe.errors import CommError, ConfigError
from nmoe.machine.target import Target
from nmoe.train.clock import Clock

RECIPE = Recipe()
NAMES = ("y", "dx", "dgate", "dw13", "dw2")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # ‖RDEP - all-to-all‖ / ‖all-to-all‖


class Inputs(NamedTuple):
  """One rank's tokens, and where their rows go. T tokens; `rows` come to this rank."""

  x_TD: Tensor
  expert_TK: Tensor
  gate_TK: Tensor
  dy_TD: Tensor
  route: Route
  rows: int
  sent_R: list[int]  # rows to each rank


@contextmanager
def temporarily(thing: object, **values: Any) -> Iterator[None]:
  """Inside, attributes of a thing have these values; after it, whatever happened, their own."""
  before = {name: getattr(thing, name) for name in values}
  try:
    for name, value in values.items():
      setattr(thing, name, value)
    yield
  finally:
    for name, value in before.items():
      setattr(thing, name, value)


class Bench:
  """One rank's weights, inputs and variants."""

  def __init__(self, config: Config, target: Target, ranks: Parallel):
    self.config, self.target, self.ops, self.ranks = config, target, target.ops, ranks
    self.rdep, self.device = ranks.rdep, target.device
    self.dtype = DTYPES[parameter_dtype(config)]
    self.chance = torch.Generator(self.device).manual_seed(ranks.rank)
    e, dim = config.moe, config.model.dim
    self.w13 = self._normal(self.rdep.num_local, 2 * e.expert_dim, dim, scale=dim**-0.5)
    self.w2 = self._normal(self.rdep.num_local, dim, e.expert_dim, scale=e.expert_dim**-0.5)
    self.shared = None
    if e.num_shared:
      width = e.num_shared * e.expert_dim
      w13 = self._normal(2 * width, dim, scale=dim**-0.5)
      w2 = self._normal(dim, width, scale=width**-0.5)
      self.shared = partial(self._shared, w13, w2)
    cuda = self.device.type == "cuda"
    self.lanes = [torch.cuda.Stream() if cuda else None for _ in range(self.rdep.num_ranks)]
    side = torch.cuda.Stream() if cuda else None
    self.all_to_all = AllToAll(self.ops, RECIPE, self.shared, side)
    self.clock = Clock(self.device)

  def inputs(self, num_tokens: int) -> list[Inputs]:
    return [self._inputs(num_tokens) for _ in range(SETS)]

  def trip(
    self, sets: list[Inputs], sms: int | None, products: list[Product] | None, i: int
  ) -> None:
    """One dispatch and return of rows as they are, without counts and without experts.

    With products, one for each of the sets, their rows return instead, and the return's time is
    also that of the multiplication.
    """
    rdep, exchange, clock, d = self.rdep, self.rdep.exchange, self.clock, sets[i]
    with temporarily(exchange, blocks=sms):
      number = rdep.trips.begin(0, "bench")
      clock.start("dispatch")
      exchange.send(number, d.x_TD, None, d.route, 0, "bf16")
      rdep.wait(DISPATCH, number)
      clock.start("receive")
      row_CD, _, origin_C = exchange.receive(d.rows, "bf16")
      clock.start("return")
      if products is not None:
        row_CD = exchange.multiply(products[i], origin_C)
      exchange.reply(number, origin_C, row_CD, None, d.route, 0)
      rdep.wait(RETURN, number)
      clock.start("between")

  def returned(self, fused: bool, variant: Variant, i: int) -> None:
    """The variant with rows returned by the products that make them, or by the reply after."""
    with temporarily(self.rdep.exchange, fused=fused):
      variant(i)

  def products(self, sets: list[Inputs], weight: Tensor) -> list[Product]:
    """A product of every set's received rows with weights [E/R, O, I]."""
    inner = weight.shape[2]
    return [Product(self._normal(d.rows, inner), weight, self._offsets(d)) for d in sets]

  def copy(self, sets: list[Inputs], i: int) -> None:
    """The bytes that a dispatch sends to other ranks, by plain copies into their buffers: to each
    on a stream of its own, since one copy engine does not fill all links.
    """
    self.clock.start("copy")
    for rank, (peer, rows) in enumerate(zip(self.rdep.exchange.peers, sets[i].sent_R, strict=True)):
      if rank != self.rdep.rank:
        with beside(self.lanes[rank]):
          _fill(peer.row_CD, sets[i].x_TD, rows)
    for lane in self.lanes:
      join(lane)
    self.clock.start("between")

  def layer(self, forward: Callable, sets: list[Inputs], i: int) -> None:
    """Forward and backward of a layer."""
    self.clock.start("layer")
    self.gradients(forward, sets[i])
    self.clock.start("between")

  def graphs(self, sets: list[Inputs]) -> Variant:
    """The layer over RDEP as training with train.cuda_graph queues it: a CUDA graph of each set."""
    made = []
    for d in sets:
      self.gradients(self.by_rdep, d)
      graph = torch.cuda.CUDAGraph()
      recorded = torch.cuda.graph(graph, capture_error_mode="thread_local")  # NCCL's thread may ask
      with temporarily(self.rdep, one_round=True), recorded, self.rdep.captured():
        kept = self.gradients(self.by_rdep, d)
      made.append((graph, self.rdep.capture, kept))

    def replay(i: int) -> None:
      graph, capture, _ = made[i]
      self.clock.start("layer")
      with temporarily(self.rdep, capture=capture), self.rdep.replayed():
        graph.replay()
      self.clock.start("between")

    return replay

  def gradients(self, forward: Callable, d: Inputs) -> list[Tensor]:
    """y, and the gradients of x, the gates and the experts' weights."""
    leaves = [t.detach().requires_grad_() for t in (d.x_TD, d.gate_TK, self.w13, self.w2)]
    y_TD = forward(d, *leaves)
    y_TD.backward(d.dy_TD)
    return [y_TD.detach(), *(leaf.grad for leaf in leaves)]

  def by_rdep(self, d: Inputs, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return self.rdep.experts(x, d.expert_TK, gate, w13, w2, RECIPE, layer=0, shared=self.shared)

  def by_all_to_all(self, d: Inputs, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return self.all_to_all(d.expert_TK, x, gate, w13, w2)

  def communication(self, sets: list[Inputs], i: int) -> None:
    """RDEP with experts that return their rows, and without shared experts."""
    ops = SimpleNamespace(
      layout=self.ops.layout,
      combine=self.ops.combine,
      grouped_mlp_forward=lambda x, offset, w13, w2, recipe, keep: (x, None),
      grouped_mlp_backward=lambda kept, dy, gate, w13, w2: (dy, gate, lambda: (w13, w2)),
    )
    with temporarily(self, shared=None), temporarily(self.rdep, ops=ops):
      self.layer(self.by_rdep, sets, i)

  def computation(self, sets: list[Inputs], i: int) -> None:
    """The grouped experts over as many rows as come to this rank, and the shared experts."""
    d = sets[i]
    leaves = [t.detach().requires_grad_() for t in (_tiled(d.x_TD, d.rows), self.w13, self.w2)]
    dy_ND, x_TD = _tiled(d.dy_TD, d.rows), d.x_TD.detach().requires_grad_()
    offset_L1 = self._offsets(d)
    self.clock.start("layer")
    self.ops.grouped_mlp(leaves[0], offset_L1, *leaves[1:], RECIPE).backward(dy_ND)
    if self.shared is not None:
      self.shared(x_TD).backward(d.dy_TD)
    self.clock.start("between")

  def deviation(self, d: Inputs) -> dict[str, float]:
    """‖RDEP - all-to-all‖ / ‖all-to-all‖ of the output and every gradient, the worst rank's, with
    and without products that return their rows.
    """
    wanted, worst = self.gradients(self.by_all_to_all, d), dict.fromkeys(NAMES, 0.0)
    for fused in (False, True):
      with temporarily(self.rdep.exchange, fused=fused):
        ours = self.gradients(self.by_rdep, d)
      ratios = [_apart(a, b) for a, b in zip(ours, wanted, strict=True)]
      worst = {n: max(worst[n], ratio) for n, ratio in zip(NAMES, self.most(ratios), strict=True)}
    wrong = {name: ratio for name, ratio in worst.items() if not ratio <= BOUND[self.dtype]}
    if wrong:
      raise CommError(f"RDEP and all_to_all_single disagree ({wrong}); nothing was measured")
    return worst

  def interleaved(
    self, variants: Mapping[Name, Variant], repeats: int
  ) -> dict[tuple[Name, str], list[float]]:
    """(variant, phase) -> ms per call of each repeat, the slowest rank's."""
    return timing.interleaved(variants, self._run, warmup=0, repeats=repeats, slowest=self.most)

  def _run(self, variant: Variant, calls: int, first: int) -> dict[str, float]:
    """Seconds per call by phase, after a barrier (kernels.tools.timing's run)."""
    self.clock.start("between")
    self.clock.read()
    dist.barrier(self.ranks.control)
    for call in range(calls):
      variant((first + call) % SETS)
    seconds = self.clock.read()
    return {phase: s / calls for phase, s in seconds.items() if phase not in ("between", "step")}

  def most(self, values: list[float]) -> list[float]:
    """The elementwise maximum over ranks of host values."""
    told = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX, self.ranks.control)
    return told.tolist()

  def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(*shape, generator=self.chance, device=self.device)
    return (x * scale).to(self.dtype)

  def _shared(self, w13: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    return self.ops.mlp(x, w13.detach().requires_grad_(), w2.detach().requires_grad_(), RECIPE)

  def _offsets(self, d: Inputs) -> Tensor:
    """Of this rank's experts in the rows that come to it."""
    count_RRL = d.route.count_RE.view(self.rdep.num_ranks, self.rdep.num_ranks, -1)
    return offsets(count_RRL[:, self.rdep.rank].sum(0))

  def _inputs(self, num_tokens: int) -> Inputs:
    """Uniform random routing of a token to K different experts."""
    e, dim, rdep = self.config.moe, self.config.model.dim, self.rdep
    draw = partial(torch.rand, num_tokens, generator=self.chance, device=self.device)
    expert_TK = draw(e.num_experts).topk(e.top_k).indices.int()
    layout = self.ops.layout(expert_TK, e.num_experts)
    count_E = layout.offset_E1.diff().long().cpu()
    counts = [torch.empty_like(count_E) for _ in range(rdep.num_ranks)]
    dist.all_gather(counts, count_E, group=self.ranks.control)
    count_RE = torch.stack(counts)
    where = places(count_RE, self.config.rdep.alignment)
    most, room = int(where.end_R.max()), rdep.exchange.capacity
    if most > room:
      raise ConfigError(
        f"a rank receives {most} rows and holds {room}: rounds, which this bench does not measure; "
        "raise rdep.capacity"
      )
    route = Route(expert_TK, layout, count_RE.to(self.device), where.base_RE.to(self.device))
    x_TD, dy_TD = (self._normal(num_tokens, dim) for _ in range(2))
    sent_R = count_E.view(rdep.num_ranks, -1).sum(1).tolist()
    rows = int(where.end_R[rdep.rank])
    return Inputs(x_TD, expert_TK, draw(e.top_k) / e.top_k, dy_TD, route, rows, sent_R)


def _apart(a: Tensor, b: Tensor) -> float:
  """‖a - b‖ / ‖b‖ in float64, of some rows at a time: the experts' gradients fill a GPU."""
  parts = [t.split(max(1, len(t) // 64)) for t in (a, b)]
  squares = [
    torch.stack([(x.double() - y.double()).square().sum(), y.double().square().sum()])
    for x, y in zip(*parts, strict=True)
  ]
  difference, whole = torch.stack(squares).sum(0).sqrt().tolist()
  return difference / whole


def _fill(into_CD: Tensor, x_TD: Tensor, rows: int) -> None:
  """As many rows as asked for, of x's again and again: a buffer may hold more than a rank has
  tokens.
  """
  for done in range(0, rows, len(x_TD)):
    part = min(rows - done, len(x_TD))
    into_CD[done : done + part].copy_(x_TD[:part])


def _tiled(x_TD: Tensor, rows: int) -> Tensor:
  """As many rows as asked for, of x's again and again."""
  return x_TD.repeat(-(-rows // x_TD.shape[0]), 1)[:rows]
