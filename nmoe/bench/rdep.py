"""One rank of `nmoe bench rdep`: RDEP against a peer copy, all_to_all_single, and its own parts.

`python -m nmoe.bench.rdep --root ROOT --run RUN_ID --rank R --rendezvous URL` measures the MoE
layer that the recorded run's configuration describes, with routing given, and rank 0 writes the
figures into the record. All variants of a
comparison are interleaved, work on inputs that rotate, and count the slowest rank's time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.buffers import DISPATCH, DTYPES, RETURN, Route
from kernels.ops import Layout, Ops, Product, Recipe
from kernels.places import places
from nmoe.config import file as configs
from nmoe.config.parameters import parameter_dtype
from nmoe.config.sections import Config
from nmoe.distributed import parallel
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.rdep import unknown
from nmoe.errors import CommError, ConfigError, NmoeError
from nmoe.machine.target import Target, select
from nmoe.records.experiments import Experiments
from nmoe.train.clock import Clock
from nmoe.train.startup import parser

SETS = 3  # inputs that rotate
BURST_S = (
  0.3  # a timed run of a variant lasts about this long: the start of its queue counts little
)
LATENCY_TOKENS = 128
SMS = (4, 8, 16, 32, 64, 128)
RECIPE = Recipe()
RETURNED = ("down-projection", "dx")  # the products whose rows go back
NAMES = ("y", "dx", "dgate", "dw13", "dw2")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # ‖RDEP - all-to-all‖ / ‖all-to-all‖

Variant = Callable[[int, Clock], None]


class Inputs(NamedTuple):
  """One rank's tokens, and where their rows go. T tokens; `rows` come to this rank."""

  x_TD: Tensor
  expert_TK: Tensor
  gate_TK: Tensor
  dy_TD: Tensor
  route: Route
  rows: int
  sent_R: list[int]  # rows to each rank


@dataclass(frozen=True)
class Row:
  """One measured quantity: milliseconds by median and percentiles over repeats."""

  what: str
  tokens: int
  ms: float
  ms_p10: float
  ms_p90: float
  gb_s: float | None = None  # of the bytes that leave the rank
  sms: int | None = None


class _Permute(torch.autograd.Function):
  """x[index], of a permutation and its inverse."""

  @staticmethod
  def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    ctx.inverse = inverse
    return x.index_select(0, index)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy: Tensor) -> tuple:
    return dy.index_select(0, ctx.inverse), None, None


class _Expand(torch.autograd.Function):
  """A token's row for each of its experts, in the layout's order; backward sums them in fp32."""

  @staticmethod
  def forward(ctx: Any, x_TD: Tensor, layout: Layout, ops: Ops) -> Tensor:
    ctx.row_TK, ctx.ops = layout.row_TK, ops
    return x_TD.index_select(0, layout.source_N // layout.row_TK.shape[1])

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dx_ND: Tensor) -> tuple:
    dx_TKD = dx_ND.index_select(0, ctx.row_TK.flatten()).unflatten(0, ctx.row_TK.shape)
    ones_TK = torch.ones(ctx.row_TK.shape, device=dx_ND.device)
    return ctx.ops.combine(dx_TKD, ones_TK), None, None


class _AllToAll(torch.autograd.Function):
  """Rows to the ranks, by their numbers; backward is the way back."""

  @staticmethod
  def forward(ctx: Any, x: Tensor, out_R: list[int], into_R: list[int]) -> Tensor:
    ctx.out_R, ctx.into_R = out_R, into_R
    y = x.new_empty(sum(into_R), x.shape[1])
    dist.all_to_all_single(y, x, into_R, out_R)
    return y

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy: Tensor) -> tuple:
    dx = dy.new_empty(sum(ctx.out_R), dy.shape[1])
    dist.all_to_all_single(dx, dy.contiguous(), ctx.out_R, ctx.into_R)
    return dx, None, None


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
    self.side = torch.cuda.Stream() if self.device.type == "cuda" else None

  def inputs(self, num_tokens: int) -> list[Inputs]:
    return [self._inputs(num_tokens) for _ in range(SETS)]

  def trip(
    self,
    sets: list[Inputs],
    sms: int | None,
    i: int,
    clock: Clock,
    products: list[Product] | None = None,
  ) -> None:
    """One dispatch and return of rows as they are, without counts and without experts.

    With products, one for each of the sets, their rows return instead, and the return's time is
    also that of the multiplication.
    """
    exchange, trips, d = self.rdep.exchange, self.rdep.trips, sets[i]
    before, exchange.blocks = exchange.blocks, sms
    number = trips[-1].number + 1
    trips.append(trips[-1]._replace(number=number, phase="bench", counts=unknown))
    clock.start("dispatch")
    exchange.send(number, d.x_TD, None, d.route, 0, "bf16")
    self._wait(DISPATCH, number)
    clock.start("receive")
    row_CD, _, origin_C = exchange.receive(d.rows, "bf16")
    clock.start("return")
    if products is not None:
      row_CD = exchange.multiply(products[i], origin_C)
    exchange.reply(number, origin_C, row_CD, None, d.route, 0)
    self._wait(RETURN, number)
    clock.start("between")
    self.rdep.done, exchange.blocks = number, before

  @contextmanager
  def returning(self, fused: bool) -> Iterator[None]:
    """Inside, rows are returned by the products that make them, or by the reply after."""
    exchange = self.rdep.exchange
    before, exchange.fused = exchange.fused, fused
    yield
    exchange.fused = before

  def returned(self, fused: bool, variant: Variant, i: int, clock: Clock) -> None:
    with self.returning(fused):
      variant(i, clock)

  def products(self, sets: list[Inputs], weight: Tensor) -> list[Product]:
    """A product of every set's received rows with weights [E/R, O, I]."""
    inner = weight.shape[2]
    return [Product(self._normal(d.rows, inner), weight, self._offsets(d)) for d in sets]

  def copy(self, sets: list[Inputs], i: int, clock: Clock) -> None:
    """The bytes that a dispatch sends to other ranks, by plain copies into their buffers."""
    clock.start("copy")
    for rank, (peer, rows) in enumerate(zip(self.rdep.exchange.peers, sets[i].sent_R, strict=True)):
      if rank != self.rdep.rank:
        done = 0
        while done < rows:  # a rank's buffer may hold more rows than this rank has tokens
          part = min(rows - done, sets[i].x_TD.shape[0])
          peer.row_CD[done : done + part].copy_(sets[i].x_TD[:part])
          done += part
    clock.start("between")

  def layer(self, forward: Callable, sets: list[Inputs], i: int, clock: Clock) -> None:
    """Forward and backward of a layer."""
    clock.start("layer")
    self.gradients(forward, sets[i])
    clock.start("between")

  def gradients(self, forward: Callable, d: Inputs) -> list[Tensor]:
    """y, and the gradients of x, the gates and the experts' weights."""
    leaves = [t.detach().requires_grad_() for t in (d.x_TD, d.gate_TK, self.w13, self.w2)]
    y_TD = forward(d, *leaves)
    y_TD.backward(d.dy_TD)
    return [y_TD.detach(), *(leaf.grad for leaf in leaves)]

  def by_rdep(self, d: Inputs, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return self.rdep.experts(x, d.expert_TK, gate, w13, w2, RECIPE, layer=0, shared=self.shared)

  def by_all_to_all(self, d: Inputs, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Sort by expert, exchange counts and rows, experts, rows back; shared experts beside."""
    ranks, ops = self.rdep.num_ranks, self.ops
    shared_TD = self._beside(x)
    layout = ops.layout(d.expert_TK, self.rdep.num_experts)
    count_E = layout.offset_E1.diff()
    count_RL = torch.empty_like(count_E)
    dist.all_to_all_single(count_RL, count_E)
    splits = torch.stack([count_E, count_RL]).view(2, ranks, -1).sum(2)
    out_R, into_R = splits.tolist()  # the host must know them
    rows = _AllToAll.apply(_Expand.apply(x, layout, ops), out_R, into_R)
    held = torch.arange(self.rdep.num_local, device=self.device).repeat(ranks)
    expert_N = held.repeat_interleave(count_RL, output_size=sum(into_R))
    order = expert_N.argsort(stable=True)
    inverse, offset_L1 = order.argsort(), _offsets(count_RL.view(ranks, -1).sum(0))
    y = ops.grouped_mlp(_Permute.apply(rows, order, inverse), offset_L1, w13, w2, RECIPE)
    back = _AllToAll.apply(_Permute.apply(y, inverse, order), into_R, out_R)
    sorted_TK = layout.row_TK.flatten()
    y_TKD = _Permute.apply(back, sorted_TK, layout.source_N).unflatten(0, gate.shape)
    y_TD = ops.combine(y_TKD, gate)
    if shared_TD is None:
      return y_TD
    if self.side is not None:
      torch.cuda.current_stream().wait_stream(self.side)
    return y_TD + shared_TD

  def communication(self, sets: list[Inputs], i: int, clock: Clock) -> None:
    """RDEP with experts that return their rows, and without shared experts."""
    rdep, ops, shared = self.rdep, self.ops, self.shared
    self.shared, rdep.ops = (
      None,
      SimpleNamespace(
        layout=ops.layout,
        combine=ops.combine,
        grouped_mlp_forward=lambda x, offset, w13, w2, recipe, keep: (x, None),
        grouped_mlp_backward=lambda kept, dy, gate, w13, w2: (dy, gate, lambda: (w13, w2)),
      ),
    )
    self.layer(self.by_rdep, sets, i, clock)
    self.shared, rdep.ops = shared, ops

  def computation(self, sets: list[Inputs], i: int, clock: Clock) -> None:
    """The grouped experts over as many rows as come to this rank, and the shared experts."""
    d = sets[i]
    leaves = [t.detach().requires_grad_() for t in (_tiled(d.x_TD, d.rows), self.w13, self.w2)]
    dy_ND, x_TD = _tiled(d.dy_TD, d.rows), d.x_TD.detach().requires_grad_()
    offset_L1 = self._offsets(d)
    clock.start("layer")
    self.ops.grouped_mlp(leaves[0], offset_L1, *leaves[1:], RECIPE).backward(dy_ND)
    if self.shared is not None:
      self.shared(x_TD).backward(d.dy_TD)
    clock.start("between")

  def deviation(self, d: Inputs) -> dict[str, float]:
    """‖RDEP - all-to-all‖ / ‖all-to-all‖ of the output and every gradient, the worst rank's, with
    and without products that return their rows.
    """
    wanted, worst = self.gradients(self.by_all_to_all, d), dict.fromkeys(NAMES, 0.0)
    for fused in (False, True):
      with self.returning(fused):
        found = self.gradients(self.by_rdep, d)
      ratios = [_apart(a, b) for a, b in zip(found, wanted, strict=True)]
      worst = {n: max(worst[n], ratio) for n, ratio in zip(NAMES, self.most(ratios), strict=True)}
    wrong = {name: ratio for name, ratio in worst.items() if not ratio <= BOUND[self.dtype]}
    if wrong:
      raise CommError(f"RDEP and all_to_all_single disagree ({wrong}); nothing was measured")
    return worst

  def interleaved(
    self, variants: dict[Hashable, Variant], repeats: int
  ) -> dict[tuple[Hashable, str], np.ndarray]:
    """(variant, phase) -> ms per call of each repeat, the slowest rank's."""
    clock, calls = Clock(self.device), {}
    for name, variant in variants.items():
      self._timed(variant, clock, 1, 0)
      seconds = sum(self._timed(variant, clock, SETS, 0).values())
      calls[name] = max(1, round(BURST_S / max(self.most([seconds])[0], 1e-6)))
    found: dict[tuple[Hashable, str], list[float]] = {}
    for repeat in range(repeats):
      for name, variant in variants.items():
        times = self._timed(variant, clock, calls[name], repeat)
        for phase, seconds in zip(times, self.most(list(times.values())), strict=True):
          found.setdefault((name, phase), []).append(1e3 * seconds)
    return {name: np.array(ms) for name, ms in found.items()}

  def _timed(self, variant: Variant, clock: Clock, calls: int, first: int) -> dict[str, float]:
    """Seconds per call by phase, after a barrier."""
    clock.start("between")
    clock.read()
    dist.barrier(self.ranks.control)
    for call in range(calls):
      variant((first + call) % SETS, clock)
    seconds = clock.read()
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

  def _beside(self, x: Tensor) -> Tensor | None:
    """The shared experts, on their own stream; autograd runs their backward pass there too."""
    if self.shared is None or self.side is None:
      return None if self.shared is None else self.shared(x)
    self.side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(self.side):
      return self.shared(x)

  def _offsets(self, d: Inputs) -> Tensor:
    """Of this rank's experts in the rows that come to it."""
    count_RRL = d.route.count_RE.view(self.rdep.num_ranks, self.rdep.num_ranks, -1)
    return _offsets(count_RRL[:, self.rdep.rank].sum(0))

  def _wait(self, kind: int, number: int) -> None:
    late = self.rdep.exchange.wait(kind, number)
    if late:
      raise CommError(self.rdep.post_mortem(kind, number, late))

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


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
  """Every comparison; the result of `nmoe bench rdep` without what its parent adds."""
  tokens = bench.config.data.seq_len
  full, few = bench.inputs(tokens), bench.inputs(min(tokens, LATENCY_TOKENS))
  with bench.ranks.explained():
    deviation = bench.deviation(full[0])
    rows = [*_movers(bench, full, repeats)]
    rows += _returns(bench, full, repeats)
    rows += _layers(bench, full, repeats, parts=True)
    rows += _trips(bench, few, bench.rdep.exchange.blocks, repeats)
    rows += _layers(bench, few, repeats, parts=False)
  ms = {row.what: row.ms for row in reversed(rows) if row.tokens == tokens}
  rate = {row.what: row.gb_s for row in reversed(rows) if row.tokens == tokens and row.gb_s}
  alone = max(ms["communication alone"], ms["computation alone"])
  e = bench.config.moe
  shape = {"T": tokens, "D": bench.config.model.dim, "F": e.expert_dim, "E": e.num_experts}
  return {
    "device": bench.target.name,
    "torch": torch.__version__,
    "ranks": bench.ranks.ranks,
    "devices": max(1, torch.cuda.device_count()) if bench.side else 1,
    "backend": dist.get_backend(),
    "dtype": str(bench.dtype).removeprefix("torch."),
    "shape": shape | {"K": e.top_k, "shared": e.num_shared},
    "deviation": deviation,
    "dispatch_of_copy": rate["dispatch"] / rate["peer copy"],
    "return_of_copy": rate["return"] / rate["peer copy"],
    "fused_return": {what: ms[f"{what}, return"] / ms[f"{what} with return"] for what in RETURNED},
    "speedup": ms["layer, all_to_all_single"] / ms["layer, RDEP"],
    "over_longer_part": ms["layer, RDEP"] / alone,
    "rows": [asdict(row) for row in rows],
  }


def _movers(bench: Bench, sets: list[Inputs], repeats: int) -> Iterator[Row]:
  """Dispatch and return beside a plain copy, first with the SMs that training uses."""
  blocks = bench.rdep.exchange.blocks
  choices = [blocks, *(n for n in SMS if n != blocks)] if blocks else [None]
  variants: dict[Hashable, Variant] = {n: partial(bench.trip, sets, n) for n in choices}
  found = bench.interleaved({"peer copy": partial(bench.copy, sets), **variants}, repeats)
  size = _bytes_out(bench, sets)
  yield _row("peer copy", sets, found["peer copy", "copy"], size)
  for n in choices:
    for phase in ("dispatch", "return"):
      yield _row(phase, sets, found[n, phase], size, n)


def _returns(bench: Bench, sets: list[Inputs], repeats: int) -> Iterator[Row]:
  """The products whose rows travel back: apart from their return, and with it in one kernel."""
  variants: dict[Hashable, Variant] = {}
  for what, weight in zip(RETURNED, (bench.w2, bench.w13.mT), strict=True):
    trip = partial(bench.trip, sets, bench.rdep.exchange.blocks)
    variant = partial(trip, products=bench.products(sets, weight))
    for name, fused in ((f"{what}, return", False), (f"{what} with return", True)):
      variants[name] = partial(bench.returned, fused, variant)
  found = bench.interleaved(variants, repeats)
  for name in variants:
    yield _row(str(name), sets, found[name, "return"])


def _trips(bench: Bench, sets: list[Inputs], sms: int | None, repeats: int) -> Iterator[Row]:
  found = bench.interleaved({"trip": partial(bench.trip, sets, sms)}, repeats)
  for phase in ("dispatch", "return"):
    yield _row(phase, sets, found["trip", phase], _bytes_out(bench, sets), sms)


def _layers(bench: Bench, sets: list[Inputs], repeats: int, *, parts: bool) -> Iterator[Row]:
  """Forward and backward of the layer, and of its parts by themselves."""
  variants: dict[Hashable, Variant] = {
    "layer, RDEP": partial(bench.layer, bench.by_rdep, sets),
    "layer, all_to_all_single": partial(bench.layer, bench.by_all_to_all, sets),
  }
  if parts:
    variants["layer, RDEP, products with return"] = partial(
      bench.returned, True, variants["layer, RDEP"]
    )
    variants["communication alone"] = partial(bench.communication, sets)
    variants["computation alone"] = partial(bench.computation, sets)
  for (name, _), ms in bench.interleaved(variants, repeats).items():
    yield _row(str(name), sets, ms)


def _row(
  what: str, sets: list[Inputs], ms: np.ndarray, size: float | None = None, sms: int | None = None
) -> Row:
  low, middle, high = np.percentile(ms, [10, 50, 90]).tolist()
  rate = None if size is None else size / middle / 1e6
  return Row(what, sets[0].x_TD.shape[0], middle, low, high, rate, sms)


def _bytes_out(bench: Bench, sets: list[Inputs]) -> float:
  """Bytes of rows that leave a rank in one dispatch, or come back: the busiest rank's mean."""
  rows = sum(sum(d.sent_R) - d.sent_R[bench.rdep.rank] for d in sets) / len(sets)
  return bench.most([rows * sets[0].x_TD.shape[1] * sets[0].x_TD.itemsize])[0]


def _apart(a: Tensor, b: Tensor) -> float:
  """‖a - b‖ / ‖b‖ in float64, of some rows at a time: the experts' gradients fill a GPU."""
  parts = [t.split(max(1, len(t) // 64)) for t in (a, b)]
  squares = [
    torch.stack([(x.double() - y.double()).square().sum(), y.double().square().sum()])
    for x, y in zip(*parts, strict=True)
  ]
  difference, whole = torch.stack(squares).sum(0).sqrt().tolist()
  return difference / whole


def _tiled(x_TD: Tensor, rows: int) -> Tensor:
  """As many rows as asked for, of x's again and again."""
  return x_TD.repeat(-(-rows // x_TD.shape[0]), 1)[:rows]


def _offsets(count_L: Tensor) -> Tensor:
  return torch.nn.functional.pad(count_L.cumsum(0), (1, 0)).int()


def attempt(options: argparse.Namespace) -> None:
  """Measure a recorded run's configuration; rank 0 owns the record meanwhile and writes what was
  measured, or what failed, into it.
  """
  with closing(Experiments(options.root)) as records:
    run = records.run(options.run) if options.rank else records.claim(options.run)
    try:
      found = execute(options, configs.loads(run.toml, f"run {run.id}", env={}))
    except BaseException as error:
      if options.rank == 0:
        name = "" if isinstance(error, NmoeError) else f"{type(error).__name__}: "
        records.update_run(run.id, status="failed", error=f"{name}{error}")
      raise
    if options.rank == 0:
      records.update_run(run.id, status="completed", results=found)


def execute(options: argparse.Namespace, config: Config) -> dict[str, Any]:
  target = select(config, options.rank)
  ranks = parallel.init(config, target, options.rank, options.rendezvous)
  found = measure(Bench(config, target, ranks), options.repeats)
  ranks.close()
  return found


def main() -> int:
  p = parser("nmoe.bench.rdep")
  p.add_argument("--repeats", type=int, required=True)
  try:
    attempt(p.parse_args())
  except NmoeError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
