import pytest
import torch

from gpu.oracle import assert_repeats, compare, normal
from kernels import reference
from kernels.cuda.attention import attention
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu


def case(batch, seq, heads, qk, v):
  q, k, value = (
    normal(batch, seq, heads, qk),
    normal(batch, seq, heads, qk),
    normal(batch, seq, heads, v),
  )
  return [q, k, value], [normal(batch, seq, heads, v, grad=False)]


@pytest.mark.parametrize(
  "shape",
  [(2, 256, 4, 192, 128), (1, 77, 2, 64, 64), (1, 1024, 2, 96, 64)],
  ids=str,
)
def test_attention_equals_the_float64_reference(shape):
  torch.manual_seed(0)
  inputs, dys = case(*shape)
  scale = shape[3] ** -0.5
  # the kernel multiplies by bf16 probabilities: one rounding more in y, two more in the gradients
  compare(
    lambda *a: attention(*a, scale),
    lambda *a: reference.attention(*a, scale),
    inputs,
    dys,
    tolerance=4.0,
  )


@pytest.mark.parametrize("seq", [512, 4096])
def test_attention_repeats_bit_for_bit(seq):
  inputs, dys = case(2, seq, 16, 192, 128)
  for _ in range(3):
    assert_repeats(lambda *a: attention(*a, 192**-0.5), inputs, dys)


def test_attention_refuses_what_it_cannot_run():
  (q, k, v), _ = case(1, 64, 2, 64, 64)
  with pytest.raises(KernelError, match="pass bfloat16"):
    attention(q.float(), k.float(), v.float(), 0.125)
  with pytest.raises(KernelError, match="multiples of 8"):
    attention(q[..., :60], k[..., :60], v, 0.125)
  with pytest.raises(KernelError, match="64/32"):
    attention(q, k, v[..., :32], 0.125)
  with pytest.raises(KernelError, match="shapes"):
    attention(q, k[:, :32], v, 0.125)


def test_attention_of_one_token_and_of_none():
  (q, k, v), _ = case(1, 1, 2, 64, 64)
  assert torch.equal(attention(q, k, v, 0.125), v)
  assert attention(q[:0], k[:0], v[:0], 0.125).shape == (0, 1, 2, 64)
