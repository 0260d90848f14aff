import pytest
import torch

from gpu.oracle import ONE, assert_repeats, compare, normal, relative
from kernels import reference
from kernels.cuda.combine import combine, sum_rows, sum_rows_backward
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu

SHAPES = [(1000, 6, 2048), (257, 8, 7168), (64, 1, 8), (33, 16, 1032)]  # T, K, D


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape):
  tokens, top_k, dim = shape
  y, gate = normal(*shape), torch.rand(tokens, top_k, device="cuda").requires_grad_()
  compare(combine, reference.combine, [y, gate], [normal(tokens, dim)], ONE)
  assert_repeats(combine, [y, gate], [normal(tokens, dim)])


def test_fp32():
  y, gate = normal(100, 4, 512, dtype=torch.float32), torch.rand(100, 4, device="cuda")
  compare(combine, reference.combine, [y, gate.requires_grad_()], [normal(100, 512)], ONE)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gathers_rows(shape, weighted):
  tokens, top_k, dim = shape
  rows = normal(tokens * top_k, dim, grad=False)
  row = torch.randperm(tokens * top_k, device="cuda").int().view(tokens, top_k)
  gate = torch.rand(tokens, top_k, device="cuda") if weighted else None
  exact = rows.double()[row.long()]
  exact = (exact * gate.double()[..., None] if weighted else exact).sum(1)
  y = sum_rows(rows, row, gate)
  assert relative(y, exact) <= 1.01 * relative(exact.bfloat16(), exact)


def test_backward_of_gathered_rows():
  tokens, top_k, dim = 300, 6, 1024
  rows, dy = normal(tokens * top_k, dim, grad=False), normal(tokens, dim, grad=False)
  row = torch.randperm(tokens * top_k, device="cuda").int().view(tokens, top_k)
  gate = torch.rand(tokens, top_k, device="cuda")
  drows, dgate = sum_rows_backward(dy, rows, row, gate)
  exact = (rows.double()[row.long()] * dy.double()[:, None]).sum(-1)
  assert relative(dgate, exact) < 1e-6
  products = (gate[..., None] * dy.float()[:, None]).bfloat16()
  assert torch.equal(drows[row.long()], products)


def test_no_tokens():
  y, gate = normal(0, 6, 64), torch.rand(0, 6, device="cuda").requires_grad_()
  out = combine(y, gate)
  out.sum().backward()
  assert out.shape == (0, 64) and y.grad.shape == y.shape and gate.grad.shape == gate.shape


def test_rows_of_unaligned_size_are_refused():
  with pytest.raises(KernelError, match="multiple of 8"):
    combine(normal(4, 2, 12), torch.rand(4, 2, device="cuda"))
