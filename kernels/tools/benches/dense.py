"""Benches of what every token passes: dense products, attention, norms, rotation, head and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from kernels.cuda.attention import attention
from kernels.cuda.dense import linear, mlp
from kernels.cuda.loss import linear_cross_entropy
from kernels.cuda.norm import add_rms_norm, rms_norm
from kernels.cuda.rope import mla_qkv
from kernels.ops import Recipe
from kernels.tools.rates import Case, How, Row, normal, rows
from kernels.tools.timing import SETS

BF16 = Recipe()


def bench_mlp(how: How, tokens=8192, dim=2048, width=11264) -> Iterator[Row]:
  """A linear layer and a SwiGLU block, forward and backward."""
  x = [normal(tokens, dim, grad=True) for _ in range(SETS)]
  dy = [normal(tokens, dim) for _ in range(SETS)]
  square = normal(dim, dim, scale=dim**-0.5, grad=True)
  w13 = normal(2 * width, dim, scale=dim**-0.5, grad=True)
  w2 = normal(dim, width, scale=width**-0.5, grad=True)

  def one(i: int) -> None:
    torch.autograd.grad(linear(x[i], square, BF16), [x[i], square], dy[i])

  def block(i: int) -> None:
    torch.autograd.grad(mlp(x[i], w13, w2, BF16), [x[i], w13, w2], dy[i])

  shape = {"T": tokens, "D": dim, "F": width}
  cases = [
    Case("linear, D by D", one, 6.0 * tokens * dim * dim, {"T": tokens, "D": dim}),
    Case("mlp", block, 18.0 * tokens * dim * width, shape),
  ]
  yield from rows(cases, "TFLOP/s", how)


def bench_loss(how: How, tokens=16384, dim=2048, vocab=201088, chunk=4096) -> Iterator[Row]:
  x = [normal(tokens, dim, grad=True) for _ in range(SETS)]
  weight = normal(vocab, dim, scale=dim**-0.5, grad=True)
  target = torch.randint(0, vocab, (tokens,), device="cuda")

  def step(i: int) -> None:
    weight.grad = x[i].grad = None
    linear_cross_entropy(x[i], weight, target, chunk)[0].backward()

  shape = {"T": tokens, "D": dim, "V": vocab, "chunk": chunk}
  case = Case("head and loss", step, 6.0 * tokens * dim * vocab, shape)
  peak, loss = rows([case], "TFLOP/s", how)
  weight.grad = None
  torch.cuda.synchronize()
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  step(0)
  extra = (torch.cuda.max_memory_allocated() - before) / 2**30
  yield peak
  yield Row(**{**asdict(loss), "extra_gib": extra})


def bench_attention(how: How, batch=4, seq=4096, heads=16, qk=192, v=128) -> Iterator[Row]:
  sets = [
    [normal(batch, seq, heads, width, grad=True) for width in (qk, qk, v)] for _ in range(SETS)
  ]
  dy = normal(batch, seq, heads, v)

  def step(i: int) -> None:
    torch.autograd.grad(attention(*sets[i], qk**-0.5), sets[i], dy)

  def forward(i: int) -> None:
    attention(*sets[i], qk**-0.5)

  flops = 1.0 * batch * heads * seq * seq * (qk + v)
  shape = {"B": batch, "S": seq, "H": heads, "QK": qk, "V": v}
  cases = [
    Case("attention forward", forward, flops, shape),
    Case("attention forward + backward", step, 3.5 * flops, shape),
  ]
  yield from rows(cases, "TFLOP/s", how)


def bench_norm(how: How, tokens=32768, dim=2048) -> Iterator[Row]:
  x, residual, dy = ([normal(tokens, dim, grad=True) for _ in range(SETS)] for _ in range(3))
  weight = normal(dim, dtype=torch.float32, grad=True)

  def plain(i: int) -> None:
    torch.autograd.grad(rms_norm(x[i], weight, 1e-6), [x[i], weight], dy[i])

  def added(i: int) -> None:
    y, total = add_rms_norm(x[i], residual[i], weight, 1e-6)
    torch.autograd.grad([y, total], [x[i], residual[i], weight], [dy[i], dy[i]])

  size, shape = 2.0 * tokens * dim, {"T": tokens, "D": dim}
  cases = [
    Case("rms_norm forward + backward", plain, 5 * size, shape),
    Case("add_rms_norm forward + backward", added, 8 * size, shape),
  ]
  yield from rows(cases, "GB/s", how)


def bench_rope(how: How, batch=8, seq=4096, heads=16, nope=128, rope=64, v=128) -> Iterator[Row]:
  widths = ((heads, nope + rope), (heads, nope + v), (rope,))
  sets = [[normal(batch, seq, *w, grad=True) for w in widths] for _ in range(SETS)]
  angle = torch.rand(seq, rope // 2, device="cuda")
  cos, sin = angle.cos(), angle.sin()
  dys = [normal(batch, seq, heads, w) for w in (nope + rope, nope + rope, v)]

  def step(i: int) -> None:
    torch.autograd.grad(mla_qkv(*sets[i], cos, sin, rope), sets[i], dys)

  per_token = heads * (2 * nope + rope + v) + rope + heads * (2 * (nope + rope) + v)
  shape = {"B": batch, "S": seq, "H": heads, "nope": nope, "rope": rope, "V": v}
  size = 2.0 * 2 * batch * seq * per_token
  yield from rows([Case("mla_qkv forward + backward", step, size, shape)], "GB/s", how)


BENCHES: dict[str, Callable[[How], Iterator[Row]]] = {
  "mlp": bench_mlp,
  "loss": bench_loss,
  "attention": bench_attention,
  "norm": bench_norm,
  "rope": bench_rope,
}
