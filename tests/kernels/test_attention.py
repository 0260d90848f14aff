import pytest
import torch
from torch.autograd import gradcheck

from kernels.ops import KernelError
from kernels.reference import attention


def inputs(dtype, seq=9, width=8, v_width=6):
  generator = torch.Generator().manual_seed(2)
  widths = (width, width, v_width)
  return [
    torch.randn(2, seq, 3, n, generator=generator, dtype=torch.float64).to(dtype) for n in widths
  ]


def oracle(q, k, v, scale):
  q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
  future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
  weights = (q @ k.mT * scale).masked_fill(future, -torch.inf).softmax(-1)
  return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("v_width", [6, 8, 12])
def test_agrees_with_the_definition(dtype, tolerance, v_width):
  q, k, v = inputs(dtype, v_width=v_width)
  got = attention(q, k, v, 0.4)
  assert got.dtype == dtype and got.shape == v.shape
  torch.testing.assert_close(got.double(), oracle(q, k, v, 0.4), rtol=tolerance, atol=2 * tolerance)


def test_gradients_agree_with_the_definition():
  tensors = [t.requires_grad_() for t in inputs(torch.float64, seq=4, width=4, v_width=3)]
  assert gradcheck(lambda q, k, v: attention(q, k, v, 0.5), tensors)


def test_the_future_does_not_reach_the_past():
  q, k, v = inputs(torch.float32)
  before = attention(q, k, v, 0.3)[:, :5]
  k[:, 5:], v[:, 5:] = 100.0, -100.0
  assert torch.equal(attention(q, k, v, 0.3)[:, :5], before)


def test_wrong_shapes_are_refused():
  q, k, v = inputs(torch.float32)
  with pytest.raises(KernelError, match="must be equal"):
    attention(q, k[:, :-1], v, 1.0)
