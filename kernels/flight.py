"""What quantization costs an operand: noise, saturation and underflow, expert by expert.

Sums first, ratios last: the sums of several operands (micro-batches, experts) add up. Plain
PyTorch on any device, without host synchronisation. With x the operand, after its rotation if the
recipe rotates it, and x' what the stored data stand for:

  signal     Σ x²                  noise      Σ (x - x')²
  elements   x ≠ 0                 saturated  |x| > (1 + 2^-16) · the block's largest value
  blocks     with a non-zero x     lost       of these, the scale fell below its format

Elements of a lost block are zero in nvfp4, so they are noise and not saturated. Zeros count
nowhere: an expert's rows may be padded with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.formats import E2M1, E4M3, BlockScaled, block_amax, decode, decode_e8m0, rotate, spread
from kernels.ops import Operand

SUMS = ("signal", "noise", "elements", "saturated", "blocks", "lost")
ROUNDING = 1 + 2.0**-16  # of the largest value: saturation is more than a rounded scale


class Flight(NamedTuple):
  """How well an operand survives quantization."""

  sqnr_db: float  # 10 log10(signal / noise); inf without noise, NaN without signal
  saturated: float  # share of the non-zero elements
  underflow: float  # share of the blocks that hold a non-zero element


def flight_sums(operand: Operand) -> Tensor:
  """fp64 [E, 6], the `SUMS` of each expert's part of an operand."""
  q = operand.quantized
  x = operand.x.float()
  if operand.hadamard is not None:
    x = rotate(x, operand.hadamard, q.axis)
  amax = block_amax(x, q.block)
  limit, below = _limit(q, amax)
  over = x.abs() > spread(torch.where(limit > 0, limit, torch.inf), q.block, x.shape)
  noise = (x - q.dequantize()).square()
  elements = (_by_expert(v, operand.offset_E1, 1) for v in (x.square(), noise, x != 0, over))
  blocks = (_by_expert(v, operand.offset_E1, q.block[0]) for v in (amax != 0, below & (amax > 0)))
  return torch.stack([*elements, *blocks], -1)


def flight(sums: Sequence[float]) -> Flight:
  """The ratios of one row of sums."""
  signal, noise, elements, saturated, blocks, lost = sums
  sqnr = math.nan if signal == 0 else math.inf
  if noise != 0:
    sqnr = 10 * math.log10(signal / noise)
  return Flight(sqnr, saturated / max(elements, 1), lost / max(blocks, 1))


def _limit(q: BlockScaled, amax: Tensor) -> tuple[Tensor, Tensor]:
  """Of each block: the magnitude that saturates, and whether the scale fell below its format."""
  if q.format == "fp8":
    smallest = torch.full_like(amax, 2.0**-127)
    return E4M3.largest * decode_e8m0(q.scale) * ROUNDING, amax / E4M3.largest < smallest
  step = decode(q.scale.view(torch.uint8), E4M3)
  return E2M1.largest * step * q.tensor_scale * ROUNDING, step == 0


def _by_expert(x: Tensor, offset_E1: Sequence[int] | Tensor | None, rows: int) -> Tensor:
  """fp64 [E]: sums of weights [E, ...], or of rows that each stand for `rows` rows of the operand.

  Rows beyond the last offset belong to nobody.
  """
  if offset_E1 is None:
    return x.flatten(1).sum(1, dtype=torch.float64)
  offset_E1 = torch.as_tensor(offset_E1, device=x.device)
  first = torch.arange(x.shape[0], device=x.device, dtype=offset_E1.dtype) * rows
  expert = torch.searchsorted(offset_E1[1:].contiguous(), first, right=True)
  sums = x.new_zeros(offset_E1.shape[0], dtype=torch.float64)
  return sums.index_add_(0, expert, x.sum(1, dtype=torch.float64))[:-1]
