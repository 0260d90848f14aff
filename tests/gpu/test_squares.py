import itertools

import pytest
import torch

from gpu.oracle import normal, raw_bytes
from kernels.cuda.quantization import quantize_operand
from kernels.cuda.squares import write_squares
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu
ONE = torch.ones(1)


def operands(w):
  """Of a weight and its transpose, with other bits in all of their places."""
  made = [quantize_operand(side, "nvfp4", square=True) for side in (w, w.mT)]
  for part in itertools.chain(*map(raw_bytes, made)):
    part.fill_(0x55)
  return made


@pytest.mark.parametrize(
  "shape", [(32, 32), (128, 128), (2, 160, 224), (3, 2, 288, 64), (1, 96, 1408), (4, 2816, 2048)]
)
@pytest.mark.parametrize("range", ["wide", "narrow"])
def test_equal_to_the_quantizer_bit_for_bit(shape, range):
  """Magnitudes over more octaves than a square's scale can tell apart, and of one octave."""
  torch.manual_seed(0)
  w = normal(*shape, grad=False)
  if range == "wide":
    w = w * torch.exp2(torch.randint(-40, 40, shape, device="cuda")).bfloat16()
  w[..., :16, 16:32] = 0
  found = operands(w)
  amax = w.abs().max().float().view(1)
  write_squares(w, amax, ONE.cuda(), found)
  for one, side in zip(found, (w, w.mT), strict=True):
    want = quantize_operand(side, "nvfp4", square=True)
    for a, b in zip(raw_bytes(one), raw_bytes(want), strict=True):
      assert torch.equal(a, b)


def test_nothing_is_written_under_a_scale_that_is_no_number():
  w = normal(64, 96, grad=False)
  found = operands(w)
  write_squares(w, ONE.cuda(), ONE.cuda() * torch.nan, found)
  assert all((part == 0x55).all() for part in itertools.chain(*map(raw_bytes, found)))


def test_other_sides_and_dtypes_are_refused():
  for w in (normal(64, 48, grad=False), normal(64, 64, grad=False).float()):
    with pytest.raises(KernelError, match="multiples of 32"):
      write_squares(w, ONE.cuda(), ONE.cuda(), [])
