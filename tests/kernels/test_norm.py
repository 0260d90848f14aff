import pytest
import torch
from torch.autograd import gradcheck

from kernels.ops import KernelError
from kernels.reference import add_rms_norm, rms_norm


def oracle(x, weight, eps):
  x, weight = x.double(), weight.double()
  return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 5, 8), (0, 16), (1, 1)])
def test_fp32_agrees_with_the_definition(shape):
  generator = torch.Generator().manual_seed(0)
  x = torch.randn(shape, generator=generator) * 30
  weight = torch.randn(shape[-1], generator=generator)
  torch.testing.assert_close(
    rms_norm(x, weight, 1e-6).double(), oracle(x, weight, 1e-6), rtol=1e-6, atol=1e-7
  )


def test_bf16_is_rounded_once():
  x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
  exact = oracle(x, weight, 1e-6)
  error = (rms_norm(x, weight, 1e-6).double() - exact).abs()
  rounding = (exact.bfloat16().double() - exact).abs()
  assert error.max() <= 1.01 * rounding.max()


def test_gradients():
  x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
  weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
  assert gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_bf16_gradients_are_fp32_gradients_rounded():
  x, weight = torch.randn(32, 64).bfloat16(), torch.randn(64)
  dy = torch.randn(32, 64).bfloat16()
  narrow = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
  exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
  rms_norm(*narrow, 1e-6).backward(dy)
  oracle(*exact, 1e-6).backward(dy.double())
  for a, b in zip(narrow, exact, strict=True):
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=2**-8, atol=1e-5)


def test_zero_rows_stay_zero():
  assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))


def test_add_rms_norm_normalises_the_rounded_sum():
  x, residual = torch.randn(9, 32).bfloat16(), torch.randn(9, 32).bfloat16()
  weight = torch.randn(32).bfloat16()
  normed, total = add_rms_norm(x, residual, weight, 1e-5)
  assert torch.equal(total, (x.double() + residual.double()).bfloat16())
  assert torch.equal(normed, rms_norm(total, weight, 1e-5))


def test_add_rms_norm_gradients():
  inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
  weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
  assert gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-3), (*inputs, weight))


def test_a_weight_of_another_width_is_refused():
  with pytest.raises(KernelError, match=r"\(8,\) must be \[16\]"):
    rms_norm(torch.randn(2, 16), torch.randn(8), 1e-6)
