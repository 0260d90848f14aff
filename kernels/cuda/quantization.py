"""Block-scale quantization: what a tensor may be, what is allocated, which kernel runs.

The kernels, the layout of blocked scales and the bytes moved are kernels.cuda.blockscale's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cuda.blockscale import (
  ATOM_BLOCKS,
  ATOM_ROWS,
  WIDTH,
  Mode,
  Randomness,
  compile_quantize,
)
from kernels.cuda.jit import DTYPES, check_device, contiguous
from kernels.formats import BlockScaled, derive, signs
from kernels.ops import check
from kernels.sizes import BLOCK


class Operand(NamedTuple):
  """A quantized operand of a tensor-core product."""

  data: Tensor  # as BlockScaled.data
  scale: Tensor  # [L, row tiles, block tiles, 32, 4, 4] in the 128 x 4 layout; L is 1 with offsets
  tensor_scale: Tensor | None  # nvfp4: fp32 0-d


@dataclass(frozen=True)
class Quantization:
  """How a tensor is quantized (kernels.ops.Ops.quantize), and the layout of its scales."""

  format: str
  axis: int = -1
  square: bool = False
  seed: int | None = None
  hadamard: int | None = None
  blocked: bool = False  # scales as tensor cores read them

  @property
  def block(self) -> tuple[int, int]:
    """Rows and columns under one scale."""
    size = BLOCK[self.format]
    return (size, size) if self.square else (1, size) if self.axis == -1 else (size, 1)

  def check(self, x: Tensor, offset_E1: Tensor | None) -> None:
    """KernelError unless x can be quantized so."""
    check_device(x.device)
    check(
      self.format in BLOCK, f'quantize: format {self.format!r} is unknown; use "fp8" or "nvfp4"'
    )
    check(self.axis in (-1, -2), f"quantize: axis {self.axis} must be -1 or -2")
    check(x.dtype in DTYPES, f"quantize: x is {x.dtype}; use torch.bfloat16 or torch.float32")
    check(x.ndim >= 2, f"quantize: x {tuple(x.shape)} needs two dimensions at least")
    check(
      x.shape[-1] % WIDTH == 0, f"quantize: rows of {x.shape[-1]} elements; need a multiple of 8"
    )
    check(
      self.format == "nvfp4" or not (self.square or self.seed is not None),
      "quantize: square blocks and stochastic rounding are for nvfp4 only",
    )
    length = x.shape[self.axis]
    pack = 16 if self.hadamard is not None else 2 if self.format == "nvfp4" else 1
    check(
      length % pack == 0,
      f"quantize: axis {self.axis} has {length} elements; need a multiple of {pack}",
    )
    check(not self.square or self.hadamard is None, "quantize: square blocks are not rotated")
    check(
      self.seed is None or x.numel() < 2**32,
      f"quantize: {x.numel()} elements exceed the 2^32 - 1 random counters",
    )
    check(
      offset_E1 is None or (offset_E1.dtype == torch.int32 and self.axis == -1 and x.ndim == 2),
      "quantize: expert offsets must be int32, and go with axis -1 of a matrix",
    )

  def mode(self, x: Tensor, *, grouped: bool) -> Mode:
    return Mode(
      dtype=x.dtype,
      format=self.format,
      columns=x.shape[-1],
      square=self.square,
      stochastic=self.seed is not None,
      hadamard=self.hadamard is not None,
      amax_only=False,
      blocked=self.blocked,
      grouped=grouped,
    )

  def randomness(self) -> Randomness:
    seed, rotation = self.seed, self.hadamard
    keys = (0, 0) if seed is None else (derive(seed), derive(seed, 1))
    bits = 0 if rotation is None else sum((s < 0) << i for i, s in enumerate(signs(rotation)))
    return Randomness(*keys, bits)

  def scale_shape(self, x: Tensor, offset_E1: Tensor | None) -> tuple[int, ...]:
    rows, columns = x.shape[-2:]
    if not self.blocked:
      return (*x.shape[:-2], -(-rows // self.block[0]), -(-columns // self.block[1]))
    rows, length = (rows, columns) if self.axis == -1 else (columns, rows)
    tiles, batch = -(-rows // ATOM_ROWS), x.shape[:-2].numel()
    if offset_E1 is not None:
      tiles += offset_E1.numel() - 2
    return (batch, tiles, -(-length // (BLOCK[self.format] * ATOM_BLOCKS)), 32, 4, 4)

  def data_shape(self, x: Tensor) -> list[int]:
    """In bytes: NVFP4 packs pairs along the axis."""
    shape = list(x.shape)
    shape[self.axis] //= 2 if self.format == "nvfp4" else 1
    return shape

  def __call__(
    self, x: Tensor, tensor_amax: Tensor | None = None, offset_E1: Tensor | None = None
  ) -> Operand:
    """Quantize x [..., R, C]; with offset_E1 its rows are sorted by expert (`quantize_operand`)."""
    self.check(x, offset_E1)
    x = x.detach().contiguous()
    contiguous(x=x)
    nv = self.format == "nvfp4"
    if nv and tensor_amax is None:
      tensor_amax = self._amax(x, offset_E1)
    data = x.new_empty(self.data_shape(x), dtype=torch.uint8)
    new = x.new_zeros if self.blocked and self.axis == -2 else x.new_empty
    scale = new(self.scale_shape(x, offset_E1), dtype=torch.uint8)
    tensor_scale = x.new_ones(1, dtype=torch.float32) if nv else None
    if x.numel():
      amax = tensor_amax.reshape(1).float() if nv else None
      run = compile_quantize(self.mode(x, grouped=offset_E1 is not None), self.axis)
      flat, rows = x.view(-1, x.shape[-1]), x.shape[-2]
      outputs = data.view(-1), scale.view(-1), amax, tensor_scale
      run(flat, *outputs, offset_E1, rows, self.randomness())
    data = data if nv else data.view(torch.float8_e4m3fn)
    scale = scale.view(torch.float8_e4m3fn if nv else torch.float8_e8m0fnu)
    return Operand(data, scale, tensor_scale.view(()) if nv else None)

  def _amax(self, x: Tensor, offset_E1: Tensor | None) -> Tensor:
    """The largest magnitude of x, after its rotation: fp32 [1]."""
    amax = x.new_zeros(1, dtype=torch.float32)
    if x.numel():
      mode = self.mode(x, grouped=offset_E1 is not None)
      mode = mode._replace(amax_only=True, stochastic=False, blocked=False)
      flat, bits = x.view(-1, x.shape[-1]), amax.view(torch.int32)
      run = compile_quantize(mode, self.axis)
      run(flat, None, None, bits, None, offset_E1, x.shape[-2], self.randomness())
    return amax


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
  """See kernels.reference.blockscale.quantize: the same bits. x bf16 or fp32, whole rows of 8."""
  how = Quantization(format, axis, square, seed, hadamard)
  out = how(x, tensor_amax)
  return BlockScaled(format, *out, axis, how.block)


def quantize_operand(
  x: Tensor,
  format: str,
  *,
  axis: int = -1,
  tensor_amax: Tensor | None = None,
  square: bool = False,
  seed: int | None = None,
  hadamard: int | None = None,
  offset_E1: Tensor | None = None,
) -> Operand:
  """`quantize` with the scales in the tensor cores' layout; `axis` is the dimension that is summed.

  With offset_E1 the rows of x are sorted by expert and each expert's scales begin a new row tile.
  A square block's scale is repeated for each of its rows.
  """
  return Quantization(format, axis, square, seed, hadamard, blocked=True)(x, tensor_amax, offset_E1)
