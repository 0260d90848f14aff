import pytest
import torch

from kernels import halves
from kernels.errors import KernelError
from kernels.gradient import gradient
from kernels.ops import Recipe
from kernels.reference.loss import linear_cross_entropy


class Product(torch.autograd.Function):
  """x · weightᵀ, whose weight gradient goes where the contract says, in fp32 until it is stored."""

  @staticmethod
  def forward(ctx, x, weight):
    ctx.save_for_backward(x, weight)
    return x @ weight.T

  @staticmethod
  def backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dw = dy.float().T @ x.float()
    return None, gradient(weight, lambda out, add: out.add_(dw) if add else out.copy_(dw))


def setting(grad_dtype=torch.float32):
  torch.manual_seed(0)
  weight = torch.randn(8, 16).bfloat16().requires_grad_()
  weight.grad_dtype = grad_dtype
  return torch.randn(32, 16).bfloat16(), weight, torch.randn(32, 8).bfloat16()


def test_a_leaf_of_fp32_grad_dtype_gets_the_fp32_sum_itself():
  x, weight, dy = setting()
  Product.apply(x, weight.contiguous()).backward(dy)
  assert weight.grad.dtype == torch.float32
  assert torch.equal(weight.grad, dy.float().T @ x.float())
  assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_autograd_neither_casts_nor_copies_what_backward_returns():
  x, weight, dy = setting()
  pointers = []

  class Handed(Product):
    @staticmethod
    def backward(ctx, dy):
      out = dy.float().T @ ctx.saved_tensors[0].float()
      pointers.append(out.data_ptr())
      return None, out

  Handed.apply(x, weight).backward(dy)
  assert [weight.grad.data_ptr()] == pointers


def test_a_grad_that_is_there_is_added_to_in_place():
  x, weight, dy = setting()
  Product.apply(x, weight).backward(dy)
  first, once = weight.grad, weight.grad.clone()
  for _ in range(2):
    Product.apply(x, weight).backward(dy)
  assert weight.grad is first and torch.equal(first, once + once + once)
  (none,) = torch.autograd.grad(Product.apply(x, weight), weight, dy, allow_unused=True)
  assert none is None and torch.equal(first, once + once + once + once)


def test_a_detached_leaf_may_share_the_parameters_grad():
  x, weight, dy = setting()
  leaf = weight.detach().requires_grad_()
  leaf.grad_dtype = torch.float32
  (once,) = torch.autograd.grad(Product.apply(x, leaf), leaf, dy)
  weight.grad = once.clone()
  leaf.grad = weight.grad
  Product.apply(x, leaf).backward(dy)
  assert once.dtype == torch.float32 and torch.equal(weight.grad, once + once)


@pytest.mark.parametrize("kind", ["bf16 leaf", "view", "frozen"])
def test_every_other_weight_gets_a_new_gradient_of_its_dtype(kind):
  x, weight, dy = setting(torch.bfloat16 if kind == "bf16 leaf" else torch.float32)
  weight.grad = torch.ones(8, 16, dtype=weight.grad_dtype)
  given = weight.requires_grad_(kind != "frozen") if kind != "view" else weight[:]
  seen = gradient(given, lambda out, add: out.fill_(float(add)))
  assert seen.dtype == torch.bfloat16 and not seen.any()
  assert torch.equal(weight.grad, torch.ones_like(weight.grad))


def test_a_grad_laid_out_otherwise_is_refused():
  x, weight, dy = setting()
  weight.grad = torch.zeros(16, 8).T
  with pytest.raises(KernelError, match=r"\(16, 1\) has a .grad with strides \(1, 8\)"):
    Product.apply(x, weight).backward(dy)


def test_halves_by_autograd_make_fp32_gradients_and_add_them_in_place():
  x, w13, dy = setting()
  w2, gate = setting()[1].neg().detach().requires_grad_(), torch.rand(32)
  w2.grad_dtype = torch.float32

  def mlp(x, offset, w13, w2, recipe):
    return Product.apply(x, w13) + Product.apply(x, w2)

  def gradients():
    with torch.no_grad():
      _, graph = halves.forward(mlp, x, torch.zeros(2), w13, w2, Recipe(), True)
      return halves.backward(graph, dy, gate, w13, w2)[2]()

  once = gradients()
  for w, dw in zip((w13, w2), once, strict=True):
    assert dw.dtype == torch.float32 and not torch.equal(dw, dw.bfloat16().float())
    w.grad = dw.clone()
  held = [w13.grad, w2.grad]
  assert gradients() == (None, None)
  assert w13.grad is held[0] and w2.grad is held[1]
  assert all(torch.equal(g, dw + dw) for g, dw in zip(held, once, strict=True))


def test_the_heads_gradient_is_not_rounded_to_bf16():
  torch.manual_seed(0)
  x, weight = torch.randn(64, 32).bfloat16(), torch.randn(128, 32).bfloat16().requires_grad_()
  target = torch.randint(128, (64,))
  exact_weight = weight.detach().double().requires_grad_()
  linear_cross_entropy(x.double(), exact_weight, target, 16)[0].mul(0.25).backward()
  weight.grad_dtype = torch.float32
  for calls in (1, 2):
    linear_cross_entropy(x, weight, target, 16)[0].mul(0.25).backward()
    error = (weight.grad - calls * exact_weight.grad).norm() / exact_weight.grad.norm()
    assert weight.grad.dtype == torch.float32 and error < 1e-6
