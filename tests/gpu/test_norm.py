import pytest
import torch

from gpu.oracle import FP32, TWO, assert_repeats, compare, exact_inputs, normal, relative, roundings
from kernels import reference
from kernels.cuda.norm import add_rms_norm, rms_norm
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu
EPS = 1e-6
SHAPES = [(512, 2048), (3, 77, 512), (1, 64), (1000, 7168)]


def case(shape, weight_dtype):
  weight = normal(shape[-1], dtype=weight_dtype)
  return [normal(*shape), weight], [normal(*shape, grad=False)]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_the_float64_reference(shape, weight_dtype):
  torch.manual_seed(0)
  inputs, dys = case(shape, weight_dtype)
  compare(
    lambda x, w: rms_norm(x, w, EPS), lambda x, w: reference.rms_norm(x, w, EPS), inputs, dys, TWO
  )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_equals_the_float64_reference(shape):
  torch.manual_seed(0)
  (x, weight), (dy,) = case(shape, torch.float32)
  inputs, dys = [x, normal(*shape), weight], [dy, normal(*shape, grad=False)]
  compare(
    lambda x, r, w: add_rms_norm(x, r, w, EPS),
    lambda x, r, w: reference.add_rms_norm(x, r, w, EPS),
    inputs,
    dys,
    TWO,
  )
  total = add_rms_norm(*inputs, EPS)[1]
  assert torch.equal(total, x + inputs[1])
  assert roundings(total, x.double() + inputs[1].double()) <= 1.0


def test_norms_repeat_bit_for_bit():
  inputs, dys = case((8192, 2048), torch.float32)
  assert_repeats(lambda x, w: rms_norm(x, w, EPS), inputs, dys)


def test_gradients_of_bf16_weights_add_up_in_fp32():
  (x, weight), (dy,) = case((1000, 512), torch.bfloat16)
  weight.grad_dtype, exact = torch.float32, exact_inputs([x, weight])
  for _ in range(3):
    rms_norm(x, weight, EPS).backward(dy)
    reference.rms_norm(*exact, EPS).backward(dy.double())
  assert weight.grad.dtype == torch.float32
  assert relative(weight.grad, exact[1].grad) <= FP32


def test_errors_name_what_is_wrong():
  (x, weight), _ = case((8, 64), torch.float32)
  with pytest.raises(KernelError, match="one weight each"):
    rms_norm(x, weight[:32], EPS)
  with pytest.raises(KernelError, match="one dtype and shape"):
    add_rms_norm(x, x.float(), weight, EPS)
