import pytest
import torch

from gpu.oracle import fp32_grads, grads, normal, relative
from kernels.cuda.experts import grouped_mlp
from kernels.cuda.jit import ARCH
from kernels.ops import Recipe

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(not ARCH.block_scaled, reason="needs block-scaled tensor cores (sm_100a)"),
]


def case(counts, rows):
  torch.manual_seed(0)
  ends = torch.tensor(counts).cumsum(0).tolist()
  offset_E1 = torch.tensor([0, *ends], dtype=torch.int32).cuda()
  x, w13 = normal(rows, 256), normal(len(counts), 256, 256, scale=256**-0.5)
  w2, dy = normal(len(counts), 256, 128, scale=128**-0.5), normal(rows, 256, grad=False)
  return offset_E1, [x, w13, w2], dy


@pytest.mark.parametrize("name, most", [("fp8", 0.02), ("nvfp4", 0.05)])
@pytest.mark.parametrize("counts, rows", [([300, 0, 129, 71], 512), ([128, 256], 384)])
def test_tensor_cores_follow_the_emulation(name, most, counts, rows):
  """SwiGLU of the fp32 sums, not of the rounded ones, can fall into a neighbouring code."""
  offset_E1, inputs, dy = case(counts, rows)

  def run(emulate):
    recipe = Recipe(name, emulate=emulate, seed=3)
    return grads(lambda *a: grouped_mlp(a[0], offset_E1, *a[1:], recipe), inputs, [dy])

  errors = [relative(a, b) for a, b in zip(run(False), run(True), strict=True)]
  assert max(errors) <= most, errors


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_fp32_gradients_are_not_rounded_and_are_added_in_place(name):
  offset_E1, inputs, dy = case([300, 0, 129, 71], 512)
  recipe = Recipe(name, seed=3)

  def run(x, w13, w2):
    return grouped_mlp(x, offset_E1, w13, w2, recipe)

  rounded = grads(run, inputs, [dy])[-2:]
  once, twice = (fp32_grads(run, inputs, [dy], inputs[1:], calls) for calls in (1, 2))
  for in_bf16, dw, two in zip(rounded, once, twice, strict=True):
    assert torch.equal(dw.bfloat16(), in_bf16) and not torch.equal(dw, in_bf16.float())
    assert torch.equal(two, dw + dw)
