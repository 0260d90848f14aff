import pytest
import torch

from kernels.cuda.quantization import quantize, quantize_operand
from kernels.ops import KernelError
from kernels.reference import blockscale as reference

pytestmark = pytest.mark.gpu

FP8, NVFP4 = "fp8", "nvfp4"
RECIPES = [
  (FP8, {}),
  (FP8, dict(axis=-2)),
  (FP8, dict(hadamard=3)),
  (FP8, dict(axis=-2, hadamard=3)),
  (NVFP4, {}),
  (NVFP4, dict(axis=-2)),
  (NVFP4, dict(square=True)),
  (NVFP4, dict(square=True, axis=-2)),
  (NVFP4, dict(seed=7)),
  (NVFP4, dict(axis=-2, seed=7)),
  (NVFP4, dict(seed=7, hadamard=5)),
  (NVFP4, dict(axis=-2, seed=7, hadamard=5)),
]


def samples(*shape, dtype=torch.bfloat16):
  """Magnitudes over 60 binades, zeros, ties of both formats, subnormals and a block of zeros."""
  x = torch.randn(shape) * torch.exp2(torch.randint(-40, 20, shape).float())
  ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 448.0, 17.0, 19.0, 1e-40, -0.0])
  pick = torch.randint(len(ties), shape)
  x = torch.where(torch.rand(shape) < 0.3, ties[pick] * torch.randn(shape).sign(), x)
  x[..., :32, :32] = 0.0
  return x.to(dtype)


def assert_bits(ours, exact):
  for name in ("data", "scale", "tensor_scale"):
    a, b = getattr(ours, name), getattr(exact, name)
    assert (a is None) == (b is None)
    if a is not None:
      assert a.dtype == b.dtype and a.shape == b.shape, name
      if a.dtype != torch.float32:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
      different = (a.cpu() != b).sum()
      assert different == 0, f"{name}: {different} of {b.numel()} differ"
  assert (ours.axis, ours.block, ours.format) == (exact.axis, exact.block, exact.format)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(2, 176, 480), (1008, 480)])
def test_bits_equal_the_reference(recipe, shape):
  format, options = recipe
  x = samples(*shape)
  assert_bits(quantize(x.cuda(), format, **options), reference.quantize(x, format, **options))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "hadamard" not in r[1]])
def test_partial_blocks(recipe):
  format, options = recipe
  x = samples(2, 70, 104)
  assert_bits(quantize(x.cuda(), format, **options), reference.quantize(x, format, **options))


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp32_input(recipe):
  format, options = recipe
  x = samples(64, 96, dtype=torch.float32)
  assert_bits(quantize(x.cuda(), format, **options), reference.quantize(x, format, **options))


@pytest.mark.parametrize("amax", [0.0, 1.0, 3e38, torch.inf, torch.nan, 1e-42])
def test_given_amax(amax):
  x, amax = samples(64, 480), torch.tensor(amax)
  ours = quantize(x.cuda(), NVFP4, tensor_amax=amax.cuda())
  assert_bits(ours, reference.quantize(x, NVFP4, tensor_amax=amax))


@pytest.mark.parametrize("format", [FP8, NVFP4])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_blocks_become_nan(format, axis, bad):
  x = torch.randn(64, 480).bfloat16()
  x[5, 7] = bad
  ours = quantize(x.cuda(), format, axis=axis)
  assert_bits(ours, reference.quantize(x, format, axis=axis))
  assert ours.dequantize()[5, 7].isnan()


def blocked(scale):
  """Plain scales [L, rows, blocks] in the 128 x 4 layout, by the rule's indices."""
  batch, rows, blocks = scale.shape
  tiles, across = -(-rows // 128), -(-blocks // 4)
  out = torch.zeros(batch, tiles, across, 32, 4, 4, dtype=torch.uint8)
  r, b = torch.arange(rows)[:, None], torch.arange(blocks)
  out[:, r // 128, b // 4, r % 32, r // 32 % 4, b % 4] = scale.view(torch.uint8)
  return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_blocked_scales(recipe):
  format, options = recipe
  x = samples(2, 176, 480)
  ours, plain = (f(x.cuda(), format, **options) for f in (quantize_operand, quantize))
  scale = plain.scale.cpu().view(torch.uint8)
  if options.get("square"):
    scale = scale.repeat_interleave(16, -2 if options.get("axis", -1) == -1 else -1)
  if options.get("axis", -1) == -2:
    scale = scale.mT
  assert torch.equal(ours.scale.cpu().view(torch.uint8), blocked(scale))
  assert torch.equal(ours.data.view(torch.uint8), plain.data.view(torch.uint8))


@pytest.mark.parametrize("format", [FP8, NVFP4])
def test_expert_rows_begin_new_tiles(format):
  counts = [0, 5, 128, 300, 0, 1, 77]
  offset = torch.tensor([0, *counts]).cumsum(0).int().cuda()
  x = samples(sum(counts), 480).cuda()
  ours, plain = quantize_operand(x, format, offset_E1=offset), quantize(x, format)
  scale = plain.scale.cpu().view(torch.uint8)
  tiles = -(-sum(counts) // 128) + len(counts) - 1
  assert ours.scale.shape[:2] == (1, tiles)
  found = ours.scale.cpu().view(torch.uint8)
  for e, count in enumerate(counts):
    first = int(offset[e])
    wanted = blocked(scale[None, first : first + count])[0]
    tile = first // 128 + e
    assert torch.equal(found[0, tile : tile + wanted.shape[0]], wanted), e


def test_empty():
  out = quantize(torch.empty(0, 64, device="cuda", dtype=torch.bfloat16), NVFP4)
  assert out.data.shape == (0, 32) and out.scale.shape == (0, 4)


def test_unsupported_requests_are_refused():
  x = torch.zeros(32, 20, device="cuda", dtype=torch.bfloat16)
  with pytest.raises(KernelError, match="multiple of 8"):
    quantize(x, FP8)
  with pytest.raises(KernelError, match="nvfp4 only"):
    quantize(torch.zeros(32, 32, device="cuda"), FP8, seed=1)
