import pytest
import torch

from gpu.oracle import FOUR, FP32, ONE, assert_repeats, compare, fp32_grads, normal, relative
from kernels import reference
from kernels.cuda import gemms
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


@pytest.mark.parametrize("shape", [(512, 256, 128), (333, 320, 200), (4096, 2048, 2816)], ids=str)
@pytest.mark.parametrize("sms", [2, 32, 1000])
def test_products_that_leave_sms_give_the_same_bits(sms, shape):
  torch.manual_seed(1)
  inputs, dys = block(*shape)

  def results():
    y = mlp(*inputs, BF16)
    return [y, *torch.autograd.grad(y, inputs, dys)]

  wanted = results()
  with gemms.leaving(sms):
    found = results()
  for a, b in zip(found, wanted, strict=True):
    assert torch.equal(a, b)


def test_fp32_gradients_of_a_linear_are_the_exact_sums_and_are_added():
  torch.manual_seed(2)
  x, weight, dy = normal(3, 1000, 256), normal(576, 256), normal(3, 1000, 576, grad=False)
  exact = dy.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
  grads = {}
  for calls in (1, 2, 3):
    (dw,) = fp32_grads(lambda x, w: linear(x, w, BF16), [x, weight], [dy], [weight], calls)
    (same,) = fp32_grads(lambda x, w: linear(x, w, BF16), [x, weight], [dy], [weight], calls)
    assert torch.equal(dw, same) and relative(dw, calls * exact) < FP32
    grads[calls] = dw
  assert relative(grads[2], grads[1] + grads[1]) < FP32


def test_fp32_gradients_of_an_mlp_are_the_exact_sums_and_are_added():
  """Of the bf16 operands that backward multiplies: nothing is rounded after them."""
  torch.manual_seed(3)
  inputs, dys = block(1000, 256, 200)
  x, w13, w2 = (t.detach() for t in inputs)
  dpreact, act, _ = gemms.dgated(dys[0], w2, gemms.gated(x, w13)[0])
  exact = [dpreact.double().T @ x.double(), dys[0].double().T @ act.double()]
  for calls in (1, 2, 3):
    found = fp32_grads(lambda *a: mlp(*a, BF16), inputs, dys, inputs[1:], calls)
    again = fp32_grads(lambda *a: mlp(*a, BF16), inputs, dys, inputs[1:], calls)
    for dw, same, dw64 in zip(found, again, exact, strict=True):
      assert torch.equal(dw, same) and relative(dw, calls * dw64) < FP32


def test_linear_takes_any_leading_shape_and_no_tokens():
  weight = normal(512, 256)
  for lead in ((), (3,), (2, 5), (0,), (2, 0)):
    x = normal(*lead, 256)
    y = linear(x, weight, BF16)
    assert y.shape == (*lead, 512)
    weight.grad = None
    y.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
    assert bool(weight.grad.any()) == bool(x.numel())


def test_no_tokens_and_wrong_shapes():
  (x, w13, w2), _ = block(8, 64, 32)
  assert mlp(x[:0], w13, w2, BF16).shape == (0, 64)
  with pytest.raises(KernelError, match="must be"):
    mlp(x, w13, w2.mT.contiguous(), BF16)
