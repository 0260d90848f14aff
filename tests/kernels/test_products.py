"""The fp8 and nvfp4 recipes: what is quantized, along which dimension, and what is not."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kernels.formats import derive
from kernels.ops import KernelError, Recipe, RouterSpec
from kernels.reference import combine, experts, grouped_mlp, layout, linear, mlp, quantize, route
from kernels.reference.products import block_scaled_product

FP8, NVFP4 = Recipe("fp8", emulate=True), Recipe("nvfp4", emulate=True, seed=11, draw=5)
OFFSETS = [0, 5, 5, 69, 102]  # rows in part of a block, none, whole blocks, and one more
I, O = 96, 64


def inputs(dtype=torch.float64):
  generator = torch.Generator().manual_seed(9)
  shapes = [(OFFSETS[-1], I), (4, O, I), (OFFSETS[-1], O)]
  x, w, dy = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
  return x.requires_grad_(), w.requires_grad_(), dy


def run(recipe, dtype=torch.float64):
  """(y, dx, dw) of a product."""
  x, w, dy = inputs(dtype)
  y = block_scaled_product(x, w, OFFSETS, recipe, 3)
  return y.detach(), *torch.autograd.grad(y, (x, w), dy)


def exact(x, format, **arguments):
  q = quantize(x.detach(), format, **arguments)
  return q.values(torch.float64) * (1.0 if q.tensor_scale is None else q.tensor_scale.double())


def by_expert(function):
  return [function(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(OFFSETS))]


def close(got, expected):
  torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_fp8_quantizes_along_each_product_s_sum():
  x, w, dy = inputs()
  y, dx, dw = run(FP8)
  xq, wq = exact(x, "fp8"), exact(w, "fp8")
  close(y, torch.cat(by_expert(lambda e, rows: xq[rows] @ wq[e].T)))
  dyq, wq = exact(dy, "fp8"), exact(w, "fp8", axis=-2)
  close(dx, torch.cat(by_expert(lambda e, rows: dyq[rows] @ wq[e])))

  def weight_gradient(e, rows):
    return exact(dy[rows], "fp8", axis=-2).T @ exact(x[rows], "fp8", axis=-2)

  close(dw, torch.stack(by_expert(weight_gradient)))


def padded(x):
  """Each expert's rows with zeros up to a multiple of 16."""
  pad = torch.nn.functional.pad
  return by_expert(lambda e, rows: pad(x[rows], (0, 0, 0, -(rows.stop - rows.start) % 16)))


def test_nvfp4_squares_weights_rounds_gradients_stochastically_and_rotates_for_wgrad():
  x, w, dy = inputs()
  y, dx, dw = run(NVFP4)
  xq, wq = exact(x, "nvfp4"), exact(w, "nvfp4", square=True)
  close(y, torch.cat(by_expert(lambda e, rows: xq[rows] @ wq[e].T)))
  dyq = exact(dy, "nvfp4", seed=derive(11, 5, 3, 0))
  close(dx, torch.cat(by_expert(lambda e, rows: dyq[rows] @ wq[e])))
  xs, dys = padded(x.detach()), padded(dy)
  sizes = [len(part) for part in xs]
  seed = derive(11, 5, 3, 1)
  xq = exact(torch.cat(xs), "nvfp4", axis=-2, hadamard=11).split(sizes)
  dyq = exact(torch.cat(dys), "nvfp4", axis=-2, hadamard=11, seed=seed).split(sizes)
  close(dw, torch.stack([b.T @ a for a, b in zip(xq, dyq, strict=True)]))


def test_the_mean_of_stochastic_gradients_approaches_the_gradient_of_the_quantized_weight():
  """Gradients are noise around dy · w', but for the few elements that saturate."""
  _, w, dy = inputs()
  wq = exact(w, "nvfp4", square=True)
  target = torch.cat(by_expert(lambda e, rows: dy[rows] @ wq[e]))
  draws = [run(replace(NVFP4, draw=d))[1] for d in range(32)]
  one = (draws[0] - target).norm()
  assert (torch.stack(draws).mean(0) - target).norm() < 0.4 * one
  assert not torch.equal(draws[0], draws[1])
  assert torch.equal(draws[3], run(replace(NVFP4, draw=3))[1])


def test_the_forward_product_does_not_depend_on_the_draw_nor_the_seed():
  assert torch.equal(run(NVFP4)[0], run(replace(NVFP4, draw=1, seed=2))[0])


@pytest.mark.parametrize("recipe,error", [(FP8, 0.05), (NVFP4, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_errors_are_of_the_format_s_size(recipe, error, dtype):
  x, w, dy = inputs(dtype)
  x64, w64 = (t.detach().double() for t in (x, w))
  expected = (
    torch.cat(by_expert(lambda e, rows: x64[rows] @ w64[e].T)),
    torch.cat(by_expert(lambda e, rows: dy[rows].double() @ w64[e])),
    torch.stack(by_expert(lambda e, rows: dy[rows].double().T @ x64[rows])),
  )
  for got, want in zip(run(recipe, dtype), expected, strict=True):
    assert got.dtype == dtype
    assert error / 5 < (got.double() - want).norm() / want.norm() < error


@pytest.mark.parametrize("recipe", [FP8, NVFP4])
def test_forward_only_bf16_keeps_the_product_and_quantizes_gradients(recipe):
  x, w, _ = inputs()
  y, dx, dw = run(replace(recipe, forward_only_bf16=True))
  close(y, torch.cat(by_expert(lambda e, rows: x[rows] @ w[e].T)).detach())
  _, dx_quantized, dw_quantized = run(recipe)
  assert torch.equal(dx, dx_quantized) and torch.equal(dw, dw_quantized)


@pytest.mark.parametrize("recipe", [FP8, NVFP4])
def test_linear_and_mlp_are_one_expert(recipe):
  x, w, _ = inputs(torch.float32)
  rows = x[:100].detach()
  expected = block_scaled_product(rows, w[:1], [0, 100], recipe, 0)
  assert torch.equal(linear(rows.view(4, 25, I), w[0], recipe).flatten(0, 1), expected)
  w13, w2 = torch.randn(128, I), torch.randn(I, 64)
  offsets = torch.tensor([0, 100], dtype=torch.int32)
  grouped = grouped_mlp(rows, offsets, w13[None], w2[None], recipe)
  assert torch.equal(mlp(rows.view(4, 25, I), w13, w2, recipe).flatten(0, 1), grouped)


@pytest.mark.parametrize("recipe", [FP8, NVFP4])
def test_experts_equal_their_parts_bit_for_bit(recipe):
  x = torch.randn(50, I, requires_grad=True)
  routing = route(x.detach(), torch.randn(6, I), torch.zeros(6), RouterSpec(2))
  gate = routing.gate_TK.detach().requires_grad_()
  order = layout(routing.expert_TK, 6)
  w13 = torch.randn(6, 64, I, requires_grad=True)
  w2 = torch.randn(6, I, 32, requires_grad=True)
  whole = experts(x, gate, order, w13, w2, recipe)
  y = grouped_mlp(x[order.source_N // 2], order.offset_E1, w13, w2, recipe)
  parts = combine(y[order.row_TK], gate)
  assert torch.equal(whole, parts)
  dout = torch.randn_like(whole)
  got = torch.autograd.grad(whole, (gate, w13, w2), dout, retain_graph=True)
  want = torch.autograd.grad(parts, (gate, w13, w2), dout, retain_graph=True)
  assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
  dx = [torch.autograd.grad(out, x, dout)[0] for out in (whole, parts)]
  torch.testing.assert_close(dx[0], dx[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [FP8, NVFP4])
def test_gradients_of_a_leaf_of_fp32_grad_dtype_are_rounded_and_summed_in_fp32(recipe):
  x, w, dy = inputs(torch.bfloat16)
  (rounded,) = torch.autograd.grad(block_scaled_product(x, w, OFFSETS, recipe, 3), w, dy)
  w.grad_dtype = torch.float32
  for _ in range(2):
    block_scaled_product(x, w, OFFSETS, recipe, 3).backward(dy)
  assert rounded.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
  assert torch.equal(w.grad, 2 * rounded.float())


@pytest.mark.parametrize("recipe", [FP8, NVFP4])
def test_no_rows(recipe):
  x = torch.zeros(0, I, requires_grad=True)
  w = torch.randn(2, O, I, requires_grad=True)
  y = block_scaled_product(x, w, [0, 0, 0], recipe, 0)
  dx, dw = torch.autograd.grad(y.sum(), (x, w))
  assert y.shape == (0, O) and dx.shape == (0, I) and not dw.any()


def test_a_non_finite_gradient_is_seen_in_both_gradients():
  x, w, dy = inputs(torch.float32)
  dy[7, 3] = torch.inf
  for recipe in (FP8, NVFP4):
    y = block_scaled_product(x, w, OFFSETS, recipe, 0)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert dx[7].isnan().all() and dw[2, 3].isnan().all()
    assert dx[:5].isfinite().all() and dw[0].isfinite().all()


@pytest.mark.parametrize("function", ["linear", "mlp", "grouped_mlp"])
def test_without_emulation_the_error_says_what_is_needed(function):
  x, weight = torch.randn(4, 32), torch.randn(64, 32)
  with pytest.raises(KernelError, match="sm_100a.*emulate_blockscale = true"):
    if function == "linear":
      linear(x, weight, Recipe("fp8"))
    elif function == "mlp":
      mlp(x, weight, torch.randn(32, 32), Recipe("nvfp4"))
    else:
      offsets = torch.tensor([0, 4], dtype=torch.int32)
      grouped_mlp(x, offsets, weight[None], torch.randn(1, 32, 32), Recipe("fp8"))


def test_an_unknown_format_is_refused():
  with pytest.raises(KernelError, match="'fp6' is unknown"):
    linear(torch.randn(4, 32), torch.randn(8, 32), Recipe("fp6", emulate=True))
