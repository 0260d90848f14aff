import pytest
import torch

from gpu.oracle import FOUR, ONE, assert_repeats, compare, normal
from kernels import reference
from kernels.cuda.dense import linear, mlp
from kernels.ops import KernelError, Recipe

pytestmark = pytest.mark.gpu
BF16 = Recipe()


def block(tokens, dim, width):
  x, w13, w2 = normal(tokens, dim), normal(2 * width, dim, scale=dim**-0.5), normal(dim, width)
  return [x, w13, w2], [normal(tokens, dim, grad=False)]


@pytest.mark.parametrize(
  "shape", [(512, 256, 128), (333, 320, 200), (8, 64, 32), (4096, 2048, 2816)], ids=str
)
def test_mlp_equals_the_float64_reference(shape):
  torch.manual_seed(0)
  inputs, dys = block(*shape)
  compare(lambda *a: mlp(*a, BF16), lambda *a: reference.mlp(*a, BF16), inputs, dys, FOUR)


def test_linear_equals_the_float64_reference():
  torch.manual_seed(0)
  inputs, dys = [normal(2, 333, 256), normal(512, 256)], [normal(2, 333, 512, grad=False)]
  compare(lambda *a: linear(*a, BF16), lambda *a: reference.linear(*a, BF16), inputs, dys, ONE)


def test_dense_products_repeat_bit_for_bit():
  inputs, dys = block(4096, 1024, 1408)
  assert_repeats(lambda *a: mlp(*a, BF16), inputs, dys)
  assert_repeats(
    lambda x, w13, w2: linear(x, w13, BF16), inputs[:2] + [inputs[2].detach()], [normal(4096, 2816)]
  )


def test_no_tokens_and_wrong_shapes():
  (x, w13, w2), _ = block(8, 64, 32)
  assert mlp(x[:0], w13, w2, BF16).shape == (0, 64)
  with pytest.raises(KernelError, match="must be"):
    mlp(x, w13, w2.mT.contiguous(), BF16)
