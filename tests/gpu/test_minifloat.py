"""Every bf16 number through both formats' arithmetic."""

import pytest
import torch

from gpu.test_blockscale import FP8, NVFP4, assert_bits
from kernels.cuda.quantization import quantize
from kernels.reference import blockscale as reference

pytestmark = pytest.mark.gpu


def every_bf16():
  """All finite bf16 numbers, neighbours in one block: [255, 256]."""
  x = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
  return x[x.isfinite()].sort().values.view(255, 256)


@pytest.mark.parametrize("format,options", [(FP8, {}), (NVFP4, {}), (NVFP4, dict(seed=11))])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_number(format, options, shuffled):
  x = every_bf16()
  if shuffled:
    x = x.flatten()[torch.randperm(x.numel())].view_as(x)
  assert_bits(quantize(x.cuda(), format, **options), reference.quantize(x, format, **options))


@pytest.mark.parametrize("amax", [6.0, 1e-3, 1e4])
def test_every_number_under_one_scale(amax):
  x, amax = every_bf16(), torch.tensor(amax)
  ours = quantize(x.cuda(), NVFP4, tensor_amax=amax.cuda())
  assert_bits(ours, reference.quantize(x, NVFP4, tensor_amax=amax))
