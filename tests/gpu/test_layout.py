import pytest
import torch

from kernels import reference
from kernels.cuda.layout import layout
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu


def assert_same(expert_TK, num_experts):
  ours, exact = layout(expert_TK, num_experts), reference.layout(expert_TK, num_experts)
  for name in ("offset_E1", "row_TK", "source_N"):
    found, wanted = getattr(ours, name), getattr(exact, name)
    assert found.dtype == torch.int32 and torch.equal(found, wanted), name


@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 43, 4096, 32768, 100003])
@pytest.mark.parametrize("experts,top_k", [(64, 6), (256, 8), (512, 16), (6, 2), (1, 1), (1024, 3)])
def test_equals_a_stable_sort(tokens, experts, top_k):
  assert_same(torch.randint(experts, (tokens, top_k), device="cuda", dtype=torch.int32), experts)


@pytest.mark.parametrize("expert", [0, 63])
def test_one_expert_gets_all(expert):
  assert_same(torch.full((5000, 6), expert, device="cuda", dtype=torch.int32), 64)


def test_repeats_bit_for_bit():
  expert = torch.randint(64, (32768, 6), device="cuda", dtype=torch.int32)
  first = layout(expert, 64)
  for _ in range(20):
    assert all(torch.equal(a, b) for a, b in zip(first, layout(expert, 64), strict=True))


def test_no_tokens():
  out = layout(torch.empty(0, 6, device="cuda", dtype=torch.int32), 64)
  assert out.offset_E1.tolist() == [0] * 65
  assert out.row_TK.shape == (0, 6) and out.source_N.shape == (0,)


def test_int64_experts_are_refused():
  with pytest.raises(KernelError, match="int32"):
    layout(torch.zeros(4, 2, device="cuda", dtype=torch.int64), 8)
