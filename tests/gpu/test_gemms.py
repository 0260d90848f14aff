import pytest
import torch

from gpu.oracle import FP32, ONE, normal, relative, roundings
from kernels.cuda import gemms
from kernels.cuda.jit import ARCH
from kernels.cuda.tail import zero_tail

pytestmark = pytest.mark.gpu
COUNTS = [200, 0, 37, 300]


def offsets(counts):
  return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32).cuda()


def by_expert(counts):
  ends = torch.tensor(counts).cumsum(0).tolist()
  return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_multiply_each_experts_rows_by_its_weight(transposed):
  torch.manual_seed(0)
  a, w = normal(sum(COUNTS), 96, grad=False), normal(4, 200, 96, grad=False)
  given = w.mT.contiguous().mT if transposed else w
  y = gemms.rows(a, given, offsets(COUNTS), torch.tensor([0.5], device="cuda"))
  exact = torch.cat([a[s].double() @ w[e].double().T for e, s in enumerate(by_expert(COUNTS))])
  assert roundings(y, 0.5 * exact) <= ONE


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_grad_gathers_and_sums_over_each_experts_rows(transposed):
  torch.manual_seed(1)
  a, b = normal(50, 96, grad=False), normal(sum(COUNTS), 200, grad=False)
  index = torch.randint(0, 50, (sum(COUNTS),), device="cuda", dtype=torch.int32)
  out = normal(4, 200, 96, grad=False).mT if transposed else normal(4, 96, 200, grad=False)
  gemms.weight_grad(a, b, offsets(COUNTS), out, index)
  gathered = a[index].double()
  exact = torch.stack([gathered[s].T @ b[s].double() for s in by_expert(COUNTS)])
  assert roundings(out, exact) <= ONE


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(96, 200), (512, 768)], ids=str)
def test_weight_grad_in_fp32_is_the_exact_sum_and_is_added_once(shape, transposed, gathered):
  torch.manual_seed(3)
  rows, (m, n) = sum(COUNTS), shape
  index = torch.randint(0, 50, (rows,), device="cuda", dtype=torch.int32) if gathered else None
  a, b = normal(50 if gathered else rows, m, grad=False), normal(rows, n, grad=False)

  def product(out, add):
    view = out.mT if transposed else out
    return gemms.weight_grad(a, b, offsets(COUNTS), view, index, add=add)

  like = torch.empty(4, *(shape[::-1] if transposed else shape), device="cuda")
  once, again, rounded = torch.empty_like(like), torch.empty_like(like), like.bfloat16()
  picked = (a if index is None else a[index]).double()
  exact = torch.stack([picked[s].T @ b[s].double() for s in by_expert(COUNTS)])
  assert relative(product(once, False), exact) < FP32
  assert torch.equal(product(again, False), product(once, False))
  product(rounded, False)
  assert torch.equal(rounded, once.bfloat16())

  start = torch.randn_like(like)
  total = start.clone()
  product(total, True)
  assert torch.equal(total, start + once)
  assert torch.equal(total[1], start[1])


def test_dense_grad_in_fp32_is_the_exact_sum_and_is_added():
  torch.manual_seed(4)
  a, b = normal(3000, 576, grad=False), normal(3000, 512, grad=False)
  exact, out = a.double().T @ b.double(), torch.empty(576, 512, device="cuda")
  assert relative(gemms.dense_grad(a, b, out, False), exact) < FP32
  start = torch.randn_like(out)
  total, again = start.clone(), start.clone()
  assert relative(gemms.dense_grad(a, b, total, True), start.double() + exact) < FP32
  assert torch.equal(gemms.dense_grad(a, b, again, True), total)


def test_accumulate_adds_in_fp32():
  torch.manual_seed(2)
  a, b = normal(264, 128, grad=False), normal(264, 96, grad=False)
  out = torch.empty(128, 96, device="cuda")
  gemms.accumulate(a, b, out, add=False)
  gemms.accumulate(a, b, out, add=True)
  exact = 2 * a.double().T @ b.double()
  assert float((out.double() - exact).norm() / exact.norm()) < 1e-5


def test_the_rule_knows_spills_transposed_weights_and_empty_tiles_of_clusters():
  if ARCH.name == "sm_90a":
    assert gemms.config("dgated", 3072, 1408, True).tile_n == 128
    assert gemms.config("rows, weight transposed", 1024, 2048, True).tile_n != 208
    assert gemms.config("gated", 1024, 1024, True).cluster_m == 1
    assert gemms.config("gated", 3072, 2816, True).cluster_m == 2
  assert gemms.config("weight", 2048, 1408) is gemms.config("weight", 2048, 1408)


@pytest.mark.parametrize("filled", [0, 5, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_tail_clears_the_rows_that_no_expert_owns(filled, dtype):
  x = torch.full((9, 64), float("nan"), device="cuda", dtype=dtype)
  x[:filled] = 1
  zero_tail(x, offsets([filled, 0]))
  assert bool((x[:filled] == 1).all()) and not x[filled:].any()
