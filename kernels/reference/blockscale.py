"""Quantizing to the block-scaled formats of kernels.formats, each operation as they define it.

Stochastic rounding (E2M1 only): with f the fraction of q before rounding and
r = random_bits(seed, i) >> 8, q is rounded up if r · 2^-24 < f; i is the element's row-major index
in the tensor given to `quantize`. The mean is exact to 2^-24, but for elements that saturate
because `scale` was rounded down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats import (
  E2M1,
  E4M3,
  HADAMARD,
  MASK,
  NVFP4_LARGEST,
  BlockScaled,
  Minifloat,
  block_amax,
  decode,
  derive,
  divide,
  rotate,
  scale_e8m0,
  spread,
)
from kernels.ops import check
from kernels.sizes import BLOCK


def quantize(
  x: Tensor,
  format: str,
  *,
  axis: int = -1,
  tensor_amax: Tensor | None = None,
  square: bool = False,
  seed: int | None = None,
  hadamard: int | None = None,
) -> BlockScaled:
  """Block-scale x [..., R, C] in fp32 along axis -1 or -2; the last block may be partial.

  nvfp4 only: tensor_amax is the tensor's largest magnitude, fp32 0-d (default: x's own); `square`
  takes blocks of 16 x 16, for products along either dimension; `seed` rounds stochastically.
  hadamard is the seed of a rotation (`rotate`) of x before all else; axis then divides by 16.
  """
  _check(x, format, axis, square, seed, hadamard)
  x = x.float()
  if hadamard is not None:
    x = rotate(x, hadamard, axis)
  block = _block(format, axis, square)
  amax = block_amax(x, block)
  if format == "fp8":
    scale = scale_e8m0(amax)
    factor = _power_of_two(127 - _finite(scale, 0xFF, 127))
    data = encode(x * spread(factor, block, x.shape), E4M3)
    data, scale = data.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)
    return BlockScaled(format, data, scale, None, axis, block)
  tensor_scale, factor, scale = _scale_nvfp4(amax, tensor_amax)
  scaled = x * spread(factor, block, x.shape)
  data = encode(scaled, E2M1, None if seed is None else random_bits(seed, x.shape, x.device))
  scale = scale.view(torch.float8_e4m3fn)
  return BlockScaled(format, pack(data, axis), scale, tensor_scale, axis, block)


def _check(
  x: Tensor, format: str, axis: int, square: bool, seed: int | None, hadamard: int | None
) -> None:
  check(format in BLOCK, f'quantize: format {format!r} is unknown; use "fp8" or "nvfp4"')
  check(axis in (-1, -2), f"quantize: axis {axis} must be -1 or -2")
  check(x.ndim >= 2, f"quantize: x {tuple(x.shape)} needs two dimensions at least")
  check(
    format == "nvfp4" or not (square or seed is not None),
    "quantize: square blocks and stochastic rounding are for nvfp4 only",
  )
  length = x.shape[axis]
  if format == "nvfp4":
    check(
      length % 2 == 0, f"quantize: nvfp4 packs pairs, axis {axis} has {length} elements; need even"
    )
  if hadamard is not None:
    check(
      length % HADAMARD == 0,
      f"quantize: axis {axis} has {length} elements; a rotation needs a multiple of {HADAMARD}",
    )
  if seed is not None:
    check(x.numel() <= MASK, f"quantize: {x.numel()} elements exceed the 2^32 - 1 random counters")


def encode(x: Tensor, kind: Minifloat, random: Tensor | None = None) -> Tensor:
  """fp32 -> uint8 codes, to nearest even or (E2M1), with uint32 `random` bits, stochastically."""
  if kind is E4M3:
    return x.clamp(-kind.largest, kind.largest).to(torch.float8_e4m3fn).view(torch.uint8)
  x = x.nan_to_num(nan=kind.largest).clamp_(-kind.largest, kind.largest)
  bits = x.view(torch.int32)
  octave = ((bits >> 23) & 0xFF).sub_(127).clamp_(min=kind.exponent)
  q = (x * _power_of_two(kind.mantissa - octave)).abs_()
  code = octave.sub_(kind.exponent) << kind.mantissa
  if random is None:
    code += q.round_().int()
  else:
    floor = q.floor()
    code += floor.int()
    code += ((random >> 8).float().mul_(2.0**-24) < q.sub_(floor)).int()
  return (code | ((bits >> 28) & kind.sign)).to(torch.uint8)


def pack(code: Tensor, axis: int) -> Tensor:
  """Two 4-bit codes per byte along axis -1 or -2: 2i in the low nibble, 2i + 1 in the high."""
  low, high = code.unflatten(axis, (code.shape[axis] // 2, 2)).unbind(axis)
  return low | (high << 4)


def _scale_nvfp4(amax: Tensor, tensor_amax: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
  """(tensor_scale, what the elements are multiplied by, E4M3 codes of the blocks' scales)."""
  if tensor_amax is None:
    tensor_amax = amax.max() if amax.numel() else amax.new_zeros(())
  encode_scale = divide(NVFP4_LARGEST, tensor_amax.float())
  usable = encode_scale.isfinite() & (encode_scale > 0)
  encode_scale = torch.where(usable, encode_scale, 1.0)
  tensor_scale = divide(1.0, encode_scale)
  scale = encode(divide(amax, E2M1.largest) * encode_scale, E4M3)
  scale = torch.where(amax.isfinite(), scale, 0x7F)
  step = decode(scale, E4M3)
  factor = divide(1.0, step * tensor_scale).clamp(max=torch.finfo(torch.float32).max)
  factor = torch.where(step > 0, factor, 0.0)
  return tensor_scale, torch.where(step.isnan(), 1.0, factor), scale


def _block(format: str, axis: int, square: bool) -> tuple[int, int]:
  """Rows and columns under one scale."""
  size = BLOCK[format]
  return (size, size) if square else (1, size) if axis == -1 else (size, 1)


def _power_of_two(exponent: Tensor) -> Tensor:
  """2^exponent in fp32 for int32 exponents in [-126, 127]."""
  return ((exponent + 127) << 23).view(torch.float32)


def _finite(code: Tensor, nan: int, other: int) -> Tensor:
  return torch.where(code == nan, other, code.int())


def _mix(h: Tensor) -> Tensor:
  """`mix` in place on the bits of an int32 tensor, whose products wrap."""
  h.bitwise_xor_((h >> 16) & 0xFFFF).mul_(0x7FEB352D)
  h.bitwise_xor_((h >> 15) & 0x1FFFF).mul_(_signed(0x846CA68B))
  return h.bitwise_xor_((h >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
  """uint32 -> the int32 of the same bits."""
  return bits - ((bits >> 31) << 32)


def random_bits(seed: int, shape: torch.Size, device: torch.device) -> Tensor:
  """uint32 bits (as int64) of element i, row-major: mix((mix(i ^ k0) + k1) mod 2^32).

  k0 = derive(seed), k1 = derive(seed, 1): 32-bit integer arithmetic on (seed, i) alone.
  """
  index = torch.arange(shape.numel(), dtype=torch.int64, device=device).int()
  index.bitwise_xor_(_signed(derive(seed)))
  return (_mix(_mix(index).add_(_signed(derive(seed, 1)))).long() & MASK).view(shape)
