from itertools import pairwise

import pytest
import torch

from gpu.oracle import FOUR, FP32, assert_repeats, compare, fp32_grads, grads, normal, relative
from kernels import reference
from kernels.cuda import gemms
from kernels.cuda.experts import experts, grouped_mlp
from kernels.ops import KernelError, Layout, Recipe

pytestmark = pytest.mark.gpu
BF16 = Recipe()


def routing(tokens: int, num_experts: int, top_k: int, kind: str) -> torch.Tensor:
  """int32 [T, K] expert ids: uniform, skewed to expert 1, one for all, or the first half only."""
  if kind == "one":
    return torch.full((tokens, top_k), num_experts - 1, dtype=torch.int32, device="cuda")
  weight = torch.ones(num_experts)
  if kind == "skewed":
    weight[1] = 5.0
  if kind == "half":
    weight[num_experts // 2 :] = 0
  picks = torch.multinomial(weight.expand(tokens, -1), top_k)
  return picks.to("cuda", torch.int32)


def layer(tokens, dim, width, num_experts, top_k, kind):
  expert_TK = routing(tokens, num_experts, top_k, kind)
  layout = reference.layout(expert_TK, num_experts)
  gate = torch.rand(tokens, top_k, device="cuda").requires_grad_()
  x = normal(tokens, dim)
  w13 = normal(num_experts, 2 * width, dim, scale=dim**-0.5)
  w2 = normal(num_experts, dim, width, scale=width**-0.5)
  return layout, [x, gate, w13, w2], [normal(tokens, dim, grad=False)]


SHAPES = [
  (512, 256, 128, 8, 2, "uniform"),
  (1000, 320, 136, 16, 6, "skewed"),
  (77, 64, 24, 8, 3, "half"),
  (257, 128, 64, 4, 2, "one"),
  (1, 128, 64, 64, 6, "uniform"),
  (4096, 2048, 1408, 64, 6, "uniform"),
  (2048, 2048, 512, 256, 8, "skewed"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_equal_the_float64_reference(shape):
  torch.manual_seed(0)
  layout, inputs, dys = layer(*shape)

  def run(op):
    return lambda x, gate, w13, w2: op(x, gate, layout, w13, w2, BF16)

  compare(run(experts), run(reference.experts), inputs, dys, FOUR)


def test_experts_repeat_bit_for_bit():
  torch.manual_seed(1)
  layout, inputs, dys = layer(4096, 1024, 512, 32, 6, "skewed")
  assert_repeats(lambda x, g, w13, w2: experts(x, g, layout, w13, w2, BF16), inputs, dys)


@pytest.mark.parametrize("name, most", [("fp8", 0.02), ("nvfp4", 0.04)])
def test_emulated_experts_follow_the_reference(name, most):
  """An activation that rounds to the neighbour in bf16 can fall into another block-scaled code."""
  torch.manual_seed(3)
  layout, inputs, dys = layer(300, 256, 128, 8, 3, "skewed")
  recipe = Recipe(name, emulate=True, seed=7)

  def run(op):
    return grads(lambda x, g, w13, w2: op(x, g, layout, w13, w2, recipe), inputs, dys)

  errors = [relative(a, b) for a, b in zip(run(experts), run(reference.experts), strict=True)]
  assert max(errors) <= most, errors


def test_experts_run_in_a_cuda_graph():
  layout, inputs, dys = layer(512, 256, 128, 8, 2, "uniform")

  def step():
    return grads(lambda x, g, w13, w2: experts(x, g, layout, w13, w2, BF16), inputs, dys)

  eager = step()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    captured = step()
  graph.replay()
  assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


def test_experts_keep_only_x_preact_gate_and_layout():
  tokens, dim, width, top_k = 4096, 1024, 512, 4
  layout, inputs, _ = layer(tokens, dim, width, 16, top_k, "uniform")
  torch.cuda.synchronize()
  before = torch.cuda.memory_allocated()
  y = experts(*inputs[:2], layout, *inputs[2:], BF16)
  kept = torch.cuda.memory_allocated() - before - y.nbytes
  preact = tokens * top_k * 2 * width * 2
  assert kept <= preact + 4096


def grouped(layout, x, w13, w2):
  """The grouped product as RDEP calls it: on the sorted rows, some of them no expert's."""
  return grouped_mlp(x, layout.offset_E1, w13, w2, BF16)


@pytest.mark.parametrize("kind", ["uniform", "half"])
@pytest.mark.parametrize("op", ["experts", "grouped_mlp"])
def test_fp32_gradients_are_never_rounded_and_are_added_in_place(op, kind):
  torch.manual_seed(4)
  layout, (x, gate, w13, w2), dys = layer(600, 256, 136, 8, 3, kind)
  inputs = [x, gate, w13, w2]
  if op == "grouped_mlp":
    inputs, dys = [normal(1900, 256), w13, w2], [normal(1900, 256, grad=False)]

  def run(x, *rest):
    if op == "grouped_mlp":
      return grouped(layout, x, *rest)
    return experts(x, rest[0], layout, *rest[1:], BF16)

  in_bf16 = grads(run, inputs, dys)[-2:]
  once = fp32_grads(run, inputs, dys, [w13, w2])
  for rounded, dw in zip(in_bf16, once, strict=True):
    assert rounded.dtype == torch.bfloat16 and torch.equal(dw.bfloat16(), rounded)
    assert not torch.equal(dw, rounded.float())
  again = fp32_grads(run, inputs, dys, [w13, w2])
  twice = fp32_grads(run, inputs, dys, [w13, w2], calls=2)
  thrice = fp32_grads(run, inputs, dys, [w13, w2], calls=3)
  for dw, same, two, three in zip(once, again, twice, thrice, strict=True):
    assert torch.equal(same, dw) and torch.equal(two, dw + dw) and torch.equal(three, dw + dw + dw)


def test_fp32_gradients_are_those_of_the_float64_products():
  """Of the bf16 operands that backward multiplies: nothing is rounded after them."""
  torch.manual_seed(5)
  layout, inputs, (dy,) = layer(1000, 256, 136, 8, 3, "skewed")
  x, gate, w13, w2 = inputs
  dw13, dw2 = fp32_grads(
    lambda x, g, w13, w2: experts(x, g, layout, w13, w2, BF16), inputs, [dy], [w13, w2]
  )
  with torch.no_grad():
    offset, token = layout.offset_E1, layout.source_N // 3
    preact, _ = gemms.gated(x, w13, offset=offset, index=token)
    scale = gate.flatten()[layout.source_N]
    dpreact, act, _ = gemms.dgated(dy, w2, preact, offset=offset, index=token, scale=scale)
    for e, (start, end) in enumerate(pairwise(offset.tolist())):
      rows = slice(start, end)
      assert relative(dw13[e], dpreact[rows].double().T @ x[token[rows]].double()) < FP32
      assert relative(dw2[e], dy[token[rows]].double().T @ act[rows].double()) < FP32


def test_backward_adds_to_the_grad_of_a_detached_leaf_and_returns_none():
  layout, (x, gate, w13, w2), dys = layer(300, 128, 64, 4, 2, "uniform")
  x = normal(layout.source_N.shape[0], 128)
  dy = normal(*x.shape, grad=False)
  once = fp32_grads(lambda x, *w: grouped(layout, x, *w), [x, w13, w2], [dy], [w13, w2])
  leaves = [weight.detach().requires_grad_() for weight in (w13, w2)]
  for leaf in leaves:
    leaf.grad_dtype = torch.float32
  made = torch.autograd.grad(grouped(layout, x, *leaves), leaves, dy)
  assert all(torch.equal(a, b) for a, b in zip(made, once, strict=True))
  for leaf, dw in zip(leaves, made, strict=True):
    leaf.grad = dw.clone()
  found = torch.autograd.grad(grouped(layout, x, *leaves), leaves, dy, allow_unused=True)
  assert found == (None, None)
  assert all(torch.equal(leaf.grad, dw + dw) for leaf, dw in zip(leaves, once, strict=True))


def test_empty_experts_get_zero_gradients():
  layout, inputs, dys = layer(64, 128, 64, 8, 2, "half")
  _, _, _, dw13, dw2 = grads(
    lambda x, g, w13, w2: experts(x, g, layout, w13, w2, BF16), inputs, dys
  )
  assert not dw13[4:].any() and not dw2[4:].any()
  assert dw13[:4].any() and dw2[:4].any()


def test_no_tokens_return_no_rows():
  expert_TK = torch.zeros(0, 2, dtype=torch.int32, device="cuda")
  layout = Layout(torch.zeros(5, dtype=torch.int32, device="cuda"), expert_TK, expert_TK.flatten())
  x, gate = normal(0, 64), torch.zeros(0, 2, device="cuda", requires_grad=True)
  w13, w2 = normal(4, 64, 64), normal(4, 64, 32)
  y = experts(x, gate, layout, w13, w2, BF16)
  assert y.shape == (0, 64)
  y.sum().backward()
  assert grouped_mlp(x, layout.offset_E1, w13, w2, BF16).shape == (0, 64)


@pytest.mark.parametrize("counts", [[3, 0, 130, 17], [0, 0, 0, 0], [256, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dim, width", [(128, 64), (320, 200)])
def test_grouped_mlp_ignores_rows_beyond_the_last_offset(counts, dim, width):
  torch.manual_seed(2)
  rows, filled = 300, sum(counts)
  offset = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32).cuda()
  x, w13, w2 = normal(rows, dim), normal(4, 2 * width, dim, scale=dim**-0.5), normal(4, dim, width)
  dy = normal(rows, dim, grad=False)
  with torch.no_grad():
    x[filled:] = float("nan")
    dy[filled:] = float("nan")

  def run(op, clean):
    return lambda x, w13, w2: op(clean(x), offset, w13, w2, BF16)

  y, dx, dw13, dw2 = grads(run(grouped_mlp, lambda x: x), [x, w13, w2], [dy])
  assert not y[filled:].any() and not dx[filled:].any()
  x2, dy2 = x.detach().nan_to_num(0).requires_grad_(), dy.nan_to_num(0)
  if filled:
    compare(
      run(grouped_mlp, lambda x: x),
      run(reference.grouped_mlp, lambda x: x),
      [x2, w13, w2],
      [dy2],
      FOUR,
    )
  assert dw13.isfinite().all() and dw2.isfinite().all()


def test_errors_name_what_is_wrong():
  layout, (x, gate, w13, w2), _ = layer(16, 128, 64, 4, 2, "uniform")
  with pytest.raises(KernelError, match="float32"):
    experts(x.float(), gate, layout, w13, w2, BF16)
  with pytest.raises(KernelError, match="multiple of 8"):
    experts(x[:, :100].contiguous(), gate, layout, w13[:, :, :100], w2[:, :100], BF16)
  with pytest.raises(KernelError, match="cpu"):
    experts(x.cpu(), gate, layout, w13, w2, BF16)
  with pytest.raises(KernelError, match="bfloat16"):
    experts(x, gate.bfloat16(), layout, w13, w2, BF16)
