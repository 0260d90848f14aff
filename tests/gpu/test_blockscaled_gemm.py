import pytest
import torch

from gpu.oracle import grads, normal, relative
from kernels.cuda.experts import grouped_mlp
from kernels.cuda.jit import ARCH
from kernels.ops import Recipe

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(not ARCH.block_scaled, reason="needs block-scaled tensor cores (sm_100a)"),
]


@pytest.mark.parametrize("name, most", [("fp8", 0.02), ("nvfp4", 0.05)])
@pytest.mark.parametrize("counts, rows", [([300, 0, 129, 71], 512), ([128, 256], 384)])
def test_tensor_cores_follow_the_emulation(name, most, counts, rows):
  """SwiGLU of the fp32 sums, not of the rounded ones, can fall into a neighbouring code."""
  torch.manual_seed(0)
  ends = torch.tensor(counts).cumsum(0).tolist()
  offset_E1 = torch.tensor([0, *ends], dtype=torch.int32).cuda()
  x, w13 = normal(rows, 256), normal(len(counts), 256, 256, scale=256**-0.5)
  w2, dy = normal(len(counts), 256, 128, scale=128**-0.5), normal(rows, 256, grad=False)

  def run(emulate):
    recipe = Recipe(name, emulate=emulate, seed=3)
    return grads(lambda *a: grouped_mlp(a[0], offset_E1, *a[1:], recipe), [x, w13, w2], [dy])

  errors = [relative(a, b) for a, b in zip(run(False), run(True), strict=True)]
  assert max(errors) <= most, errors
