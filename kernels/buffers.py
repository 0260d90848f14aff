"""The symmetric memory of one rank: what lies where. The host and the device read the same layout.

Every rank owns one block of this layout, at the same offsets; a peer writes into it directly. R
ranks, E experts of all ranks, C rows that a rank receives in one round, N = T·K rows that a rank
sends, D width.

Rows are dispatched as they are or packed, each by itself (kernels.formats), in bytes:
  "fp8"    D codes E4M3, then their D / 32 scales E8M0, one per 32 neighbouring elements
  "nvfp4"  D / 2 pairs of codes E2M1, the row's own scale in fp32, then D / 16 scales E4M3
NVFP4's scale per tensor would need the largest magnitude of all ranks' rows before the first of
them may leave; a power of two per row stands in its place. Gradients are no NVFP4 rows: those need
stochastic rounding (arXiv 2509.25149), and its draws, which go by an element's place in its tensor,
would depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.formats import BLOCK
from kernels.ops import Layout, check

ALIGNMENT = 256  # bytes: of every buffer's start; whole cache lines and vector stores on any device
SIGNAL_STRIDE = (
  16  # int64 elements: one signal per 128-byte line, so that writers don't share lines
)

ROW_ALIGNMENT = 16  # bytes: of a packed row's start, for vector stores

COUNTS, DISPATCH, RETURN = 0, 1, 2  # the kinds of signals


class Payload(NamedTuple):
  """The formats of dispatched rows, named as kernels.ops.Recipe's; "bf16": as they are."""

  x: str  # forward, and again in backward's later rounds
  dy: str


PAYLOADS = {
  "bf16": Payload("bf16", "bf16"),
  "mxfp8": Payload("fp8", "fp8"),
  "nvfp4": Payload("nvfp4", "fp8"),
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


def row_parts(dim: int, format: str) -> tuple[int, int, int]:
  """Bytes of a packed row's parts in their order: codes, the row's own scale, blocks' scales."""
  largest = max(BLOCK.values())
  check(
    dim % largest == 0,
    f"rows of {dim} elements are no whole blocks of {largest}; send them as they are",
  )
  codes, own = (dim, 0) if format == "fp8" else (dim // 2, torch.float32.itemsize)
  return codes, own, dim // BLOCK[format]


def row_bytes(dim: int, format: str) -> int:
  """Of a packed row: its parts and padding."""
  return -(-sum(row_parts(dim, format)) // ROW_ALIGNMENT) * ROW_ALIGNMENT


@dataclass(frozen=True)
class BufferLayout:
  """Sizes of one rank's block. `offsets` and `nbytes` follow from them and from nothing else."""

  ranks: int
  experts: int
  capacity: int  # C
  rows: int  # N, the most that one rank sends
  dim: int
  dtype: torch.dtype  # of rows
  payload: str = "bf16"  # of dispatched rows, a key of PAYLOADS; rows return as they are
  slots: int = 1  # of C rows: with more than one, the owner reads rows where they were received

  def __post_init__(self):
    check(
      self.slots == 1 or self.payload == "bf16",
      f"{self.slots} slots of packed rows; rows that are unpacked need one",
    )
    check(
      self.ranks * self.rows < 2**31,
      f"{self.ranks} ranks of {self.rows} rows do not fit int32 origins; lower train.micro_batch",
    )

  @property
  def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of Buffers' fields, in order."""
    row = self.dim, self.dtype
    if self.payload != "bf16":
      row = max(row_bytes(self.dim, part) for part in PAYLOADS[self.payload]), torch.uint8
    return {
      "count_RE": ((self.ranks, self.experts), torch.int32),
      "row_CD": ((self.slots * self.capacity, row[0]), row[1]),
      "gate_C": ((self.capacity,), torch.float32),
      "origin_C": ((self.capacity,), torch.int32),
      "back_ND": ((self.rows, self.dim), self.dtype),
      "back_gate_N": ((self.rows,), torch.float32),
      "signal_KRS": ((3, self.ranks, SIGNAL_STRIDE), torch.int64),
    }

  @property
  def sizes(self) -> dict[str, int]:
    """Bytes of each buffer, without padding."""
    return {
      name: torch.Size(shape).numel() * dtype.itemsize
      for name, (shape, dtype) in self.fields.items()
    }

  @property
  def offsets(self) -> dict[str, int]:
    """Byte offset of each buffer in the block, multiples of ALIGNMENT."""
    offsets, end = {}, 0
    for name, size in self.sizes.items():
      offsets[name] = end
      end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets

  @property
  def nbytes(self) -> int:
    """Bytes of the whole block, a multiple of ALIGNMENT."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in self.sizes.values())

  def views(self, memory: Tensor) -> Buffers:
    """The block's tensors. memory: uint8 [nbytes], aligned to ALIGNMENT."""
    check(
      memory.dtype == torch.uint8 and memory.shape == (self.nbytes,) and memory.is_contiguous(),
      f"symmetric memory is {memory.dtype} {tuple(memory.shape)}, needs uint8 ({self.nbytes},)",
    )
    check(memory.data_ptr() % ALIGNMENT == 0, f"symmetric memory is not aligned to {ALIGNMENT}")
    return Buffers(
      **{
        name: memory[start : start + self.sizes[name]].view(dtype).view(shape)
        for (name, (shape, dtype)), start in zip(
          self.fields.items(), self.offsets.values(), strict=True
        )
      }
    )
