import pytest
import torch
from torch.autograd import gradcheck

from kernels.ops import KernelError
from kernels.reference import mla_qkv
from kernels.reference.rope import rotate

B, S, H, NOPE, ROPE, V = 2, 5, 3, 6, 4, 8


def inputs(dtype):
  generator = torch.Generator().manual_seed(1)
  shapes = [(B, S, H, NOPE + ROPE), (B, S, H, NOPE + V), (B, S, ROPE)]
  return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def angles(dtype=torch.float32):
  phase = torch.arange(S)[:, None] * 10000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
  return phase.cos().to(dtype), phase.sin().to(dtype)


def turned(x, cos, sin):
  """Multiplication by e^(i·angle) of the pairs as complex numbers; x [B, S, H, rope]."""
  pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
  return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[:, None]).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_split_and_rotation(dtype):
  q, kv, k_rope = inputs(dtype)
  cos, sin = angles()
  got = mla_qkv(q, kv, k_rope, cos, sin, ROPE)
  key = turned(k_rope[:, :, None], cos, sin).expand(-1, -1, H, -1)
  expected = (
    torch.cat([q[..., :NOPE].double(), turned(q[..., NOPE:], cos, sin)], -1),
    torch.cat([kv[..., :NOPE].double(), key], -1),
    kv[..., NOPE:].double(),
  )
  for a, b in zip(got, expected, strict=True):
    assert a.dtype == dtype
    torch.testing.assert_close(a, b.to(dtype), rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


def test_scores_depend_on_the_distance_alone():
  q, k = (torch.randn(1, 1, 1, ROPE, dtype=torch.float64).expand(1, S, 1, ROPE) for _ in range(2))
  cos, sin = angles(torch.float64)
  scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T
  for distance in range(S):
    diagonal = scores.diagonal(-distance)
    torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_gradients():
  tensors = [t.requires_grad_() for t in inputs(torch.float64)]
  cos, sin = angles(torch.float64)
  assert gradcheck(lambda q, kv, k: mla_qkv(q, kv, k, cos, sin, ROPE), tensors)


def test_wrong_shapes_are_refused():
  q, kv, k_rope = inputs(torch.float32)
  cos, sin = angles()
  with pytest.raises(KernelError, match="rope_dim 6"):
    mla_qkv(q, kv, k_rope, cos, sin, 6)
  with pytest.raises(KernelError, match=r"must be \[S, rope / 2\]"):
    mla_qkv(q, kv, k_rope, cos[:-1], sin, ROPE)
