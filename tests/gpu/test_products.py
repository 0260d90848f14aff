import pytest
import torch

from gpu.oracle import FP32, ONE, assert_repeats, compare, fp32_grads, grads, normal, relative
from kernels.cuda.dense import linear, mlp
from kernels.cuda.experts import grouped_mlp_backward, grouped_mlp_forward
from kernels.cuda.products import block_scaled_product, values
from kernels.cuda.quantization import quantize
from kernels.ops import KernelError, Recipe
from kernels.reference import products as reference

pytestmark = pytest.mark.gpu


def case(counts, rows, in_dim, out_dim):
  offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
  x, w = normal(rows, in_dim), normal(len(counts), out_dim, in_dim, scale=in_dim**-0.5)
  return (
    offsets,
    torch.tensor(offsets, dtype=torch.int32).cuda(),
    [x, w],
    [normal(rows, out_dim, grad=False)],
  )


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("counts, rows", [([100, 0, 33, 1], 134), ([40, 90], 150), ([0, 7], 7)])
def test_emulated_products_equal_the_reference_in_float64(name, counts, rows, finish):
  torch.manual_seed(0)
  offsets, offset_E1, inputs, dys = case(counts, rows, 192, 96)
  recipe = Recipe(name, emulate=True, forward_only_bf16=finish, seed=5, draw=11)
  compare(
    lambda x, w: block_scaled_product(x, w, offset_E1, recipe, 1),
    lambda x, w: reference.block_scaled_product(x, w, offsets, recipe, 1),
    inputs,
    dys,
    ONE,
  )


@pytest.mark.parametrize(
  "name, axis, square",
  [("fp8", -1, False), ("fp8", -2, False), ("nvfp4", -1, True), ("nvfp4", -2, False)],
)
def test_values_are_exact(name, axis, square):
  q = quantize(normal(3, 64, 96, grad=False), name, axis=axis, square=square)
  assert torch.equal(values(q), q.values(torch.bfloat16))


def test_emulated_products_repeat_bit_for_bit():
  _, offset_E1, inputs, dys = case([300, 0, 500], 800, 256, 128)
  recipe = Recipe("nvfp4", emulate=True, seed=5)
  assert_repeats(lambda x, w: block_scaled_product(x, w, offset_E1, recipe, 0), inputs, dys)


def check_fp32(run, inputs, dys, weights):
  """fp32 gradients are those in bf16 before their rounding, and added once in place."""
  rounded = grads(run, inputs, dys)[-len(weights) :]
  once = fp32_grads(run, inputs, dys, weights)
  for dw, in_bf16 in zip(once, rounded, strict=True):
    assert in_bf16.dtype == torch.bfloat16 and torch.equal(dw.bfloat16(), in_bf16)
    assert not torch.equal(dw, in_bf16.float())
  thrice = fp32_grads(run, inputs, dys, weights, calls=3)
  assert all(torch.equal(three, dw + dw + dw) for dw, three in zip(once, thrice, strict=True))
  return once


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("counts, rows", [([100, 0, 33, 1], 134), ([40, 90], 150)])
def test_fp32_gradients_are_the_exact_sums_and_are_added_in_place(name, counts, rows):
  torch.manual_seed(1)
  offsets, offset_E1, (x, w), dys = case(counts, rows, 192, 96)
  recipe = Recipe(name, emulate=True, seed=5, draw=11)
  exact = w.detach().double().requires_grad_()
  y = reference.block_scaled_product(x.detach().double(), exact, offsets, recipe, 1)
  y.backward(dys[0].double())
  (dw,) = check_fp32(
    lambda x, w: block_scaled_product(x, w, offset_E1, recipe, 1), [x, w], dys, [w]
  )
  assert relative(dw, exact.grad) < FP32


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_fp32_gradients_of_dense_weights(name):
  """They are leaves of two dimensions; a view for one expert would not be one."""
  torch.manual_seed(2)
  recipe = Recipe(name, emulate=True, seed=5)
  x, w13, w2 = normal(100, 96), normal(128, 96, scale=0.1), normal(96, 64)
  dys = [normal(100, 128, grad=False), normal(100, 96, grad=False)]
  check_fp32(lambda x, w: linear(x, w, recipe), [x, w13], dys[:1], [w13])
  w13 = w13.detach().requires_grad_()
  check_fp32(lambda *a: mlp(*a, recipe), [x, w13, w2], dys[1:], [w13, w2])


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_the_halves_make_fp32_gradients_and_add_them_in_place(name):
  torch.manual_seed(3)
  _, offset_E1, (x, w13), (dy,) = case([100, 0, 33], 140, 96, 128)
  w2, gate, dy = normal(3, 96, 64), torch.rand(140, device="cuda"), dy[:, :96].contiguous()
  recipe = Recipe(name, emulate=True, seed=5)

  @torch.no_grad()
  def gradients():
    _, kept = grouped_mlp_forward(x, offset_E1, w13, w2, recipe, True)
    return grouped_mlp_backward(kept, dy, gate, w13, w2)[2]()

  rounded = gradients()
  for w in (w13, w2):
    w.grad_dtype = torch.float32
  once = gradients()
  for w, dw, in_bf16 in zip((w13, w2), once, rounded, strict=True):
    assert torch.equal(dw.bfloat16(), in_bf16) and not torch.equal(dw, in_bf16.float())
    w.grad = dw.clone()
  assert gradients() == (None, None)
  assert all(torch.equal(w.grad, dw + dw) for w, dw in zip((w13, w2), once, strict=True))


def test_errors_name_what_is_wrong():
  _, offset_E1, (x, w), _ = case([8], 8, 64, 64)
  with pytest.raises(KernelError, match="emulate_blockscale"):
    block_scaled_product(x, w, offset_E1, Recipe("fp8"), 0)
  with pytest.raises(KernelError, match="multiples of 32"):
    block_scaled_product(x, w[:, :40].contiguous(), offset_E1, Recipe("fp8", emulate=True), 0)
  with pytest.raises(KernelError, match="int3"):
    block_scaled_product(x, w, offset_E1, Recipe("int3", emulate=True), 0)
