"""Rows dispatched as MXFP8: what arrives, and that N ranks still train the model of one."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kernels.reference as ops
from kernels.buffers import MXFP8_BLOCK, BufferLayout, Buffers, Route, mxfp8_bytes
from kernels.ops import KernelError, Recipe
from kernels.reference import symmetric
from kernels.reference.blockscale import quantize
from kernels.reference.exchange import Exchange
from kernels.reference.places import places
from nmoe.config import Config, loads
from nmoe.model import Model
from nmoe.rdep import Rdep

E, K, D, F, TOKENS = 8, 2, 64, 32, 24
FIELDS = ("y_TD", "dx_TD", "dgate_TK", "dw13", "dw2")

BASE = f"""
[target]
arch = "cpu"
[model]
vocab_size = 32
dim = {D}
num_layers = 1
dense_dim = 32
num_heads = 1
[moe]
num_experts = {E}
top_k = {K}
expert_dim = {F}
[data]
mixture = "none"
seq_len = {TOKENS}
[optim]
dense_lr = 1e-3
router_lr = 1e-3
expert_lr = 1e-3
[schedule]
total_tokens = {4 * TOKENS}
batch_tokens = {4 * TOKENS}
[train]
micro_batch = 1
[rdep]
payload = "mxfp8"
deadline_s = 20
[experiment]
name = "payload"
statement = "test"
"""


class Case(NamedTuple):
  recipe: Recipe
  capacity: float


FP8 = Recipe("fp8", emulate=True)
CASES = {
  "bf16": Case(Recipe(), 4.0),
  "fp8": Case(FP8, 4.0),
  "bf16 in rounds": Case(Recipe(), 0.4),
  "fp8 in rounds": Case(FP8, 0.4),
}


def config(num_ranks: int, capacity: float = 4.0, payload: str = "mxfp8") -> Config:
  values = {"launch.ranks": num_ranks, "train.micro_batch": 4 // num_ranks}
  values |= {"rdep.capacity": capacity, "rdep.payload": payload}
  return loads(BASE, env={}).with_values(**values)


def exact(x: Tensor) -> Tensor:
  """MXFP8 by its definition (arXiv 2506.08027) in float64, where every step is exact."""
  block = x.double().unflatten(-1, (-1, MXFP8_BLOCK))
  amax = block.abs().amax(-1, keepdim=True)
  ratio, power = torch.frexp(amax / 448)  # amax / 448 = ratio · 2^power, ratio in [1/2, 1)
  power = torch.where(ratio == 0.5, power - 1, power).clamp(min=-127)
  scaled = torch.ldexp(block, -torch.where(amax == 0, -127, power).double())
  octave = torch.frexp(scaled)[1].sub(1).clamp(min=-6)  # of E4M3's normal numbers
  step = torch.ldexp(torch.ones_like(scaled), (octave - 3).double())
  rounded = (scaled / step).round() * step  # torch rounds ties to even
  return torch.ldexp(rounded, torch.where(amax == 0, -127, power).double()).flatten(-2)


def through(x: Tensor) -> Tensor:
  return quantize(x, "fp8").values(x.dtype)


def finite(seed: int, spread: int) -> Tensor:
  """bf16 [7, D] of random signs and mantissas, with magnitudes over 2 · spread octaves."""
  generator = torch.Generator().manual_seed(seed)
  x = torch.randn(7, D, generator=generator, dtype=torch.float64)
  octaves = torch.randint(-spread, spread + 1, (7, D), generator=generator)
  return torch.ldexp(x, octaves.double()).bfloat16()


@given(st.integers(0, 2**31), st.sampled_from([0, 2, 10, 60, 125]), st.integers(-133, 120))
def test_a_row_of_bf16_is_exact_in_bf16_after_mxfp8(seed: int, spread: int, octave: int) -> None:
  """From bf16's smallest subnormal to 2^127; and quantized once more it keeps its values."""
  x = torch.ldexp(finite(seed, spread).double(), torch.tensor(octave).double()).bfloat16()
  x = torch.where(x.abs() <= 2.0**127, x, 1)
  once = through(x)
  assert torch.equal(once.double(), exact(x))
  assert torch.equal(once.view(torch.int16), through(once).view(torch.int16))


def test_what_rounds_up_to_2_to_the_128_is_infinite() -> None:
  largest = torch.finfo(torch.bfloat16).max
  x = torch.tensor([[largest, 1.9296875 * 2.0**127] + [0.0] * (MXFP8_BLOCK - 2)]).bfloat16()
  assert through(x)[0, :3].tolist() == [math.inf, 1.875 * 2.0**127, 0.0]


@given(st.integers(0, 2**31), st.sampled_from([0, 2, 10]))
def test_quantized_again_only_a_block_whose_largest_became_224_has_other_codes(
  seed: int, spread: int
) -> None:
  """224 · 2^s is 448 · 2^(s - 1), which rounding the scale up prefers."""
  first = quantize(finite(seed, spread), "fp8")
  again = quantize(first.values(torch.bfloat16), "fp8")
  blocks = first.data.float().unflatten(-1, (-1, MXFP8_BLOCK))
  halved = blocks.abs().amax(-1) == 224
  scale, other = first.scale.view(torch.uint8), again.scale.view(torch.uint8)
  assert torch.equal(other, scale - halved.to(torch.uint8))
  doubled = blocks * torch.where(halved, 2.0, 1.0)[..., None]
  assert torch.equal(again.data.float(), doubled.flatten(-2))


def blocks(num_ranks: int, capacity: int, dim: int = D) -> list[Buffers]:
  sizes = BufferLayout(num_ranks, E, capacity, TOKENS * K, dim, torch.bfloat16, mxfp8=True)
  memory = (torch.zeros(sizes.nbytes + 256, dtype=torch.uint8) for _ in range(num_ranks))
  return [sizes.views(m[-m.data_ptr() % 256 :][: sizes.nbytes]) for m in memory]


def test_what_travels_is_codes_then_scales_and_an_empty_place_is_zero() -> None:
  """Also after a row with a NaN, whose scale stays in the buffer."""
  dim = 96
  (block,) = blocks(1, 2 * TOKENS, dim)
  mover = Exchange([block], 0, 1.0)
  expert_TK = torch.tensor([[3, 5], [5, 0], [5, 3]], dtype=torch.int32)
  order = ops.layout(expert_TK, E)
  count_RE = order.offset_E1.diff()[None].long()
  where = places(count_RE, 4)
  route = Route(expert_TK, order, count_RE, where.base_RE)
  x_TD = torch.randn(3, dim).bfloat16()
  x_TD[0, 40], x_TD[2, 5] = torch.nan, torch.inf
  q = quantize(x_TD, "fp8")
  end = int(where.end_R[0])
  mover.send(1, x_TD, None, route, 0)
  travelled = block.row_CD.clone()
  row_CD, _, origin_C = mover.receive(end)
  assert row_CD.dtype == torch.bfloat16 and (origin_C < 0).sum() == end - 6
  for row, bytes_, origin in zip(row_CD, travelled, origin_C.tolist(), strict=False):
    if origin < 0:
      assert not row.any()
      continue
    assert torch.equal(bytes_[:dim], q.data[origin // K].view(torch.uint8))
    assert torch.equal(bytes_[dim : dim + 3], q.scale[origin // K].view(torch.uint8))
    want = q.values(torch.bfloat16)[origin // K]
    assert torch.equal(row.view(torch.int16), want.view(torch.int16))
    assert bool(row[:32].isnan().all()) == (origin // K == 2)  # the infinity's block
  fewer = Route(expert_TK[:0], ops.layout(expert_TK[:0], E), 0 * count_RE, where.base_RE)
  mover.send(2, x_TD[:0], None, fewer, 0)
  assert not mover.receive(end)[0].any()


@pytest.mark.parametrize(("dim", "size"), [(32, 48), (64, 80), (2048, 2112), (7168, 7392)])
def test_bytes_of_a_row(dim: int, size: int) -> None:
  """33 bytes per 32 elements, in whole vectors; nothing else of the block differs."""
  assert mxfp8_bytes(dim) == size
  plain = BufferLayout(4, E, 100, 50, dim, torch.bfloat16)
  packed = BufferLayout(4, E, 100, 50, dim, torch.bfloat16, mxfp8=True)
  assert plain.sizes["row_CD"] == 100 * 2 * dim and packed.sizes["row_CD"] == 100 * size
  others = [{k: v for k, v in part.fields.items() if k != "row_CD"} for part in (plain, packed)]
  assert others[0] == others[1]
  with pytest.raises(KernelError, match="no whole blocks of 32"):
    mxfp8_bytes(dim + 16)


def data(seed: int) -> list[Tensor]:
  """x, expert, gate, dy of all tokens, w13, w2; tokens and magnitudes are uneven."""
  generator = torch.Generator().manual_seed(seed)

  def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)

  tokens = 4 * TOKENS - 7
  expert_TK = torch.randint(0, E, (tokens, K), generator=generator).int()
  expert_TK[torch.rand(tokens, K, generator=generator) < 0.3] = 3
  gate_TK = torch.rand(tokens, K, generator=generator)
  x, dy = (finite_rows(normal(tokens, D), generator) for _ in range(2))
  w13, w2 = (normal(E, 2 * F, D) / 8).bfloat16(), (normal(E, D, F) / 6).bfloat16()
  return [x, expert_TK, gate_TK, dy, w13, w2]


def finite_rows(x: Tensor, generator: torch.Generator) -> Tensor:
  """bf16 rows whose blocks lie octaves apart."""
  return (x * 2.0 ** torch.randint(-4, 3, (len(x), 1), generator=generator)).bfloat16()


def step(rdep: Rdep, seed: int, recipe: Recipe, layer: int) -> list[np.ndarray]:
  """FIELDS of one rank."""
  x, expert, gate, dy, w13, w2 = data(seed)
  each = -(-len(x) // rdep.num_ranks)
  rows = slice(rdep.rank * each, (rdep.rank + 1) * each)
  held = slice(rdep.first, rdep.first + rdep.num_local)
  leaves = [t.clone().requires_grad_() for t in (x[rows], gate[rows], w13[held], w2[held])]
  y = rdep.experts(leaves[0], expert[rows], *leaves[1:], recipe, layer=layer)
  y.backward(dy[rows])
  return [t.detach().float().numpy() for t in (y, *(leaf.grad for leaf in leaves))]


def run_cases(group) -> dict[str, tuple[list, int]]:
  """Of each case four steps (the last two repeat the first two), and the most rounds."""
  found = {}
  for name, (recipe, capacity) in CASES.items():
    rdep = Rdep(config(group.size(), capacity), ops, group, symmetric)
    steps = [step(rdep, i % 2, recipe, i) for i in range(4)]
    found[name] = steps, max(rdep.rounds.values())
  return found


@cache
def results(num_ranks: int) -> dict[str, tuple[list[list[np.ndarray]], int]]:
  found = ranks.run(run_cases, num_ranks)
  return {
    name: (
      [
        [np.concatenate(p) for p in zip(*parts, strict=True)]
        for parts in zip(*(f[name][0] for f in found), strict=True)
      ],
      found[0][name][1],
    )
    for name in CASES
  }


def deviation(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_the_model_of_one(num_ranks: int, name: str) -> None:
  """Rounds sum weight gradients of bf16, and in fp8 of other blocks along tokens."""
  steps, rounds = results(num_ranks)[name]
  assert (rounds > 1) == ("rounds" in name)
  for found, single in zip(steps, results(1)[name][0], strict=True):
    for field, a, b in zip(FIELDS, found, single, strict=True):
      summed = rounds > 1 and field.startswith("dw")
      assert deviation(a, b) < (2.0**-6 if summed else 1e-6), field


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_repeats_its_bits(num_ranks: int) -> None:
  for steps, _ in results(num_ranks).values():
    for first, again in zip(steps[:2], steps[2:], strict=True):
      assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


def definition(seed: int, sent) -> list[np.ndarray]:
  """FIELDS in float64, token by token, with x and dy as `sent` leaves them."""
  x, expert, gate, dy, w13, w2 = data(seed)
  x, dy = sent(x).double().requires_grad_(), sent(dy).double()
  gate, w13, w2 = (t.double().requires_grad_() for t in (gate, w13, w2))
  y = 0.0
  for k in range(K):
    chosen = expert[:, k].long()
    h = torch.einsum("tfd,td->tf", w13[chosen], x)
    a = torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2]
    y = y + gate[:, k, None] * torch.einsum("tdf,tf->td", w2[chosen], a)
  y.backward(dy)
  return [y.detach().numpy(), *(t.grad.numpy() for t in (x, gate, w13, w2))]


def error(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_it_is_x_and_dy_that_are_quantized_and_nothing_else() -> None:
  """Beyond bf16's own roundings the results are those of the definition with quantized rows."""
  ours = results(1)["bf16"][0][0]
  plain, quantized = definition(0, lambda t: t), definition(0, exact)
  for field, a, near, far in zip(FIELDS, ours, quantized, plain, strict=True):
    assert error(a, near) < 2.0**-8 * math.sqrt(3), field
    assert error(a, far) > 4 * error(a, near), field
  alone = Rdep(config(1, payload="bf16"), ops)
  for field, a, near in zip(FIELDS, step(alone, 0, Recipe(), 0), plain, strict=True):
    assert error(a, near) < 2.0**-8 * math.sqrt(3), field


def test_a_model_of_one_rank_quantizes_too() -> None:
  x, expert, gate, dy, w13, w2 = data(0)
  model = Model(config(1).with_values(**{"model.num_dense_layers": 0}), ops)
  experts = model.layers[0].moe.experts
  with torch.no_grad():
    experts.w13.copy_(w13)
    experts.w2.copy_(w2)
  leaf, sent = x.clone().requires_grad_(), through(x).requires_grad_()
  y = experts(leaf, expert, gate, lambda t: 2 * t)
  want = ops.experts(sent, gate, ops.layout(expert, E), w13, w2, Recipe())
  assert torch.equal(y, want + 2 * x)
  y.backward(dy)
  want.backward(through(dy))
  assert torch.equal(leaf.grad, sent.grad + 2 * dy)
