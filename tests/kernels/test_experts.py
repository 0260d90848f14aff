import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from kernels.ops import KernelError, Product, Recipe
from kernels.reference import (
  combine,
  experts,
  grouped_mlp,
  grouped_mlp_backward,
  grouped_mlp_forward,
  layout,
  linear,
  mlp,
)
from kernels.reference.products import multiply

E, K, D, FF = 5, 2, 6, 4
BF16 = Recipe()


def weights(dtype=torch.float64, num_experts=E):
  generator = torch.Generator().manual_seed(6)
  w13 = torch.randn(num_experts, 2 * FF, D, generator=generator, dtype=torch.float64)
  w2 = torch.randn(num_experts, D, FF, generator=generator, dtype=torch.float64)
  return w13.to(dtype).requires_grad_(), w2.to(dtype).requires_grad_()


def block(x, w13, w2):
  """One expert, from the definition, on separate gate and up matrices."""
  return (F.silu(x @ w13[0::2].T) * (x @ w13[1::2].T)) @ w2.T


def oracle(x, gate, expert, w13, w2):
  rows = []
  for t in range(x.shape[0]):
    outputs = [gate[t, k] * block(x[t], w13[e], w2[e]) for k, e in enumerate(expert[t].tolist())]
    rows.append(sum(outputs))
  return torch.stack(rows) if rows else x * 1.0


def routing(kind, tokens=7):
  if kind == "no tokens":
    return torch.zeros(0, K, dtype=torch.int32)
  if kind == "one gets all":
    return torch.tensor([[3, 1]] * tokens, dtype=torch.int32)
  generator = torch.Generator().manual_seed(7)
  among = 3 if kind == "some empty" else E
  picks = [torch.randperm(among, generator=generator)[:K] for _ in range(tokens)]
  return torch.stack(picks).int()


KINDS = ["spread", "some empty", "one gets all", "no tokens"]


def inputs(kind, dtype=torch.float64):
  expert = routing(kind)
  generator = torch.Generator().manual_seed(8)
  x = torch.randn(expert.shape[0], D, generator=generator, dtype=torch.float64)
  gate = torch.rand(expert.shape, generator=generator, dtype=torch.float64)
  return x.to(dtype).requires_grad_(), gate.to(dtype).requires_grad_(), expert


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_every_gradient_follow_the_definition(kind):
  x, gate, expert = inputs(kind)
  w13, w2 = weights()
  out = experts(x, gate, layout(expert, E), w13, w2, BF16)
  expected = oracle(x, gate, expert, w13, w2)
  torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
  dout = torch.randn_like(out)
  tensors = (x, gate, w13, w2)
  got = torch.autograd.grad(out, tensors, dout)
  want = torch.autograd.grad(expected, tensors, dout, allow_unused=True)
  for a, b, t in zip(got, want, tensors, strict=True):
    torch.testing.assert_close(a, torch.zeros_like(t) if b is None else b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_experts_equal_their_parts(dtype, tolerance):
  x, gate, expert = inputs("spread", dtype)
  gate = gate.detach().float().requires_grad_()
  w13, w2 = weights(dtype)
  order = layout(expert, E)
  fused = experts(x, gate, order, w13, w2, BF16)
  y = grouped_mlp(x[order.source_N // K], order.offset_E1, w13, w2, BF16)
  parts = combine(y[order.row_TK], gate)
  torch.testing.assert_close(fused, parts, rtol=tolerance, atol=tolerance)
  dout = torch.randn_like(fused)
  for a, b in zip(
    torch.autograd.grad(fused, (x, gate, w13, w2), dout),
    torch.autograd.grad(parts, (x, gate, w13, w2), dout),
    strict=True,
  ):
    assert a.dtype == b.dtype
    assert (a - b).float().norm() <= tolerance * b.float().norm()


def test_two_runs_are_bit_identical():
  def run():
    x, gate, expert = inputs("spread", torch.float32)
    w13, w2 = weights(torch.float32)
    out = experts(x, gate, layout(expert, E), w13, w2, BF16)
    return out, *torch.autograd.grad(out.square().sum(), (x, gate, w13, w2))

  assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_grouped_mlp_gradients():
  w13, w2 = weights()
  x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
  offsets = torch.tensor([0, 2, 2, 3, 3, 6], dtype=torch.int32)
  assert gradcheck(lambda x, a, b: grouped_mlp(x, offsets, a, b, BF16), (x, w13, w2))


@pytest.mark.parametrize("offsets", [[0, 2, 2, 3, 3, 6], [0, 0, 0, 0, 0, 0], [1, 1, 4, 4, 6, 6]])
@pytest.mark.parametrize(
  ("format", "dtype"), [("bf16", torch.float64), ("fp8", torch.float32), ("nvfp4", torch.float32)]
)
def test_the_halves_are_grouped_mlp_and_its_gradient(format, dtype, offsets):
  recipe, filled = Recipe(format, emulate=True), slice(offsets[0], offsets[-1])
  w13, w2 = weights(dtype)
  generator = torch.Generator().manual_seed(9)
  x = torch.randn(8, D, generator=generator, dtype=dtype).requires_grad_()
  dy = torch.randn(8, D, generator=generator, dtype=dtype)
  gate = torch.rand(8, generator=generator, dtype=dtype).requires_grad_()
  offset_E1 = torch.tensor(offsets, dtype=torch.int32)
  y = grouped_mlp(x, offset_E1, w13, w2, recipe)
  want = torch.autograd.grad(gate[:, None] * y, (x, gate, w13, w2), dy)

  @torch.no_grad()
  def rows(result):
    return (multiply(result) if isinstance(result, Product) else result)[filled]

  with torch.no_grad():
    found, kept = grouped_mlp_forward(x, offset_E1, w13, w2, recipe, True)
    dx, dgate, gradients = grouped_mlp_backward(kept, dy, gate, w13, w2)
    got = (rows(dx), dgate[filled], *gradients())
    without, _ = grouped_mlp_forward(x, offset_E1, w13, w2, recipe, False)
  assert torch.equal(rows(found), rows(without))
  torch.testing.assert_close(rows(found), y[filled], rtol=1e-6, atol=1e-6)
  for a, b in zip(got, (want[0][filled], want[1][filled], *want[2:]), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_rows_beyond_the_last_offset_are_ignored(format):
  recipe = Recipe(format, emulate=True)
  w13, w2 = weights(torch.float32)
  offsets = torch.tensor([0, 1, 1, 4, 4, 5], dtype=torch.int32)
  short = torch.randn(5, D, requires_grad=True)
  long = torch.cat([short.detach(), torch.full((3, D), torch.nan)]).requires_grad_()
  y_short = grouped_mlp(short, offsets, w13, w2, recipe)
  y_long = grouped_mlp(long, offsets, w13, w2, recipe)
  assert torch.equal(y_long[:5], y_short) and not y_long[5:].any()
  dy = torch.cat([torch.ones(5, D), torch.full((3, D), torch.nan)])
  got = torch.autograd.grad(y_long, (long, w13, w2), dy)
  want = torch.autograd.grad(y_short, (short, w13, w2), dy[:5])
  assert torch.equal(got[0][:5], want[0]) and not got[0][5:].any()
  assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
  assert not got[1][1].any() and not got[2][3].any()  # empty experts


def test_mlp_is_one_expert():
  w13, w2 = weights(num_experts=1)
  x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
  torch.testing.assert_close(mlp(x, w13[0], w2[0], BF16), block(x, w13[0], w2[0]))
  assert gradcheck(lambda x, a, b: mlp(x, a[0], b[0], BF16), (x, w13, w2))


def test_linear_is_a_product():
  x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
  weight = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
  torch.testing.assert_close(linear(x, weight, BF16), x @ weight.T)
  assert gradcheck(lambda x, w: linear(x, w, BF16), (x, weight))


def test_wrong_shapes_are_refused():
  w13, w2 = weights(torch.float32)
  offsets = torch.tensor([0, 1, 2, 3, 4, 9], dtype=torch.int32)
  with pytest.raises(KernelError, match="offsets up to 9 .* 5 rows"):
    grouped_mlp(torch.randn(5, D), offsets, w13, w2, BF16)
  with pytest.raises(KernelError, match=r"must be \[N, D\]"):
    grouped_mlp(torch.randn(5, D + 1), offsets, w13, w2, BF16)
  with pytest.raises(KernelError, match="differ in their last dimension"):
    linear(torch.randn(5, 3), torch.randn(2, 4), BF16)
  with pytest.raises(KernelError, match=r"must be \[2F, D\]"):
    mlp(torch.randn(5, D), w13[0][:-1], w2[0], BF16)
