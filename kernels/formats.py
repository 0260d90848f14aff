"""Block-scaled formats: MXFP8 and NVFP4, exact to their definitions.

An element of a block is stored as data · scale (· tensor_scale):

  fp8    data E4M3, scale E8M0 per 32 elements along an axis (MXFP8; OCP MX v1.0, arXiv 2506.08027).
         scale = 2^ceil(log2(amax / 448)), so no element saturates; an all-zero block has 2^-127.
  nvfp4  data E2M1, scale E4M3 per 16 elements along an axis or per 16 x 16 elements, and one fp32
         scale per tensor (arXiv 2509.25149). In fp32, each operation rounded once, to nearest:
           encode = 2688 / tensor_amax        (1 if that is not finite, 0, or tensor_amax is 0)
           tensor_scale = 1 / encode
           scale = E4M3(amax / 6 · encode)
           data = E2M1(x · min(1 / (scale · tensor_scale), largest fp32))
         Where scale rounds to 0 the block's data are ±0.

Elements are ±q · 2^(e - m) with q < 2^(m + 1). E4M3: m 3, e from -6, at most 448, NaN 0x7F and
0xFF, no infinity. E2M1: m 1, e from 0, at most 6, neither NaN nor infinity. Rounding is to nearest,
ties to even, saturating; zero keeps its sign. E8M0 is 2^(code - 127); 255 is NaN.

A block with a NaN or an infinity gets a NaN scale, so that all of it dequantizes to NaN and the
check for non-finite values sees it. Its data are the elements' own codes (a NaN is 6 in E2M1).

Rows that are quantized each by itself (`quantize_rows`) have in NVFP4 a power of two of their own
in place of the tensor's scale:
  row_scale = 2^ceil(log2(row's amax / 2688)), at least 2^-123  (1 if the amax is not finite)
and x / row_scale is quantized under a tensor's scale of 1. Since E2M1 · E4M3 has 6 significant bits
and no digit below 2^-10, what they dequantize to is exact in bf16: infinite only in a block with a
magnitude above 1.96875 · 2^127.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASK = 0xFFFFFFFF
HADAMARD = 16  # elements that one random rotation mixes
SMALLEST_ROW_SCALE = 127 - 123  # as an E8M0 code: 2^-10 of it is bf16's smallest number


class Minifloat(NamedTuple):
  mantissa: int  # bits
  exponent: int  # of the smallest normal number
  largest: float

  @property
  def sign(self) -> int:
    """The code's sign bit."""
    return 0x80 if self is E4M3 else 0x08


E4M3 = Minifloat(3, -6, 448.0)
E2M1 = Minifloat(1, 0, 6.0)
NVFP4_LARGEST = E2M1.largest * E4M3.largest  # 2688, of a number over its tensor's scale


@dataclass(frozen=True)
class BlockScaled:
  """A quantized tensor [..., R, C]. Scales are row-major, in no tensor core's layout."""

  format: str  # "fp8" or "nvfp4"
  data: Tensor  # fp8: float8_e4m3fn [..., R, C]; nvfp4: uint8 pairs along axis, low nibble first
  scale: Tensor  # float8_e8m0fnu or float8_e4m3fn [..., ⌈R / block[0]⌉, ⌈C / block[1]⌉]
  tensor_scale: Tensor | None  # nvfp4: fp32 0-d, or [..., R, 1] of quantize_rows
  axis: int  # -1 or -2, the dimension that a product sums over
  block: tuple[int, int]  # rows and columns under one scale

  def values(self, dtype: torch.dtype) -> Tensor:
    """data · scale without the tensor's scale: exact in fp32, and in bf16 above 2^-126."""
    if self.format == "fp8":
      data, scale = decode(self.data.view(torch.uint8), E4M3), decode_e8m0(self.scale)
    else:
      codes = unpack(self.data, self.axis)
      data, scale = decode(codes, E2M1), decode(self.scale.view(torch.uint8), E4M3)
    return data.mul_(spread(scale, self.block, data.shape)).to(dtype)

  def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the data stand for (of the rotated tensor, if it was rotated)."""
    values = self.values(torch.float32)
    if self.tensor_scale is not None:
      values = values * self.tensor_scale
    return values.to(dtype)


def quantize_rows(x: Tensor, format: str, quantize: Callable) -> BlockScaled:
  """Block-scale x [..., R, C] along C, every row as if it were alone, to nearest.

  fp8 is that of `quantize`, an implementation's (kernels.ops.Ops.quantize); nvfp4's tensor_scale is
  [..., R, 1].
  """
  if format == "fp8":
    return quantize(x, format)
  scale = row_scale(x)  # the quotients are exact in x's dtype, but for some that are 0 in E2M1
  largest = scale.new_full((), NVFP4_LARGEST)
  return replace(quantize(x / scale.to(x.dtype), format, tensor_amax=largest), tensor_scale=scale)


def row_scale(x: Tensor) -> Tensor:
  """fp32 [..., R, 1]: the power of two that is an NVFP4 row's scale."""
  amax = x.abs().amax(-1).float()
  code = scale_e8m0(divide(amax, E2M1.largest)).clamp(min=SMALLEST_ROW_SCALE)
  return torch.where(amax.isfinite(), decode_e8m0(code), 1.0)[..., None]


def decode(code: Tensor, kind: Minifloat) -> Tensor:
  """uint8 codes -> fp32, exact."""
  if kind is E4M3:
    return code.view(torch.float8_e4m3fn).float()
  half = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
  table = torch.tensor([*half, *(-value for value in half)], device=code.device)
  return table.index_select(0, code.flatten().int()).view(code.shape)


def unpack(data: Tensor, axis: int) -> Tensor:
  """The inverse of `pack`."""
  return torch.stack([data & 0xF, data >> 4], axis).flatten(axis - 1, axis)


def scale_e8m0(amax: Tensor) -> Tensor:
  """uint8 codes of 2^ceil(log2(amax / 448)), at least 2^-127; NaN if amax is not finite."""
  bits = divide(amax, E4M3.largest).view(torch.int32)
  exponent, mantissa = bits >> 23, bits & 0x7FFFFF
  exact = torch.where(exponent == 0, mantissa <= 0x400000, mantissa == 0)
  return torch.where(amax.isfinite(), exponent + ~exact, 0xFF).to(torch.uint8)


def decode_e8m0(scale: Tensor) -> Tensor:
  """float8_e8m0fnu (or its uint8 codes) -> fp32."""
  code = scale.view(torch.uint8).int()
  value = torch.where(code == 0, 2.0**-127, (code << 23).view(torch.float32))
  return torch.where(code == 0xFF, torch.nan, value)


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
  """a / b rounded once: with a number on either side torch may multiply by a rounded reciprocal."""
  if isinstance(a, float):
    return torch.full_like(b, a).div(b)
  return a.div(torch.full_like(a, b))


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
  """The largest magnitude of each block of x [..., R, C]; NaN if it holds one."""
  rows, columns = (-n % b for n, b in zip(x.shape[-2:], block, strict=True))
  x = F.pad(x, (0, columns, 0, rows))
  grid = x.unflatten(-1, (x.shape[-1] // block[1], block[1]))
  grid = grid.unflatten(-3, (x.shape[-2] // block[0], block[0]))
  return grid.abs().amax((-3, -1))


def spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
  """One value per block -> one per element of a tensor of this shape."""
  for dim, size in zip((-2, -1), block, strict=True):
    if size > 1:
      scale = scale.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
  return scale


def mix(h: int) -> int:
  """A bijection of uint32: xor-shift, multiply, twice."""
  h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK
  h = ((h ^ (h >> 15)) * 0x846CA68B) & MASK
  return h ^ (h >> 16)


def derive(*parts: int) -> int:
  """A uint32 from integers: from h = 0, h = mix((h + 0x9E3779B9) ^ part) mod 2^32 for each."""
  h = 0
  for part in parts:
    h = mix(((h + 0x9E3779B9) & MASK) ^ (part & MASK))
  return h


def signs(seed: int) -> list[float]:
  """The rotation's 16 signs: -1 where the top bit of derive(seed, i) is set."""
  return [-1.0 if derive(seed, i) >> 31 else 1.0 for i in range(HADAMARD)]


def rotate(x: Tensor, seed: int, axis: int) -> Tensor:
  """x · diag(signs) · H_16 / 4 in groups of 16 along axis, fp32 (arXiv 2509.25149 section 4).

  H_16 is Sylvester's: butterflies (a + b, a - b) over distances 1, 2, 4, 8, in this order.
  """
  axis = axis % x.ndim
  diagonal = torch.tensor(signs(seed), device=x.device)
  groups = x.unflatten(axis, (x.shape[axis] // HADAMARD, HADAMARD)).movedim(axis + 1, -1) * diagonal
  for distance in (1, 2, 4, 8):
    a, b = groups.unflatten(-1, (HADAMARD // (2 * distance), 2, distance)).unbind(-2)
    groups = torch.stack([a + b, a - b], -2).flatten(-3)
  return (groups * 0.25).movedim(-1, axis + 1).flatten(axis, axis + 1).contiguous()
