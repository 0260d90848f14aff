"""Speed of the cuda kernels: python -m kernels.tools.bench [--rest MS] [moe | return | loss | ...]
...

The process needs the environment of kernels.arch.environment. Every number is a median of
interleaved runs with CUDA events after a warm-up, on inputs that rotate past the L2, beside the
dense peak (an 8192³ bf16 product) or a device copy measured in the same run. One JSON line per row.

Without a rest the runs follow each other and large products settle at the board's power limit, as
in training. With `--rest 100` the GPU idles 100 ms before each run and clocks as high as it can.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kernels.buffers import BufferLayout
from kernels.cuda.attention import attention
from kernels.cuda.exchange import Exchange
from kernels.cuda.experts import experts
from kernels.cuda.gemms import rows as rows_of_experts
from kernels.cuda.layout import layout
from kernels.cuda.loss import linear_cross_entropy
from kernels.cuda.norm import add_rms_norm, rms_norm
from kernels.cuda.rope import mla_qkv
from kernels.cuda.router import route
from kernels.ops import Product, Recipe, RouterSpec

WARMUP, REPEATS, SETS = 5, 20, 3
BURST, SHORT = 300.0, 15.0  # ms of a run, and of one after a rest
PEAK = 8192
CYCLES = 1_500_000  # of an idling GPU's clock in a millisecond, about
BF16 = Recipe()


@dataclass(frozen=True)
class Row:
  """One measured variant: ms, rate in TFLOP/s or GB/s, share of the dense peak or copy rate."""

  what: str
  shape: dict
  ms: float
  ms_p10: float
  ms_p90: float
  rate: float
  unit: str
  share: float
  extra_gib: float | None = None


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
  def flops(self) -> float:
    """Of the routed experts, forward and backward; the router's are not counted."""
    return 18.0 * self.tokens * self.top_k * self.dim * self.width


MOES = (
  Moe(),
  Moe(skew=5.0),
  Moe(width=512, num_experts=256, top_k=8),
  Moe(tokens=4096),
)


def normal(*shape: int, scale: float = 1.0, grad: bool = False, dtype=torch.bfloat16) -> Tensor:
  """Random normal values on the GPU."""
  return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_(grad)


def elapsed(variant: Callable[[int], object], calls: int, first: int, rest: float = 0.0) -> float:
  """Mean milliseconds of `calls` calls in a row, on input sets first, first + 1, ...

  Before them the GPU idles about `rest` ms, while the host fills its queue.
  """
  start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  if rest:
    torch.cuda._sleep(int(rest * CYCLES))
  start.record()
  for call in range(calls):
    variant((first + call) % SETS)
  end.record()
  end.synchronize()
  return start.elapsed_time(end) / calls


def interleaved(
  variants: dict[str, Callable[[int], object]], rest: float = 0.0
) -> dict[str, list[float]]:
  """Milliseconds per call of each variant's runs, sorted; a run lasts about BURST or one call.

  variant(i) works on input set i. A run of a single call would count what the host takes to queue
  its first kernels, and would end before the board's power limit is felt. rest: ms of idling before
  each run, while the host fills the queue; a run is SHORT then, so that the GPU stays cool.
  """
  calls = {}
  for name, variant in variants.items():
    elapsed(variant, SETS, 0)
    calls[name] = max(1, round((SHORT if rest else BURST) / elapsed(variant, SETS, 0)))
  times: dict[str, list[float]] = {name: [] for name in variants}
  for run in range(WARMUP + REPEATS):
    for name, variant in variants.items():
      ms = elapsed(variant, calls[name], run, rest)
      if run >= WARMUP:
        times[name].append(ms)
  return {name: sorted(values) for name, values in times.items()}


def percentile(times: list[float], share: float) -> float:
  return times[min(len(times) - 1, int(share * len(times)))]


def peak_product() -> Callable[[int], object]:
  """The 8192³ bf16 product whose rate is called the dense peak."""
  pairs = [(normal(PEAK, PEAK), normal(PEAK, PEAK)) for _ in range(SETS)]
  return lambda i: pairs[i][0] @ pairs[i][1]


def copy() -> Callable[[int], object]:
  """A device copy of 2 GiB, whose rate bounds what a memory-bound kernel can do."""
  source, target = (torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda") for _ in range(2))
  return lambda i: target.copy_(source)


def rows(
  variants: dict[str, Callable], work: dict[str, float], shape: dict, unit: str, rest: float
) -> Iterator[Row]:
  """Measure the variants beside the ceiling of their unit. work: FLOPs or bytes of each."""
  tera = unit == "TFLOP/s"
  ceiling = ("dense 8192³", peak_product(), 2.0 * PEAK**3) if tera else ("copy", copy(), 2.0**32)
  times = interleaved({ceiling[0]: ceiling[1], **variants}, rest)
  scale = 1e9 if tera else 1e6
  top = ceiling[2] / percentile(times[ceiling[0]], 0.5) / scale
  for name, values in times.items():
    ms = percentile(values, 0.5)
    rate = work.get(name, ceiling[2]) / ms / scale
    spread = percentile(values, 0.1), percentile(values, 0.9)
    yield Row(name, shape, ms, *spread, rate, unit, rate / top)


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
    return experts(self.x[i], routing.gate_TK, order, self.w13, self.w2, BF16)

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


def bench_moe(rest: float) -> Iterator[Row]:
  for moe in MOES:
    layer = MoeLayer(moe)
    variants = {"experts, routing given": layer.given}
    if moe.skew == 1.0:
      variants["whole layer"] = layer.step
    yield from rows(variants, dict.fromkeys(variants, moe.flops), asdict(moe), "TFLOP/s", rest)


class Owner:
  """The rows of half of the experts and the way back to their sources, two ranks.

  Both ranks' buffers lie in this GPU's memory: the second stands for a peer's. A call overwrites
  what an earlier one returned.
  """

  def __init__(self, moe: Moe):
    self.moe, items, held = moe, moe.tokens * moe.top_k, moe.num_experts // 2
    sizes = BufferLayout(2, moe.num_experts, 1, items, moe.dim, torch.bfloat16)
    blocks = [torch.zeros(sizes.nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    self.exchange = Exchange([sizes.views(block) for block in blocks], 0, 1.0)
    order = layout(torch.cat([skewed_routing(moe) for _ in range(2)]), moe.num_experts)
    self.offset = order.offset_E1[: held + 1]
    self.origin = order.source_N[: int(self.offset[-1])]  # rank · items + t · K + k
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

  def variants(self, name: str, of: Callable[[int], tuple]) -> dict[str, Callable[[int], object]]:
    return {
      f"{name}, not returned": lambda i: rows_of_experts(*of(i)[0]),
      f"{name}, then returned": lambda i: self.back(False, *of(i)),
      f"{name}, returned by its product": lambda i: self.back(True, *of(i)),
    }


def bench_return(rest: float) -> Iterator[Row]:
  """What decided kernels.cuda.exchange.FUSED, but for NVLink, which is slower than this memory."""
  owner = Owner(MOES[0])
  y, dx = owner.variants("y", owner.y), owner.variants("dx", owner.dx)
  flops = 2.0 * len(owner.origin) * owner.moe.dim * owner.moe.width
  work = dict.fromkeys(y, flops) | dict.fromkeys(dx, 2 * flops)
  shape = {**asdict(owner.moe), "ranks": 2, "rows": len(owner.origin)}
  yield from rows({**y, **dx}, work, shape, "TFLOP/s", rest)


def bench_loss(rest: float, tokens=16384, dim=2048, vocab=201088, chunk=4096) -> Iterator[Row]:
  x = [normal(tokens, dim, grad=True) for _ in range(SETS)]
  weight = normal(vocab, dim, scale=dim**-0.5, grad=True)
  target = torch.randint(0, vocab, (tokens,), device="cuda")

  def step(i: int) -> None:
    weight.grad = x[i].grad = None
    linear_cross_entropy(x[i], weight, target, chunk)[0].backward()

  shape = {"T": tokens, "D": dim, "V": vocab, "chunk": chunk}
  found = list(
    rows(
      {"head and loss": step}, {"head and loss": 6.0 * tokens * dim * vocab}, shape, "TFLOP/s", rest
    )
  )
  weight.grad = None
  torch.cuda.synchronize()
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  step(0)
  extra = (torch.cuda.max_memory_allocated() - before) / 2**30
  yield found[0]
  yield Row(**{**asdict(found[1]), "extra_gib": extra})


def bench_attention(rest: float, batch=4, seq=4096, heads=16, qk=192, v=128) -> Iterator[Row]:
  sets = [
    [normal(batch, seq, heads, width, grad=True) for width in (qk, qk, v)] for _ in range(SETS)
  ]
  dy = normal(batch, seq, heads, v)

  def step(i: int) -> None:
    torch.autograd.grad(attention(*sets[i], qk**-0.5), sets[i], dy)

  def forward(i: int) -> None:
    attention(*sets[i], qk**-0.5)

  flops = 1.0 * batch * heads * seq * seq * (qk + v)
  work = {"attention forward": flops, "attention forward + backward": 3.5 * flops}
  shape = {"B": batch, "S": seq, "H": heads, "QK": qk, "V": v}
  yield from rows(dict(zip(work, (forward, step), strict=True)), work, shape, "TFLOP/s", rest)


def bench_norm(rest: float, tokens=32768, dim=2048) -> Iterator[Row]:
  x, residual, dy = ([normal(tokens, dim, grad=True) for _ in range(SETS)] for _ in range(3))
  weight = normal(dim, dtype=torch.float32, grad=True)

  def plain(i: int) -> None:
    torch.autograd.grad(rms_norm(x[i], weight, 1e-6), [x[i], weight], dy[i])

  def added(i: int) -> None:
    y, total = add_rms_norm(x[i], residual[i], weight, 1e-6)
    torch.autograd.grad([y, total], [x[i], residual[i], weight], [dy[i], dy[i]])

  size = 2.0 * tokens * dim
  work = {"rms_norm forward + backward": 5 * size, "add_rms_norm forward + backward": 8 * size}
  yield from rows(
    dict(zip(work, (plain, added), strict=True)), work, {"T": tokens, "D": dim}, "GB/s", rest
  )


def bench_rope(rest: float, batch=8, seq=4096, heads=16, nope=128, rope=64, v=128) -> Iterator[Row]:
  widths = ((heads, nope + rope), (heads, nope + v), (rope,))
  sets = [[normal(batch, seq, *w, grad=True) for w in widths] for _ in range(SETS)]
  angle = torch.rand(seq, rope // 2, device="cuda")
  cos, sin = angle.cos(), angle.sin()
  dys = [normal(batch, seq, heads, w) for w in (nope + rope, nope + rope, v)]

  def step(i: int) -> None:
    torch.autograd.grad(mla_qkv(*sets[i], cos, sin, rope), sets[i], dys)

  per_token = heads * (2 * nope + rope + v) + rope + heads * (2 * (nope + rope) + v)
  work = {"mla_qkv forward + backward": 2.0 * 2 * batch * seq * per_token}
  shape = {"B": batch, "S": seq, "H": heads, "nope": nope, "rope": rope, "V": v}
  yield from rows(dict.fromkeys(work, step), work, shape, "GB/s", rest)


BENCHES = {
  "moe": bench_moe,
  "return": bench_return,
  "loss": bench_loss,
  "attention": bench_attention,
  "norm": bench_norm,
  "rope": bench_rope,
}


def report(found: Iterator[Row]) -> None:
  """One JSON line per row on standard output."""
  for row in found:
    sys.stdout.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def arguments() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
  parser.add_argument("--rest", type=float, default=0.0, metavar="MS", help="idle before each run")
  return parser


def main() -> None:
  """Run the named benches, or all."""
  parser = arguments()
  parser.add_argument("names", nargs="*", metavar="|".join(BENCHES), help="all without a name")
  given = parser.parse_args()
  properties = torch.cuda.get_device_properties(0)
  where = {
    "device": properties.name,
    "torch": torch.__version__,
    "cudnn": torch.backends.cudnn.version(),
    "rest_ms": given.rest,
  }
  sys.stdout.write(json.dumps(where) + "\n")
  for name in given.names or BENCHES:
    report(BENCHES[name](given.rest))
    torch.cuda.empty_cache()


if __name__ == "__main__":
  main()
