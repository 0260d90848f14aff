"""Zeros for the rows that no expert owns: x[offset[-1]:] = 0, without a host read of the offset.

Bytes moved: one element size per element of those rows; nothing when there are none.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64
from torch import Tensor

from kernels.cuda.jit import (
  ARCH,
  DTYPES,
  cached,
  check_device,
  compile_kernel,
  contiguous,
  fake,
  vector_at,
  vector_width,
)
from kernels.ops import check, check_same_device

THREADS = 256
BLOCKS_PER_SM = 8


class ZeroTail:
  """A fixed grid walks the tail in 16-byte stores."""

  def __init__(self, dtype: type, width: int, dim: int, blocks: int):
    self.dtype, self.width, self.dim, self.blocks = dtype, width, dim, blocks

  @cute.jit
  def __call__(self, mX: cute.Tensor, mOffset: cute.Tensor, stream):
    self.kernel(mX, mOffset).launch(grid=[self.blocks, 1, 1], block=[THREADS, 1, 1], stream=stream)

  @cute.kernel
  def kernel(self, mX: cute.Tensor, mOffset: cute.Tensor):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    per_row = self.dim // self.width
    start = Int64(mOffset[mOffset.shape[0] - 1]) * per_row
    rZero = cute.make_rmem_tensor(self.width, self.dtype)
    rZero.fill(self.dtype(0.0))
    first = start + Int64(bidx) * THREADS + tidx
    for vector in cutlass.range(first, mX.shape[0] * per_row, self.blocks * THREADS):
      cute.autovec_copy(rZero, vector_at(mX, vector * self.width, self.width))


@cached
def compile_zero_tail(dtype, dim: int):
  kernel = ZeroTail(DTYPES[dtype], vector_width(dtype, dim, "x"), dim, ARCH.num_sms * BLOCKS_PER_SM)
  return compile_kernel(kernel, fake(DTYPES[dtype], None, dim), fake(Int32, None, align=4))


def zero_tail(x_ND: Tensor, offset_E1: Tensor) -> Tensor:
  """x, its rows from offset[-1] on set to zero in place. bf16 or fp32, contiguous; offset int32."""
  check_device(check_same_device(x_ND, offset_E1))
  check(offset_E1.dtype == torch.int32, f"offset is {offset_E1.dtype}; need torch.int32")
  contiguous(x=x_ND)
  if x_ND.numel():
    compile_zero_tail(x_ND.dtype, x_ND.shape[1])(x_ND, offset_E1)
  return x_ND
