import itertools
from functools import partial

import pytest
import torch

from gpu.oracle import raw_bytes, relative
from kernels import reference
from kernels.copies import Copies
from kernels.cuda.adamw import adamw
from kernels.cuda.muon import muon
from kernels.cuda.newton_schulz import newton_schulz
from kernels.cuda.quantization import quantize_operand
from kernels.ops import KernelError, Recipe, Rows
from kernels.reference.newton_schulz import newton_schulz as exact_newton_schulz

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
ONE = torch.tensor(1.0)
FORMATS = ["fp8", "nvfp4"]
RULE = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def state(sizes, param, grad, moment):
  """(params, grads, masters, exp_avgs, exp_avg_sqs); an fp32 parameter is its own master."""
  masters = [torch.randn(n, device="cuda") for n in sizes]
  params = masters if param == FP32 else [m.to(param) for m in masters]
  grads = [torch.randn(n, device="cuda").to(grad) for n in sizes]
  moments = [[torch.rand(n, device="cuda").to(moment) for n in sizes] for _ in range(2)]
  return params, grads, masters, *moments


@pytest.mark.parametrize("grad", [BF16, FP32])
@pytest.mark.parametrize("moment", [BF16, FP32])
@pytest.mark.parametrize("param", [BF16, FP32])
def test_three_steps_follow_float64(param, grad, moment):
  ours = state([1, 7, 8, 4099, 100_000], param, grad, moment)
  scale = torch.tensor(0.7, device="cuda")
  exact = [[t.double() for t in group] for group in ours[:3]]
  exact[0] = exact[2]
  exact += [[t.double() for t in group] for group in ours[3:]]
  for step in (1, 2, 3):
    adamw(*ours, step=step, grad_scale=scale, **RULE)
    reference.adamw(*exact, step=step, grad_scale=scale.double(), **RULE)
  for group, wanted in zip(ours, exact, strict=True):
    bound = 1e-2 if BF16 in (group[0].dtype, moment) else 3e-7
    assert relative(torch.cat(group), torch.cat(wanted)) < bound
  if param == BF16:
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(ours[0], ours[2], strict=True))


def test_nan_scale_leaves_everything():
  ours = state([1000, 3], BF16, BF16, FP32)
  before = [[t.clone() for t in group] for group in ours]
  adamw(*ours, step=1, grad_scale=torch.tensor(torch.nan, device="cuda"), **RULE)
  for group, kept in zip(ours, before, strict=True):
    assert all(torch.equal(a, b) for a, b in zip(group, kept, strict=True))


@pytest.mark.parametrize("param", [BF16, FP32])
def test_a_step_counts_as_a_write(param):
  """Autograd and kernels.copies tell by torch's count that a tensor has changed; views share it."""
  ours = state([1000, 3], param, BF16, FP32)
  before = [p._version for p in ours[0]]
  views = [p.detach()[:1] for p in ours[0]]
  adamw(views, *([t[:1] for t in g] for g in ours[1:]), step=1, grad_scale=ONE.cuda(), **RULE)
  assert all(p._version > version for p, version in zip(ours[0], before, strict=True))


def quantized(weight, format):
  """An operand of tensor cores, as kernels.cuda.products makes it of a weight."""
  return quantize_operand(weight, format, square=format == "nvfp4")


def kept(weight, format):
  """(Copies, the operands of tensor cores that it keeps of the weight)."""
  copies = Copies()
  recipe = Recipe(format, copies=copies)
  sides = (("fprop_w", weight), ("dgrad_w", weight.mT))
  return copies, lambda: [
    recipe.quantized(leg, 0, weight, partial(quantized, side, format)) for leg, side in sides
  ]


def assert_fresh(operands, weight, format):
  for found, side in zip(operands, (weight, weight.mT), strict=True):
    want = quantized(side, format)
    assert all(torch.equal(a, b) for a, b in zip(raw_bytes(found), raw_bytes(want), strict=True))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grad", [BF16, FP32])
@pytest.mark.parametrize("moment", [BF16, FP32])
@pytest.mark.parametrize("shape", [(3, 160, 224), (2, 256, 128), (32, 416), (5, 384, 32)])
def test_operands_are_written_with_the_weight(shape, moment, grad, format):
  """The weight and its state as by the other kernel but for the last bits, which the compiler may
  round once less in one of them; the operands are the quantizer's, bit for bit.
  """
  ours = state([shape], BF16, grad, moment)
  ours[2][0].mul_(torch.exp2(torch.randint(-30, 10, shape, device="cuda").float()))
  for group in ours[1:4]:
    group[0][..., :32, :32] = 0  # blocks of zeros
  other = [[t.clone() for t in group] for group in ours]
  weight, (copies, operands) = ours[0][0], kept(ours[0][0], format)
  before = operands()
  for part in itertools.chain(*map(raw_bytes, before)):
    part.fill_(0x55)
  scale = torch.tensor(0.7, device="cuda")
  adamw(*ours, step=1, grad_scale=scale, copies=[copies], **RULE)
  adamw(*other, step=1, grad_scale=scale, **RULE)
  for (a,), (b,) in zip(ours, other, strict=True):
    rtol = 2.0**-7 if a.dtype == BF16 else 2.0**-18
    torch.testing.assert_close(a, b, rtol=rtol, atol=2.0**-24)
  assert all(a is b for a, b in zip(before, operands(), strict=True))
  assert_fresh(before, weight, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_operands_of_a_weight_of_no_numbers(value, format):
  """All zeros; one element that is no number, in a weight and so in its tensor's scale."""
  ours = state([(2, 64, 96)], BF16, BF16, FP32)
  if value == 0:
    for group in ours[1:4]:
      group[0].zero_()
  else:
    ours[2][0][1, 40, 50] = value
  copies, operands = kept(ours[0][0], format)
  before = operands()
  adamw(*ours, step=1, grad_scale=ONE.cuda(), copies=[copies], **RULE)
  assert all(a is b for a, b in zip(before, operands(), strict=True))
  assert value == 0 or not ours[0][0].isfinite().all()
  assert_fresh(before, ours[0][0], format)


@pytest.mark.parametrize("format", FORMATS)
def test_operands_of_another_weight_are_not_written(format):
  ours = state([(2, 64, 96)], BF16, BF16, FP32)
  weight, (copies, operands) = ours[0][0], kept(ours[0][0], format)
  before = operands()
  weight.neg_()
  adamw(*ours, step=1, grad_scale=ONE.cuda(), copies=[copies], **RULE)
  assert not any(a is b for a, b in zip(before, operands(), strict=True))
  assert_fresh(operands(), weight, format)


@pytest.mark.parametrize("format", FORMATS)
def test_nan_scale_leaves_the_operands(format):
  ours = state([(2, 64, 96)], BF16, BF16, FP32)
  weight, (copies, operands) = ours[0][0], kept(ours[0][0], format)
  before = operands()
  nan = torch.tensor(torch.nan, device="cuda")
  adamw(*ours, step=1, grad_scale=nan, copies=[copies], **RULE)
  assert all(a is b for a, b in zip(before, operands(), strict=True))
  assert_fresh(before, weight, format)


def test_repeats_bit_for_bit():
  ours = state([1 << 20], BF16, BF16, FP32)
  other = [[t.clone() for t in group] for group in ours]
  for group in (ours, other):
    adamw(*group, step=1, grad_scale=torch.tensor(1.0, device="cuda"), **RULE)
  for a, b in zip(ours, other, strict=True):
    assert torch.equal(a[0], b[0])


def test_fp16_and_uneven_lists_are_refused():
  ours = state([8], BF16, BF16, FP32)
  scale = torch.tensor(1.0, device="cuda")
  with pytest.raises(KernelError, match="different lengths"):
    adamw([], *ours[1:], step=1, grad_scale=scale, **RULE)
  with pytest.raises(KernelError, match="bfloat16 or torch.float32"):
    adamw(*ours[:1], [ours[1][0].half()], *ours[2:], step=1, grad_scale=scale, **RULE)


@pytest.mark.parametrize(
  "shape", [(256, 512), (4, 1408, 2048), (3, 2, 512, 128), (64, 80), (1, 40, 8)]
)
def test_newton_schulz(shape):
  g = torch.randn(shape, device="cuda")
  norm = torch.linalg.matrix_norm(g, keepdim=True)
  out = newton_schulz(g, norm, 5)
  exact = exact_newton_schulz(g.double().cpu(), 5)
  assert out.shape == g.shape and out.dtype == BF16 and out.is_contiguous()
  singular = torch.linalg.svdvals(out.double())
  assert 0.3 < singular.min() and singular.max() < 1.4
  # five bf16 steps: about 1 % of the exact iteration's result
  assert relative(out.cpu(), exact) < 3e-2
  assert torch.equal(out, newton_schulz(g, norm, 5))


def test_newton_schulz_refuses_unaligned_matrices():
  with pytest.raises(KernelError, match="multiples of 8"):
    newton_schulz(torch.randn(12, 16, device="cuda"), ONE.cuda(), 5)


GATED = (Rows(2, 0, 1), Rows(2, 1, 2))  # w13
HEADS = (Rows(24, 0, 16), Rows(24, 16, 24))  # q, by heads
MUON = dict(lr=1e-2, momentum=0.95, weight_decay=0.1)
CHANGE = {0: 2.0**-8, 5: 3e-2}  # of a master by steps: X itself rounded once; as newton_schulz


def muon_state(shape, param, grad, momentum, count=2):
  """(params, grads, masters, momenta); an fp32 parameter is its own master."""
  masters = [torch.randn(shape, device="cuda") for _ in range(count)]
  params = masters if param == FP32 else [m.to(param) for m in masters]
  grads = [torch.randn(shape, device="cuda").to(grad) for _ in range(count)]
  return params, grads, masters, [torch.randn(shape, device="cuda").to(momentum) for _ in masters]


def clones(groups):
  return [[t.clone() for t in group] for group in groups]


@pytest.mark.parametrize("steps", CHANGE)
@pytest.mark.parametrize("grad", [BF16, FP32])
@pytest.mark.parametrize("momentum", [BF16, FP32])
@pytest.mark.parametrize("param", [BF16, FP32])
@pytest.mark.parametrize(
  ("shape", "blocks"),
  [((4, 256, 192), GATED), ((144, 104), HEADS), ((264, 64), (Rows(264, 0, 264),))],
)
def test_muon_follows_float64(shape, blocks, param, momentum, grad, steps):
  ours = muon_state(shape, param, grad, momentum)
  experts = len(shape) == 3
  if experts:
    ours[1][0][1] = 0
  rule = MUON | dict(blocks=blocks, sizes=(0.5, 2.0)[: len(blocks)], steps=steps, experts=experts)
  before = clones(ours)
  exact = [[t.double().cpu() for t in group] for group in ours]
  exact[0] = exact[2]
  muon(*ours, grad_scale=torch.tensor(0.7, device="cuda"), **rule)
  reference.muon(*exact, grad_scale=torch.tensor(0.7), **rule)
  for i, (master, old) in enumerate(zip(ours[2], before[2], strict=True)):
    moved, want = (master - old).cpu(), exact[2][i] - old.double().cpu()
    assert relative(moved, want) < CHANGE[steps]
    assert relative(ours[3][i].cpu(), exact[3][i]) < (4e-3 if momentum == BF16 else 3e-7)
    assert torch.equal(ours[0][i], master.to(param))
  if experts:
    for after, old in zip(ours, before, strict=True):
      assert torch.equal(after[0][1], old[0][1])


def test_muon_of_a_nan_scale_leaves_everything():
  ours = muon_state((2, 64, 32), BF16, FP32, FP32)
  before = clones(ours)
  nan = torch.tensor(torch.nan, device="cuda")
  muon(*ours, grad_scale=nan, blocks=GATED, sizes=(1.0, 1.0), steps=5, experts=True, **MUON)
  for group, kept in zip(ours, before, strict=True):
    assert all(torch.equal(a, b) for a, b in zip(group, kept, strict=True))


@pytest.mark.parametrize("param", [BF16, FP32])
def test_muon_repeats_bit_for_bit_and_counts_as_a_write(param):
  ours = muon_state((8, 256, 512), param, FP32, FP32)
  other = clones(ours)
  other[0] = other[2] if param == FP32 else other[0]
  for group in (ours, other):
    version = group[0][0]._version
    muon(
      *group, grad_scale=ONE.cuda(), blocks=GATED, sizes=(1.0, 1.0), steps=5, experts=True, **MUON
    )
    assert group[0][0]._version > version
  for a, b in zip(ours, other, strict=True):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shape", [(8, 1024, 512), (8, 512, 1088)])
def test_muon_of_one_matrix_or_of_many_gives_the_same_bits(shape):
  """A rank's calls have as many experts as it owns."""
  ours = muon_state(shape, BF16, FP32, FP32)
  rule = MUON | dict(blocks=GATED, sizes=(1.0, 1.0), steps=5, experts=True)
  parts = [[[group[0][i : i + 1].clone()] for group in ours] for i in range(shape[0])]
  muon(*ours, grad_scale=ONE.cuda(), **rule)
  for i, part in enumerate(parts):
    muon(*part, grad_scale=ONE.cuda(), **rule)
    for whole, one in zip(ours, part, strict=True):
      assert torch.equal(whole[0][i : i + 1], one[0])


def test_muon_refuses_what_its_kernels_cannot_take():
  rule = dict(blocks=GATED, sizes=(1.0, 1.0), steps=5, experts=True, **MUON)
  ours = muon_state((2, 64, 32), BF16, FP32, FP32)
  with pytest.raises(KernelError, match="different lengths"):
    muon(ours[0][:1], *ours[1:], grad_scale=ONE.cuda(), **rule)
  with pytest.raises(KernelError, match="need one shape and one dtype"):
    muon(ours[0], [g.half() for g in ours[1]], *ours[2:], grad_scale=ONE.cuda(), **rule)
  with pytest.raises(KernelError, match="multiples of 8"):
    muon(*muon_state((2, 64, 12), BF16, FP32, FP32), grad_scale=ONE.cuda(), **rule)
