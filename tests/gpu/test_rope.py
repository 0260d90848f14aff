import pytest
import torch

from gpu.oracle import ONE, assert_repeats, compare, normal
from kernels import reference
from kernels.cuda.rope import mla_qkv
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu


def case(batch, seq, heads, nope, rope, v, dtype=torch.bfloat16, slack=0):
  q = normal(batch, seq, heads, nope + rope, dtype=dtype)
  kv = normal(batch, seq, heads, nope + v, dtype=dtype)
  k_rope = normal(batch, seq, slack + rope, dtype=dtype)
  angle = torch.rand(seq, rope // 2, device="cuda") * 7
  dys = [normal(*s, dtype=dtype, grad=False) for s in (q.shape, q.shape, (*q.shape[:3], v))]
  return [q, kv, k_rope], angle.cos(), angle.sin(), dys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
  "shape", [(2, 128, 16, 128, 64, 128), (1, 77, 3, 16, 8, 24), (3, 5, 1, 8, 16, 8)], ids=str
)
@pytest.mark.parametrize("slack", [0, 32])
def test_mla_qkv_equals_the_float64_reference(shape, slack, dtype):
  torch.manual_seed(0)
  inputs, cos, sin, dys = case(*shape, dtype=dtype, slack=slack)
  rope = shape[4]

  def run(op):
    def fn(q, kv, k):
      wide = q.dtype if q.dtype == torch.float64 else torch.float32
      return op(q, kv, k[..., slack:], cos.to(wide), sin.to(wide), rope)

    return fn

  most = ONE if dtype == torch.bfloat16 else 1e-3
  compare(run(mla_qkv), run(reference.mla_qkv), inputs, dys, most)


def test_mla_qkv_repeats_bit_for_bit():
  inputs, cos, sin, dys = case(2, 512, 16, 128, 64, 128)
  assert_repeats(lambda q, kv, k: mla_qkv(q, kv, k, cos, sin, 64), inputs, dys)


def test_errors_name_what_is_wrong():
  (q, kv, k_rope), cos, sin, _ = case(1, 8, 2, 16, 8, 16)
  with pytest.raises(KernelError, match="k_rope"):
    mla_qkv(q, kv, k_rope[:, :4], cos, sin, 8)
  with pytest.raises(KernelError, match="cos"):
    mla_qkv(q, kv, k_rope, cos[:4], sin[:4], 8)
  assert mla_qkv(q[:, :0], kv[:, :0], k_rope[:, :0], cos[:0], sin[:0], 8)[2].shape == (1, 0, 2, 16)
