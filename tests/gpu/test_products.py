import pytest
import torch

from gpu.oracle import ONE, assert_repeats, compare, normal
from kernels.cuda.blockscale import quantize
from kernels.cuda.products import block_scaled_product, values
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


def test_errors_name_what_is_wrong():
  _, offset_E1, (x, w), _ = case([8], 8, 64, 64)
  with pytest.raises(KernelError, match="emulate_blockscale"):
    block_scaled_product(x, w, offset_E1, Recipe("fp8"), 0)
  with pytest.raises(KernelError, match="multiples of 32"):
    block_scaled_product(x, w[:, :40].contiguous(), offset_E1, Recipe("fp8", emulate=True), 0)
  with pytest.raises(KernelError, match="int3"):
    block_scaled_product(x, w, offset_E1, Recipe("int3", emulate=True), 0)
