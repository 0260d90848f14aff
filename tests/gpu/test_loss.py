import pytest
import torch

from gpu.oracle import assert_repeats, compare, fp32_grads, grads, normal, relative
from kernels import reference
from kernels.cuda.loss import linear_cross_entropy
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu


def head(tokens, dim, vocab, scale=1.0, likely=False):
  """Logits of standard deviation `scale`; targets uniform, or `likely`: drawn from the model."""
  x, weight = normal(tokens, dim), normal(vocab, dim, scale=scale * dim**-0.5)
  target = torch.randint(0, vocab, (tokens,), device="cuda")
  if likely:
    target = torch.multinomial((x.detach() @ weight.detach().T).float().softmax(1), 1)[:, 0]
  target[::7] = -1
  return [x, weight], target, [torch.tensor(1.0 / tokens, device="cuda")]


@pytest.mark.parametrize(
  "tokens, dim, vocab, chunk, scale, likely",
  [
    (512, 256, 1024, 256, 1.0, False),
    (1001, 320, 640, 400, 4.0, False),
    (3, 512, 128, 8, 1.0, False),
    (1000, 512, 40960, 504, 4.0, True),
    (2048, 1024, 201088, 1024, 2.0, False),
  ],
)
def test_loss_and_gradients_equal_the_float64_reference(tokens, dim, vocab, chunk, scale, likely):
  torch.manual_seed(0)
  inputs, target, dys = head(tokens, dim, vocab, scale, likely)
  # dz, dx and its product with dys are rounded to bf16, the logits to fp16: emulated in float64
  # these cases err by up to 1.8 roundings, and with logits in bf16 by up to 4.6
  compare(
    lambda x, w: linear_cross_entropy(x, w, target, chunk),
    lambda x, w: reference.linear_cross_entropy(x, w, target, chunk),
    inputs,
    dys,
    2.0,
  )
  losses = linear_cross_entropy(*inputs, target, chunk)[1]
  exact = reference.linear_cross_entropy(*(t.detach().double() for t in inputs), target, chunk)[1]
  assert relative(losses, exact) < 1e-5
  assert not losses[target < 0].any()
  with torch.no_grad():
    assert relative(linear_cross_entropy(*inputs, target, chunk)[1], exact) < 1e-5


def test_no_tokens():
  (x, weight), target, _ = head(8, 64, 128)
  total, losses = linear_cross_entropy(x[:0], weight, target[:0], 8)
  total.backward()
  assert total == 0 and losses.shape == (0,)
  assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_all_targets_ignored():
  inputs, target, _ = head(64, 64, 128)
  total, losses = linear_cross_entropy(*inputs, torch.full_like(target, -1), 64)
  dx, dw = torch.autograd.grad(total, inputs)
  assert total == 0 and not losses.any() and not dx.any() and not dw.any()


@pytest.mark.parametrize("logit, finite", [(57344.0, True), (131072.0, False)])
def test_gradients_beyond_fp16_are_not_finite_but_losses_are_right(logit, finite):
  x = torch.full((8, 64), 256.0, device="cuda", dtype=torch.bfloat16, requires_grad=True)
  weight = torch.zeros(128, 64, device="cuda", dtype=torch.bfloat16)
  weight[0] = logit / (64 * 256)
  weight.requires_grad_()
  total, losses = linear_cross_entropy(x, weight, torch.ones(8, device="cuda").long(), 8)
  assert relative(losses, torch.full_like(losses, logit)) < 1e-6
  dx, dw = torch.autograd.grad(total, (x, weight))
  assert bool(dx.isfinite().all()) == bool(dw.isfinite().all()) == finite
  if finite:
    assert torch.equal(dx, weight[:1].expand_as(x))
    assert (dw[0] == 2048).all() and (dw[1] == -2048).all() and not dw[2:].any()


def test_loss_repeats_bit_for_bit():
  inputs, target, dys = head(4096, 1024, 32768)
  assert_repeats(lambda x, w: linear_cross_entropy(x, w, target, 1024), inputs, dys)


def test_fp32_gradient_of_the_head_is_never_rounded_and_is_added_in_place():
  torch.manual_seed(2)
  (x, weight), target, dys = head(1024, 256, 1024)

  def run(x, weight):
    return linear_cross_entropy(x, weight, target, 400)

  rounded = grads(run, [x, weight], dys)[-1]
  (once,) = fp32_grads(run, [x, weight], dys, [weight])
  assert rounded.dtype == torch.bfloat16 and torch.equal(once.bfloat16(), rounded)
  assert not torch.equal(once, rounded.float())
  for calls, sum_ in ((1, once), (2, once + once), (3, once + once + once)):
    (dw,) = fp32_grads(run, [x, weight], dys, [weight], calls)
    assert torch.equal(dw, sum_)  # dys is a power of two, so the products with it are exact
  (dw,) = fp32_grads(run, [x, weight], [dys[0] * 0.3], [weight], 2)
  assert relative(dw, 0.6 * once.double()) < 1e-6


def test_adding_to_the_heads_gradient_takes_no_memory():
  (x, weight), target, _ = head(1024, 512, 32768)
  weight.grad_dtype = torch.float32
  for _ in range(2):
    total = linear_cross_entropy(x, weight, target, 512)[0]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total.backward()
    more = torch.cuda.max_memory_allocated() - before
  assert more <= 4 * x.numel() * 4 + (4 << 20) < weight.numel() * 4


def test_extra_memory_is_bounded():
  inputs, target, _ = head(4096, 512, 65536)
  linear_cross_entropy(*inputs, target, 512)[0].backward()
  for t in inputs:
    t.grad = None
  torch.cuda.synchronize()
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  linear_cross_entropy(*inputs, target, 512)[0].backward()
  logits, weight = 512 * 65536 * 2, 65536 * 512
  assert torch.cuda.max_memory_allocated() - before <= 1.1 * logits + weight * (4 + 2) + (16 << 20)


def test_errors_name_what_is_wrong():
  (x, weight), target, _ = head(16, 64, 128)
  with pytest.raises(KernelError, match="multiple of 128"):
    linear_cross_entropy(x, weight[:120], target, 16)
  with pytest.raises(KernelError, match="int64"):
    linear_cross_entropy(x, weight, target.int(), 16)
  with pytest.raises(KernelError, match="multiple of 8"):
    linear_cross_entropy(x, weight, target, 12)
