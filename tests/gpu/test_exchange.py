"""Two ranks' exchanges and experts in one process, their blocks on one GPU, without waits."""

import pytest
import torch

from gpu.oracle import FOUR, normal, roundings
from gpu.test_blockscale import samples
from kernels import reference
from kernels.buffers import Buffers, Route, views
from kernels.cuda.exchange import BLOCKS, Exchange
from kernels.cuda.experts import grouped_mlp_backward, grouped_mlp_forward
from kernels.cuda.layout import layout
from kernels.cuda.quantization import quantize
from kernels.cuda.rows import CODES
from kernels.formats import quantize_rows
from kernels.ops import Product, Recipe
from kernels.places import places
from kernels.reference.blockscale import quantize as by_definition
from kernels.reference.exchange import Exchange as ReferenceExchange
from kernels.sizes import ALIGNMENT, PAYLOADS, BufferLayout, row_parts

pytestmark = pytest.mark.gpu
RANKS, E, K, D, F, TOKENS = 2, 8, 3, 320, 136, 600
ROUTINGS = {"uniform": range(E), "one rank gets none": range(E // 2), "one expert": [E - 1]}
PACKED = {"fp8": "mxfp8", "nvfp4": "nvfp4"}  # a row's format: a payload that has it
DIMS = [n * CODES for n in (2, 20, 32, 66)]  # a warp takes 32 · CODES at a time


def blocks(sizes: BufferLayout, device: str) -> list[Buffers]:
  found = []
  for _ in range(RANKS):
    memory = torch.zeros(sizes.nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    found.append(views(sizes, memory[start : start + sizes.nbytes]))
  return found


def movers(capacity: int, payload: str) -> list[Exchange]:
  sizes = BufferLayout(RANKS, E, capacity, TOKENS * K, D, "bf16", payload)
  peers = blocks(sizes, "cuda")
  return [Exchange(peers, rank, 1.0) for rank in range(RANKS)]


def routed(kind: str, alignment: int, top_k: int = K):
  """Of each rank a Route; the places of all."""
  among = torch.tensor(ROUTINGS[kind])
  experts = [among[torch.randint(len(among), (TOKENS - 99 * r, top_k))] for r in range(RANKS)]
  experts = [expert.to("cuda", torch.int32) for expert in experts]
  layouts = [layout(expert, E) for expert in experts]
  count_RE = torch.stack([order.offset_E1.diff() for order in layouts]).long()
  where = places(count_RE, alignment)
  pairs = zip(experts, layouts, strict=True)
  return [Route(e, order, count_RE, where.base_RE) for e, order in pairs], where


def layer(kind: str, fused: bool, alignment: int = 1, payload: str = "bf16"):
  """y, dx, dgate of each rank's tokens and dw13, dw2 of its experts, as RDEP moves them."""
  torch.manual_seed(0)
  routes, where = routed(kind, alignment)
  x, dy = ([normal(len(r.expert_TK), D, grad=False) for r in routes] for _ in range(2))
  gate = [torch.rand(r.expert_TK.shape, device="cuda") for r in routes]
  w13 = normal(E, 2 * F, D, scale=D**-0.5).detach()
  w2 = normal(E, D, F, scale=F**-0.5).detach()
  weights = [[w[r * E // RANKS : (r + 1) * E // RANKS].clone() for w in (w13, w2)] for r in (0, 1)]
  exchanges, format = movers(max(int(where.end_R.max()), 1), payload), PAYLOADS[payload]
  for exchange in exchanges:
    exchange.fused = fused
  for mover, x_TD, route in zip(exchanges, x, routes, strict=True):
    mover.send(1, x_TD, None, route, 0, format.x)
  kept = []
  for r, mover in enumerate(exchanges):
    rows, _, origin = mover.receive(
      mover.capacity, format.x
    )  # rows beyond end_R[r], or all, are zero
    offset = where.edge_RL1[r].int()
    y, state = grouped_mlp_forward(rows, offset, *weights[r], Recipe(), True)
    y = mover.multiply(y, origin) if isinstance(y, Product) else y
    mover.reply(1, origin, y, None, routes[r], 0)
    kept.append((state, origin))
  out = [m.collect(r)[0].clone() for m, r in zip(exchanges, routes, strict=True)]
  for r, mover in enumerate(exchanges):
    mover.send(2, dy[r], gate[r], routes[r], 0, format.dy)
  gradients = []
  for r, mover in enumerate(exchanges):
    rows, gate_C, _ = mover.receive(mover.capacity, format.dy)
    state, origin = kept[r]
    dx, dgate, rest = grouped_mlp_backward(state, rows, gate_C, *weights[r])
    dx = mover.multiply(dx, origin, dgate) if isinstance(dx, Product) else dx
    mover.reply(2, origin, dx, dgate, routes[r], 0)
    gradients.append(rest())
  back = [[t.clone() for t in m.collect(r)] for m, r in zip(exchanges, routes, strict=True)]
  given = torch.cat(x), torch.cat([r.expert_TK for r in routes]), torch.cat(gate), torch.cat(dy)
  found = [torch.cat(out), *(torch.cat(parts) for parts in zip(*back, strict=True))]
  found += [torch.cat(parts) for parts in zip(*gradients, strict=True)]
  return found, (*given, w13, w2)


def definition(x, expert, gate, dy, w13, w2):
  """The same in float64: y and dx of every (t, k) by itself."""
  x, gate, w13, w2 = (t.double().requires_grad_() for t in (x, gate, w13, w2))
  x_ND = x.repeat_interleave(K, 0)
  order = reference.layout(expert.cpu(), E)
  source, offset = order.source_N.cuda(), order.offset_E1
  rows = x_ND.detach().requires_grad_()
  y_ND = reference.grouped_mlp(rows[source], offset, w13, w2, Recipe())
  y_TKD = y_ND[order.row_TK.flatten().cuda()].unflatten(0, gate.shape)
  total = (gate[:, :, None] * y_TKD).sum(1)
  dx, *rest = torch.autograd.grad(total, (rows, gate, w13, w2), dy.double())
  return [y_TKD.detach(), dx.unflatten(0, gate.shape), *rest]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_a_layer_is_the_definition(kind, alignment, fused):
  found, given = layer(kind, fused, alignment)
  for name, got, want in zip("y dx dgate dw13 dw2".split(), found, definition(*given), strict=True):
    assert roundings(got, want) <= FOUR, name


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_rows_that_return_from_the_product_are_the_same(kind, alignment):
  apart, _ = layer(kind, False, alignment)
  fused, _ = layer(kind, True, alignment)
  assert all(torch.equal(a, b) for a, b in zip(apart, fused, strict=True))


@pytest.mark.parametrize("payload", PACKED.values())
@pytest.mark.parametrize("kind", ROUTINGS)
def test_a_layer_with_packed_rows_is_the_definition_with_quantized_rows(kind, payload):
  found, (x, expert, gate, dy, *weights) = layer(kind, False, payload=payload)
  pairs = zip((x, dy), PAYLOADS[payload], strict=True)
  x, dy = (quantize_rows(t, format, by_definition).dequantize(t.dtype) for t, format in pairs)
  want = definition(x, expert, gate, dy, *weights)
  for name, got, exact in zip("y dx dgate dw13 dw2".split(), found, want, strict=True):
    assert roundings(got, exact) <= FOUR, name


def on_cpu(route: Route) -> Route:
  order = type(route.layout)(*(t.cpu() for t in route.layout))
  return Route(route.expert_TK.cpu(), order, route.count_RE.cpu(), route.base_RE.cpu())


def bits(row: torch.Tensor) -> torch.Tensor:
  """Of bf16 numbers, with one NaN."""
  row = row.cpu()
  return torch.where(row.isnan(), torch.nan, row).view(torch.int16)


def rows_with_ends(num_rows: int, dim: int) -> torch.Tensor:
  """`samples` with rows that are not finite, the largest, and the smallest."""
  x = samples(num_rows, dim)
  x[5, 3], x[7, 9], x[8], x[9] = torch.nan, -torch.inf, 2.0**-130, 6 * 2.0**-133
  x[10, 1], x[11, 2] = 1.96875 * 2.0**127, torch.finfo(x.dtype).max
  return x


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("format", PACKED)
def test_one_rank_quantizes_as_the_reference_does(format, dim):
  x = rows_with_ends(TOKENS, dim)
  ours = quantize_rows(x.cuda(), format, quantize).dequantize(x.dtype)
  assert torch.equal(bits(ours), bits(quantize_rows(x, format, by_definition).dequantize(x.dtype)))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("format", PACKED)
def test_packed_rows_are_the_reference_bit_for_bit(format, kind, alignment, dim):
  """Codes, scales and what is received, in two rounds, with gates in the second."""
  torch.manual_seed(2)
  routes, where = routed(kind, alignment)
  capacity = -(-int(where.end_R.max()) // 2)
  sizes = BufferLayout(RANKS, E, capacity, TOKENS * K, dim, "bf16", PACKED[format])
  ours, theirs = blocks(sizes, "cuda"), blocks(sizes, "cpu")
  pairs = [(Exchange(ours, r, 1.0), ReferenceExchange(theirs, r, 1.0)) for r in range(RANKS)]
  x = [rows_with_ends(len(r.expert_TK), dim) for r in routes]
  gates = [torch.rand(r.expert_TK.shape) for r in routes]
  for low in (0, capacity):
    for r, (mover, other) in enumerate(pairs):
      gate = gates[r] if low else None
      mover.send(1, x[r].cuda(), gate if gate is None else gate.cuda(), routes[r], low, format)
      other.send(1, x[r], gate, on_cpu(routes[r]), low, format)
    for r, (mover, other) in enumerate(pairs):
      num_rows = min(max(int(where.end_R[r]) - low, 0), capacity)
      there = other.mine.origin_C[:num_rows] >= 0
      size = sum(row_parts(dim, format))
      travelled = [b[r].row_CD[:num_rows, :size].cpu()[there] for b in (ours, theirs)]
      assert torch.equal(*travelled)
      found, want = mover.receive(num_rows, format), other.receive(num_rows, format)
      assert torch.equal(bits(found[0]), bits(want[0]))
      assert torch.equal(found[2].cpu(), want[2])
      assert not low or torch.equal(found[1].cpu()[there], want[1][there])
      assert (mover.mine.origin_C == -1).all()


@pytest.mark.parametrize("sms", [1, 3, BLOCKS])  # one stores all rows; two share those that leave
@pytest.mark.parametrize("top_k", [1, 3, 33])
@pytest.mark.parametrize("dim", [8, 320, 2048, 4360])  # a lane loads eight vectors before it stores
def test_rows_and_gates_arrive_where_the_reference_puts_them(dim, top_k, sms):
  """Two rounds; a warp's lanes have a slot each, of which there are 32 at a time."""
  torch.manual_seed(3)
  routes, where = routed("uniform", 1, top_k)
  capacity = -(-int(where.end_R.max()) // 2)
  sizes = BufferLayout(RANKS, E, capacity, TOKENS * top_k, dim, "bf16")
  ours, theirs = blocks(sizes, "cuda"), blocks(sizes, "cpu")
  pairs = [(Exchange(ours, r, 1.0), ReferenceExchange(theirs, r, 1.0)) for r in range(RANKS)]
  x = [torch.randn(len(r.expert_TK), dim).bfloat16() for r in routes]
  gates = [torch.rand(r.expert_TK.shape) for r in routes]
  for low in (0, capacity):
    for r, (mover, other) in enumerate(pairs):
      mover.blocks = sms
      mover.send(1, x[r].cuda(), gates[r].cuda(), routes[r], low, "bf16")
      other.send(1, x[r], gates[r], on_cpu(routes[r]), low, "bf16")
    for r, (mover, other) in enumerate(pairs):
      num_rows = min(max(int(where.end_R[r]) - low, 0), capacity)
      pairs_of = zip(mover.receive(num_rows, "bf16"), other.receive(num_rows, "bf16"), strict=True)
      assert all(torch.equal(found.cpu(), want) for found, want in pairs_of)


def test_weight_gradients_are_made_in_fp32_and_added_in_place():
  torch.manual_seed(1)
  counts = [200, 0, 37]
  offset = torch.tensor([0, 200, 200, 237], dtype=torch.int32, device="cuda")
  x, dy = normal(sum(counts), D, grad=False), normal(sum(counts), D, grad=False)
  gate = torch.rand(sum(counts), device="cuda")
  weights = [normal(3, 2 * F, D, scale=D**-0.5), normal(3, D, F, scale=F**-0.5)]
  for w in weights:
    w.grad_dtype = torch.float32

  def gradients(rows: slice, offset_E1):
    _, kept = grouped_mlp_forward(x[rows], offset_E1, *weights, Recipe(), True)
    return grouped_mlp_backward(kept, dy[rows], gate[rows], *weights)[2]()

  with torch.no_grad():
    once = gradients(slice(None), offset)
    for w, g in zip(weights, once, strict=True):
      assert g.dtype == torch.float32
      w.grad = g.clone()
    assert gradients(slice(None), offset) == (None, None)
    assert gradients(slice(0), torch.zeros_like(offset)) == (None, None)  # no rows add nothing
  assert all(torch.equal(w.grad, g + g) for w, g in zip(weights, once, strict=True))


def test_a_rank_without_rows_has_zero_gradients():
  w13, w2 = normal(2, 2 * F, D), normal(2, D, F)
  none, offset = normal(0, D, grad=False), torch.zeros(3, dtype=torch.int32, device="cuda")
  with torch.no_grad():
    y, kept = grouped_mlp_forward(none, offset, w13, w2, Recipe(), True)
    dx, dgate, rest = grouped_mlp_backward(kept, none, torch.empty(0, device="cuda"), w13, w2)
    dw13, dw2 = rest()
  assert y.shape == dx.shape == (0, D) and dgate.shape == (0,)
  assert dw13.shape == w13.shape and not dw13.any() and dw2.shape == w2.shape and not dw2.any()
