"""What an observer sees of CUDA's products, against the reference's on the same tensors."""

import pytest
import torch

from gpu.oracle import normal
from kernels.cuda.experts import grouped_mlp
from kernels.flight import flight_sums
from kernels.ops import Recipe
from kernels.reference import grouped_mlp as reference

pytestmark = pytest.mark.gpu


def seen(function, tensors, offset_E1, dy, format):
  found = {}

  def observe(operand):
    found[operand.salt, operand.leg] = flight_sums(operand).cpu()

  recipe = Recipe(format, emulate=True, seed=3, draw=4, observe=observe)
  y = function(tensors[0], offset_E1, *tensors[1:], recipe)
  y.backward(dy)
  return found


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_sums_are_those_of_the_reference(format):
  torch.manual_seed(0)
  offset_E1 = torch.tensor([0, 100, 100, 133, 134], dtype=torch.int32).cuda()
  tensors = [normal(140, 128), normal(4, 128, 128, scale=0.1), normal(4, 128, 64, scale=0.1)]
  dy = normal(140, 128, grad=False)
  got = seen(grouped_mlp, tensors, offset_E1, dy, format)
  wanted = seen(reference, tensors, offset_E1, dy, format)
  assert got.keys() == wanted.keys() and len(got) == 12
  for salt, leg in (0, "fprop_x"), (0, "fprop_w"), (1, "fprop_w"), (1, "dgrad_dy"), (1, "wgrad_dy"):
    torch.testing.assert_close(got[salt, leg], wanted[salt, leg], rtol=1e-6, atol=0)
  for key, sums in got.items():  # the others come after a product, whose bf16 may differ by a bit
    torch.testing.assert_close(sums[:, 0], wanted[key][:, 0], rtol=0.01, atol=0)
    torch.testing.assert_close(sums[:, 1], wanted[key][:, 1], rtol=0.1, atol=0)
