import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.ops import KernelError
from kernels.reference import linear_cross_entropy

T, D, V = 23, 12, 17


def inputs(dtype, ignored=5):
  generator = torch.Generator().manual_seed(3)
  x = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
  weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
  target = torch.randint(0, V, (T,), generator=generator)
  target[torch.randperm(T, generator=generator)[:ignored]] = -1
  return x.requires_grad_(), weight.requires_grad_(), target


def oracle(x, weight, target, factor=1.0):
  x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
  losses = F.cross_entropy(x @ weight.T, target, reduction="none", ignore_index=-1)
  (losses.sum() * factor).backward()
  return losses.detach(), x.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 7, 23, 4096])
@pytest.mark.parametrize(
  "dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2**-8)]
)
def test_loss_and_gradients_agree_with_cross_entropy(chunk, dtype, tolerance):
  x, weight, target = inputs(dtype)
  total, losses = linear_cross_entropy(x, weight, target, chunk)
  (total * 0.25).backward()
  expected, dx, dweight = oracle(x, weight, target, 0.25)
  narrow = min(tolerance, 2e-6)  # logits, losses and sums are fp32 whatever the inputs are
  torch.testing.assert_close(losses.double(), expected, rtol=narrow, atol=narrow)
  torch.testing.assert_close(total.double(), expected.sum(), rtol=narrow, atol=narrow)
  torch.testing.assert_close(x.grad.double(), dx, rtol=2 * tolerance, atol=tolerance)
  torch.testing.assert_close(weight.grad.double(), dweight, rtol=2 * tolerance, atol=tolerance)
  assert not losses.requires_grad


def test_ignored_targets_cost_nothing():
  x, weight, _ = inputs(torch.float32)
  total, losses = linear_cross_entropy(x, weight, torch.full((T,), -1), 8)
  total.backward()
  assert total == 0 and not losses.any() and not x.grad.any() and not weight.grad.any()


def test_no_tokens():
  weight = torch.randn(V, D, requires_grad=True)
  x = torch.zeros(0, D, requires_grad=True)
  total, losses = linear_cross_entropy(x, weight, torch.zeros(0, dtype=torch.int64), 8)
  total.backward()
  assert total == 0 and losses.shape == (0,) and not weight.grad.any()


def test_huge_logits_do_not_overflow():
  x, weight = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0]])
  total, losses = linear_cross_entropy(x, weight, torch.tensor([0, 1]), 2)
  assert losses.tolist() == [0.0, 2e4] and total == 2e4


class Largest(TorchDispatchMode):
  """Records the number of elements of the largest result."""

  size = 0

  def __torch_dispatch__(self, function, types, args=(), kwargs=None):
    out = function(*args, **(kwargs or {}))
    for tensor in out if isinstance(out, tuple | list) else (out,):
      if isinstance(tensor, torch.Tensor):
        self.size = max(self.size, tensor.numel())
    return out


def test_the_logits_of_all_tokens_never_exist():
  tokens, width, vocab, chunk = 256, 4, 64, 16
  x = torch.randn(tokens, width, requires_grad=True)
  weight = torch.randn(vocab, width, requires_grad=True)
  with Largest() as mode:
    linear_cross_entropy(x, weight, torch.zeros(tokens, dtype=torch.int64), chunk)[0].backward()
  assert mode.size == max(chunk * vocab, tokens * width, vocab * width)


def test_without_gradients():
  x, weight, target = inputs(torch.float32)
  with torch.no_grad():
    total, _ = linear_cross_entropy(x, weight, target, 5)
  assert not total.requires_grad
  total, _ = linear_cross_entropy(x.detach(), weight, target, 5)
  total.backward()
  assert x.grad is None and weight.grad is not None


def test_wrong_shapes_are_refused():
  x, weight, target = inputs(torch.float32)
  with pytest.raises(KernelError, match=r"must be \[T, D\]"):
    linear_cross_entropy(x, weight, target[:-1], 8)
  with pytest.raises(KernelError, match="chunk 0"):
    linear_cross_entropy(x, weight, target, 0)
