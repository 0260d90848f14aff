"""The symmetric memory of one rank as tensors; kernels.sizes.BufferLayout says what lies where."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.ops import Layout, check
from kernels.sizes import ALIGNMENT, BufferLayout

COUNTS, DISPATCH, RETURN = 0, 1, 2  # the kinds of signals
DTYPES = {
  "uint8": torch.uint8,
  "bf16": torch.bfloat16,
  "fp32": torch.float32,
  "int32": torch.int32,
  "int64": torch.int64,
}


class Buffers(NamedTuple):
  """One rank's block as tensors. Peer p writes count[p], signal[:, p] and rows of its own."""

  count_RE: Tensor  # int32: tokens that rank r sends to expert e
  row_CD: Tensor  # received rows at their expert-sorted places, C of each slot: x forward, dy
  # backward; if they travel packed, uint8 [C, the longer one's bytes], each from its place's start
  gate_C: Tensor  # fp32: the gates of the received rows (backward)
  origin_C: Tensor  # int32: source rank · N + t·K + k of a received row, -1 where none arrived
  back_ND: Tensor  # rows that came back, by t·K + k: y forward, dx backward
  back_gate_N: Tensor  # fp32: gate gradients that came back
  signal_KRS: (
    Tensor  # int64 [3, R, SIGNAL_STRIDE]: the last trip of which rank r's writes are complete
  )


class Route(NamedTuple):
  """Where the rows of one layer's pass go, forward and backward."""

  expert_TK: Tensor  # int32, global ids
  layout: Layout  # of this rank's rows over all experts
  count_RE: Tensor  # int64: tokens that rank r sends to expert e
  base_RE: Tensor  # int64: place of rank r's first row for expert e in the owner's sorted rows


def views(layout: BufferLayout, memory: Tensor) -> Buffers:
  """The tensors of one rank's block. memory: uint8 [layout.nbytes], aligned to ALIGNMENT."""
  check(
    memory.dtype == torch.uint8 and memory.shape == (layout.nbytes,) and memory.is_contiguous(),
    f"symmetric memory is {memory.dtype} {tuple(memory.shape)}, needs uint8 ({layout.nbytes},)",
  )
  check(memory.data_ptr() % ALIGNMENT == 0, f"symmetric memory is not aligned to {ALIGNMENT}")
  parts = {
    name: memory[start : start + layout.sizes[name]] for name, start in layout.offsets.items()
  }
  return Buffers(
    **{
      name: parts[name].view(DTYPES[dtype]).view(shape)
      for name, (shape, dtype) in layout.fields.items()
    }
  )
