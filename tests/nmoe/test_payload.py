"""Rows dispatched packed: what arrives, and that N ranks still train the model of one.

One file: what a row becomes alone is the oracle of what it becomes on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from kernels.buffers import Buffers, Route, views
from kernels.formats import (
  E2M1,
  E4M3,
  BlockScaled,
  block_amax,
  decode,
  quantize_rows,
  unpack,
)
from kernels.ops import KernelError, Recipe
from kernels.places import places
from kernels.reference import symmetric
from kernels.reference.blockscale import quantize
from kernels.reference.exchange import Exchange
from kernels.sizes import BLOCK, PAYLOADS, BufferLayout, row_bytes
from nmoe.config.file import changed, loads
from nmoe.config.sections import Config
from nmoe.distributed.rdep import Rdep
from nmoe.model.decoder import Model

E, K, D, F, TOKENS = 8, 2, 64, 32, 24
FIELDS = ("y_TD", "dx_TD", "dgate_TK", "dw13", "dw2")
PACKED = ("mxfp8", "nvfp4")  # the payloads that are not rows as they are
MXFP8_BLOCK, NVFP4_BLOCK = BLOCK["fp8"], BLOCK["nvfp4"]

BASE = f"""
[target]
arch = "cpu"
[model]
vocab_size = 32
dim = {D}
num_layers = 3
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
deadline_s = 20
[experiment]
name = "payload"
statement = "test"
"""


class Case(NamedTuple):
  payload: str
  recipe: Recipe
  capacity: float


RECIPES = {"bf16": Recipe(), "fp8": Recipe("fp8", emulate=True)}
CASES = {
  f"{payload} rows, {name}{how}": Case(payload, recipe, capacity)
  for payload in PACKED
  for name, recipe in RECIPES.items()
  for how, capacity in (("", 4.0), (" in rounds", 0.4))
}


def config(num_ranks: int, payload: str, capacity: float = 4.0) -> Config:
  values = {"launch.ranks": num_ranks, "train.micro_batch": 4 // num_ranks}
  values |= {"rdep.capacity": capacity, "rdep.payload": payload}
  return changed(loads(BASE, env={}), values)


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


def through(x: Tensor, format: str) -> Tensor:
  return quantize_rows(x, format, quantize).dequantize(x.dtype)


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
  once = through(x, "fp8")
  assert torch.equal(once.double(), exact(x))
  assert torch.equal(once.view(torch.int16), through(once, "fp8").view(torch.int16))


def test_what_mxfp8_rounds_up_to_2_to_the_128_is_infinite() -> None:
  largest = torch.finfo(torch.bfloat16).max
  x = torch.tensor([[largest, 1.9296875 * 2.0**127] + [0.0] * (MXFP8_BLOCK - 2)]).bfloat16()
  assert through(x, "fp8")[0, :3].tolist() == [math.inf, 1.875 * 2.0**127, 0.0]


@given(st.integers(0, 2**31), st.sampled_from([0, 2, 10]))
def test_in_mxfp8_again_only_a_block_whose_largest_became_224_has_other_codes(
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


def row_power(row: Tensor) -> int:
  """The least k with 2688 · 2^k no less than the row's largest magnitude, from -123 on."""
  ratio, power = math.frexp(float(row.abs().max()) / 2688)
  return max(power - (ratio == 0.5), -123)


def value(q: BlockScaled) -> Tensor:
  """The numbers that NVFP4 rows stand for in float64, where every product is exact."""
  step = decode(q.scale.view(torch.uint8), E4M3).double().repeat_interleave(NVFP4_BLOCK, -1)
  return decode(unpack(q.data, -1), E2M1).double() * step * q.tensor_scale.double()


@given(st.integers(0, 2**31), st.sampled_from([0, 2, 10, 30]), st.integers(-60, 60))
def test_an_nvfp4_row_is_a_tensor_of_its_own(seed: int, spread: int, octave: int) -> None:
  """One whose largest magnitude is taken for 2688 times a power of two; other rows don't matter."""
  x = torch.ldexp(finite(seed, spread).double(), torch.tensor(octave).double()).bfloat16()
  whole = quantize_rows(x, "nvfp4", quantize)
  for i, row in enumerate(x.split(1)):
    scale = 2.0 ** row_power(row)
    alone = quantize(row, "nvfp4", tensor_amax=torch.tensor(2688 * scale))
    assert whole.tensor_scale[i] == alone.tensor_scale == scale
    assert torch.equal(whole.data[i : i + 1], alone.data)
    assert torch.equal(whole.scale[i : i + 1].view(torch.uint8), alone.scale.view(torch.uint8))
    assert torch.equal(through(x, "nvfp4")[i : i + 1], through(row, "nvfp4"))


@given(st.integers(0, 2**31), st.sampled_from([0, 2, 10, 60, 125]), st.integers(-133, 120))
def test_an_nvfp4_row_is_exact_in_bf16_and_near(seed: int, spread: int, octave: int) -> None:
  """An element is off by 17/96 of its block's largest magnitude at most: half of E2M1's last gap
  with a scale that E4M3 rounded up by 1/16; and by 6 of E4M3's half units where it has no more.
  """
  x = torch.ldexp(finite(seed, spread).double(), torch.tensor(octave).double()).bfloat16()
  x = torch.where(x.abs() <= 2.0**127, x, 1)
  q = quantize_rows(x, "nvfp4", quantize)
  assert torch.equal(q.tensor_scale.flatten().log2().int(), torch.tensor([*map(row_power, x)]))
  wide = quantize_rows(
    x.float(), "nvfp4", quantize
  )  # bf16 was wide enough for x over the row's scale
  assert torch.equal(q.data, wide.data)
  assert torch.equal(q.scale.view(torch.uint8), wide.scale.view(torch.uint8))
  assert torch.equal(q.dequantize(torch.bfloat16).double(), value(q))
  amax = block_amax(x.double(), (1, NVFP4_BLOCK)).repeat_interleave(NVFP4_BLOCK, -1)
  bound = amax * 17 / 96 + q.tensor_scale.double() * 6 * 2.0**-10
  assert ((value(q) - x.double()).abs() <= bound).all()


@given(st.integers(0, 2**31), st.sampled_from([0, 2, 10, 60]), st.integers(-60, 60))
def test_in_nvfp4_again_a_block_keeps_its_values_if_its_scale_has_two_bits(
  seed: int, spread: int, octave: int
) -> None:
  """From 4 units of E4M3 on a block's largest becomes ±6. Below it may become 3 or 4, of which the
  next scale is a smaller one.
  """
  x = torch.ldexp(finite(seed, spread).double(), torch.tensor(octave).double()).bfloat16()
  q = quantize_rows(x, "nvfp4", quantize)
  scale = q.scale.view(torch.uint8)
  keeps = ((scale == 0) | (scale >= 4)).repeat_interleave(NVFP4_BLOCK, -1)
  once = q.dequantize(torch.bfloat16)
  assert torch.equal(through(once, "nvfp4")[keeps], once[keeps])


def test_nvfp4_in_small_units_is_not_kept_by_a_second_quantization() -> None:
  x = torch.zeros(1, 2 * NVFP4_BLOCK).bfloat16()
  x[0, 0], x[0, NVFP4_BLOCK] = 2688, 2.0**-9 * 9  # 2 units of 2^-9 hold 4.5 as 4
  once = through(x, "nvfp4")
  assert once[0, NVFP4_BLOCK] == 2.0**-9 * 8
  assert through(once, "nvfp4")[0, NVFP4_BLOCK] == 2.0**-9 * 6


def test_nvfp4_rows_at_the_ends() -> None:
  """Zeros keep their signs; what is not finite spoils its block; no more is lost than must be."""
  rows = torch.zeros(7, 2 * NVFP4_BLOCK).bfloat16()
  rows[0, 1] = -0.0
  rows[1, 3], rows[1, NVFP4_BLOCK] = torch.nan, 3.0
  rows[2, 3], rows[2, NVFP4_BLOCK] = -torch.inf, 1e30
  rows[3, :2] = torch.tensor([1.96875 * 2.0**127, -(2.0**127)])
  rows[4, :2] = torch.tensor([1.9765625 * 2.0**127, 1.0])
  rows[5, :3] = torch.tensor([2.0**-133, 6 * 2.0**-133, -7 * 2.0**-133])
  rows[6] = 2.0**-133
  q = quantize_rows(rows, "nvfp4", quantize)
  assert q.tensor_scale.flatten().tolist() == [2.0**k for k in (-123, 0, 0, 117, 117, -123, -123)]
  got = q.dequantize(torch.bfloat16)
  assert torch.equal(got[0].view(torch.int16), rows[0].view(torch.int16))
  for row in (1, 2):
    assert got[row].isnan().tolist() == [True] * NVFP4_BLOCK + [False] * NVFP4_BLOCK
  assert got[1:3, NVFP4_BLOCK].tolist() == [3.0, 2688.0]  # saturated under a scale of 1
  assert got[3, :3].tolist() == [1.875 * 2.0**127, -0.9375 * 2.0**127, 0.0]
  assert got[4, :2].tolist() == [math.inf, 0.0]
  assert got[5, :4].tolist() == [2.0**-133, 6 * 2.0**-133, -8 * 2.0**-133, 0.0]
  assert not got[6].any()  # less than half of what its scale can say


def blocks(num_ranks: int, capacity: int, payload: str, dim: int = D) -> list[Buffers]:
  sizes = BufferLayout(num_ranks, E, capacity, TOKENS * K, dim, "bf16", payload)
  memory = (torch.zeros(sizes.nbytes + 256, dtype=torch.uint8) for _ in range(num_ranks))
  return [views(sizes, m[-m.data_ptr() % 256 :][: sizes.nbytes]) for m in memory]


def row_as_bytes(q: BlockScaled, row: int) -> list[int]:
  """Of a row by kernels.buffers' definition."""
  own = [] if q.tensor_scale is None else q.tensor_scale[row].numpy().tobytes()
  parts = (part[row].view(torch.uint8).tolist() for part in (q.data, q.scale))
  return [*next(parts), *own, *next(parts)]


@pytest.mark.parametrize("payload", PACKED)
def test_what_travels_is_codes_then_scales_and_an_empty_place_is_zero(payload: str) -> None:
  """x, then dy, after rows with a NaN, whose scales stay in the buffer."""
  dim = 96
  (block,) = blocks(1, 2 * TOKENS, payload, dim)
  mover = Exchange([block], 0, 1.0)
  expert_TK = torch.tensor([[3, 5], [5, 0], [5, 3]], dtype=torch.int32)
  order = ops.layout(expert_TK, E)
  count_RE = order.offset_E1.diff()[None].long()
  where = places(count_RE, 4)
  route = Route(expert_TK, order, count_RE, where.base_RE)
  x_TD = torch.randn(3, dim).bfloat16()
  x_TD[0, 40], x_TD[2, 5] = torch.nan, torch.inf
  end = int(where.end_R[0])
  fewer = Route(expert_TK[:0], ops.layout(expert_TK[:0], E), 0 * count_RE, where.base_RE)
  for format in PAYLOADS[payload]:
    q = quantize_rows(x_TD, format, quantize)
    mover.send(1, x_TD, None, route, 0, format)
    travelled = block.row_CD.clone()
    row_CD, _, origin_C = mover.receive(end, format)
    assert row_CD.dtype == torch.bfloat16 and (origin_C < 0).sum() == end - 6
    for row, bytes_, origin in zip(row_CD, travelled.tolist(), origin_C.tolist(), strict=False):
      if origin < 0:
        assert not row.any()
        continue
      expected = row_as_bytes(q, origin // K)
      assert bytes_[: len(expected)] == expected
      want = q.dequantize(torch.bfloat16)[origin // K]
      assert torch.equal(row.view(torch.int16), want.view(torch.int16))
      assert bool(row[: BLOCK[format]].isnan().all()) == (origin // K == 2)  # the infinity's block
    mover.send(2, x_TD[:0], None, fewer, 0, format)
    assert not mover.receive(end, format)[0].any()


SIZES = {  # of a row of D elements, in whole vectors: 33/32 and 9/16 · D + 4 bytes
  "fp8": [(32, 48), (64, 80), (2048, 2112), (7168, 7392)],
  "nvfp4": [(32, 32), (64, 48), (2048, 1168), (7168, 4048)],
}


@pytest.mark.parametrize("format", SIZES)
def test_bytes_of_a_row(format: str) -> None:
  for dim, size in SIZES[format]:
    assert row_bytes(dim, format) == size
    with pytest.raises(
      KernelError, match=f"rows of {dim + 16} elements .* blocks of 32; send them"
    ):
      row_bytes(dim + 16, format)


@pytest.mark.parametrize("payload", PACKED)
def test_the_buffer_holds_the_longer_row_and_nothing_else_differs(payload: str) -> None:
  plain = BufferLayout(4, E, 100, 50, 64, "bf16")
  packed = BufferLayout(4, E, 100, 50, 64, "bf16", payload)
  assert plain.sizes["row_CD"] == 100 * 2 * 64 and packed.sizes["row_CD"] == 100 * 80
  others = [{k: v for k, v in part.fields.items() if k != "row_CD"} for part in (plain, packed)]
  assert others[0] == others[1]


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
  for name, (payload, recipe, capacity) in CASES.items():
    rdep = Rdep(config(group.size(), payload, capacity), ops, group, symmetric)
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


def definition(seed: int, sent: Callable = Tensor.double, back: Callable = Tensor.double):
  """FIELDS in float64, token by token, with x as `sent` leaves it and dy as `back` does."""
  x, expert, gate, dy, w13, w2 = data(seed)
  x, dy = sent(x).double().requires_grad_(), back(dy).double()
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


@pytest.mark.parametrize("payload", PACKED)
def test_it_is_x_and_dy_that_are_quantized_and_nothing_else(payload: str) -> None:
  """Beyond bf16's own roundings the results are those of the definition with quantized rows."""
  ours = results(1)[f"{payload} rows, bf16"][0][0]
  sent = exact if payload == "mxfp8" else lambda x: value(quantize_rows(x, "nvfp4", quantize))
  for field, a, near, far in zip(
    FIELDS, ours, definition(0, sent, exact), definition(0), strict=True
  ):
    assert error(a, near) < 2.0**-8 * math.sqrt(3), field
    assert error(a, far) > 4 * error(a, near), field


def test_rows_as_they_are_are_not_quantized() -> None:
  ours = step(Rdep(config(1, "bf16"), ops), 0, Recipe(), 0)
  for field, a, near in zip(FIELDS, ours, definition(0), strict=True):
    assert error(a, near) < 2.0**-8 * math.sqrt(3), field


@pytest.mark.parametrize("payload", PACKED)
def test_a_model_of_one_rank_quantizes_too(payload: str) -> None:
  x, expert, gate, dy, w13, w2 = data(0)
  model = Model(changed(config(1, payload), {"model.num_dense_layers": 0}), ops)
  experts = model.layers[0].moe.experts
  with torch.no_grad():
    experts.w13.copy_(w13)
    experts.w2.copy_(w2)
  format = PAYLOADS[payload]
  leaf, sent = x.clone().requires_grad_(), through(x, format.x).requires_grad_()
  y = experts(leaf, expert, gate, lambda t: 2 * t)
  want = ops.experts(sent, gate, ops.layout(expert, E), w13, w2, Recipe())
  assert torch.equal(y, want + 2 * x)
  y.backward(dy)
  want.backward(through(dy, format.dy))
  assert torch.equal(leaf.grad, sent.grad + 2 * dy)
