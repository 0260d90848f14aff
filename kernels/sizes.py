"""Sizes of formats and of the symmetric memory of one rank. Does not import torch.

Every rank owns one block of `BufferLayout`, at the same offsets; a peer writes into it directly. R
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

import math
from dataclasses import dataclass
from typing import NamedTuple

from kernels.errors import KernelError

WIDTH = {"uint8": 1, "bf16": 2, "fp32": 4, "int32": 4, "int64": 8}  # bytes of an element
BLOCK = {"fp8": 32, "nvfp4": 16}  # elements that share a scale
ALIGNMENT = 256  # bytes: of every buffer's start; whole cache lines and vector stores on any device
SIGNAL_STRIDE = 16  # int64 elements: a signal per 128-byte line, so that writers don't share lines
ROW_ALIGNMENT = 16  # bytes: of a packed row's start, for vector stores


class Payload(NamedTuple):
  """The formats of dispatched rows, named as kernels.ops.Recipe's; "bf16": as they are."""

  x: str  # forward, and again in backward's later rounds
  dy: str


PAYLOADS = {
  "bf16": Payload("bf16", "bf16"),
  "mxfp8": Payload("fp8", "fp8"),
  "nvfp4": Payload("nvfp4", "fp8"),
}


def row_parts(dim: int, format: str) -> tuple[int, int, int]:
  """Bytes of a packed row's parts in their order: codes, the row's own scale, blocks' scales."""
  largest = max(BLOCK.values())
  if dim % largest != 0:
    raise KernelError(
      f"rows of {dim} elements are no whole blocks of {largest}; send them as they are"
    )
  codes, own = (dim, 0) if format == "fp8" else (dim // 2, WIDTH["fp32"])
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
  dtype: str  # of rows, a key of WIDTH
  payload: str = "bf16"  # of dispatched rows, a key of PAYLOADS; rows return as they are
  slots: int = 1  # of C rows: with more than one, the owner reads rows where they were received

  def __post_init__(self):
    if self.slots > 1 and self.payload != "bf16":
      raise KernelError(f"{self.slots} slots of packed rows; rows that are unpacked need one")
    if self.ranks * self.rows >= 2**31:
      raise KernelError(
        f"{self.ranks} ranks of {self.rows} rows do not fit int32 origins; lower train.micro_batch"
      )

  @property
  def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each of kernels.buffers.Buffers' fields, in order."""
    row = self.dim, self.dtype
    if self.payload != "bf16":
      row = max(row_bytes(self.dim, part) for part in PAYLOADS[self.payload]), "uint8"
    return {
      "count_RE": ((self.ranks, self.experts), "int32"),
      "row_CD": ((self.slots * self.capacity, row[0]), row[1]),
      "gate_C": ((self.capacity,), "fp32"),
      "origin_C": ((self.capacity,), "int32"),
      "back_ND": ((self.rows, self.dim), self.dtype),
      "back_gate_N": ((self.rows,), "fp32"),
      "signal_KRS": ((3, self.ranks, SIGNAL_STRIDE), "int64"),
    }

  @property
  def sizes(self) -> dict[str, int]:
    """Bytes of each buffer, without padding."""
    return {name: math.prod(shape) * WIDTH[dtype] for name, (shape, dtype) in self.fields.items()}

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
