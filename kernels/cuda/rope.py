"""MLA's split of the projections fused with RoPE: q, k and v ready for attention in one pass.

Forward, for token s and head h (arXiv 2412.19437 Eq 1-9), R rotates pairs (2j, 2j+1) by θ[s, j]:
  q[h] = (q[h, :nope], R q[h, nope:]),   k[h] = (kv[h, :nope], R k_rope),   v[h] = kv[h, nope:]
Backward applies Rᵀ; k_rope's gradient is the fp32 sum over heads in ascending order, rounded once.

One block owns one token; every access is 16 bytes. Elements moved per token: forward reads
H · (2 · nope + rope + v) + rope and writes H · (2 · (nope + rope) + v); backward the reverse.
0.62 of a copy's rate on one H200, launches included (kernels/RESULTS.md).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64, const_expr
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cuda.jit import (
  DTYPES,
  VECTOR_BYTES,
  cached,
  check_device,
  compile_kernel,
  contiguous,
  fake,
  load_vector,
  vector_at,
  vector_width,
)
from kernels.ops import check, check_same_device

THREADS = 256


class Qkv:
  """What both directions share: the widths, the launch and the rotation of one vector of pairs."""

  def __init__(self, dtype: type, width: int, heads: int, nope: int, rope: int, v: int):
    self.dtype, self.width, self.heads = dtype, width, heads
    self.nope, self.rope, self.v = nope, rope, v

  @cute.jit
  def __call__(self, mX, mY, mZ, mCos, mSin, mXout, mYout, mZout, stream):
    self.kernel(mX, mY, mZ, mCos, mSin, mXout, mYout, mZout).launch(
      grid=[mX.shape[0], 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.jit
  def copy(self, mSrc: cute.Tensor, src: Int64, mDst: cute.Tensor, dst: Int64):
    cute.autovec_copy(load_vector(mSrc, src, self.width), vector_at(mDst, dst, self.width))

  @cute.jit
  def rotate(
    self, rX: cute.Tensor, rCos: cute.Tensor, rSin: cute.Tensor, mDst: cute.Tensor, dst: Int64
  ):
    """Store the rotation of fp32 or dtype registers, rounded once."""
    rY = cute.make_rmem_tensor(self.width, self.dtype)
    for j in cutlass.range_constexpr(self.width // 2):
      a, b = rX[2 * j].to(Float32), rX[2 * j + 1].to(Float32)
      rY[2 * j] = (a * rCos[j] - b * rSin[j]).to(self.dtype)
      rY[2 * j + 1] = (a * rSin[j] + b * rCos[j]).to(self.dtype)
    cute.autovec_copy(rY, vector_at(mDst, dst, self.width))

  @cute.jit
  def angles(self, mCos: cute.Tensor, mSin: cute.Tensor, position: Int64, column: Int64):
    offset = position * (self.rope // 2) + column // 2
    half = const_expr(self.width // 2)
    return load_vector(mCos, offset, half), load_vector(mSin, offset, half)


class QkvForward(Qkv):
  @cute.kernel
  def kernel(self, mQ, mKv, mKr, mCos, mSin, mQout, mKout, mVout):
    tidx, _, _ = cute.arch.thread_idx()
    token = Int64(cute.arch.block_idx()[0])
    position = token % mCos.shape[0]
    qk = const_expr(self.nope + self.rope)
    for i in cutlass.range(tidx, self.heads * qk // self.width, THREADS):
      head, column = i // (qk // self.width), i % (qk // self.width) * self.width
      out = token * (self.heads * qk) + head * qk + column
      if column < self.nope:
        kv = (token * self.heads + head) * (self.nope + self.v) + column
        self.copy(mQ, out, mQout, out)
        self.copy(mKv, kv, mKout, out)
      else:
        rCos, rSin = self.angles(mCos, mSin, position, column - self.nope)
        self.rotate(load_vector(mQ, out, self.width), rCos, rSin, mQout, out)
        kr = token * mKr.stride[0] + column - self.nope
        self.rotate(load_vector(mKr, kr, self.width), rCos, rSin, mKout, out)
    for i in cutlass.range(tidx, self.heads * self.v // self.width, THREADS):
      head, column = i // (self.v // self.width), i % (self.v // self.width) * self.width
      row = token * self.heads + head
      self.copy(mKv, row * (self.nope + self.v) + self.nope + column, mVout, row * self.v + column)


class QkvBackward(Qkv):
  @cute.jit
  def inverse(self, mCos: cute.Tensor, mSin: cute.Tensor, position: Int64, column: Int64):
    rCos, rSin = self.angles(mCos, mSin, position, column)
    rSin.store(-rSin.load())
    return rCos, rSin

  @cute.kernel
  def kernel(self, mDq, mDk, mDv, mCos, mSin, mDqIn, mDkv, mDkr):
    tidx, _, _ = cute.arch.thread_idx()
    token = Int64(cute.arch.block_idx()[0])
    position = token % mCos.shape[0]
    qk = const_expr(self.nope + self.rope)
    for i in cutlass.range(tidx, self.heads * qk // self.width, THREADS):
      head, column = i // (qk // self.width), i % (qk // self.width) * self.width
      src = token * (self.heads * qk) + head * qk + column
      if column < self.nope:
        kv = (token * self.heads + head) * (self.nope + self.v) + column
        self.copy(mDq, src, mDqIn, src)
        self.copy(mDk, src, mDkv, kv)
      else:
        rCos, rSin = self.inverse(mCos, mSin, position, column - self.nope)
        self.rotate(load_vector(mDq, src, self.width), rCos, rSin, mDqIn, src)
    for i in cutlass.range(tidx, self.heads * self.v // self.width, THREADS):
      head, column = i // (self.v // self.width), i % (self.v // self.width) * self.width
      row = token * self.heads + head
      self.copy(mDv, row * self.v + column, mDkv, row * (self.nope + self.v) + self.nope + column)
    for i in cutlass.range(tidx, self.rope // self.width, THREADS):
      rSum = cute.make_rmem_tensor(self.width, Float32)
      rSum.fill(0.0)
      start = token * (self.heads * qk) + self.nope + i * self.width
      for head in cutlass.range(self.heads, unroll=8):
        rSum.store(rSum.load() + load_vector(mDk, start + head * qk, self.width).load().to(Float32))
      rCos, rSin = self.inverse(mCos, mSin, position, Int64(i * self.width))
      self.rotate(rSum, rCos, rSin, mDkr, token * self.rope + i * self.width)


@cached
def compile_qkv(backward: bool, torch_dtype, heads: int, nope: int, rope: int, v: int):
  dtype, width = DTYPES[torch_dtype], VECTOR_BYTES // torch_dtype.itemsize
  q, kv, q_out, k_out, v_out = (
    fake(dtype, None, heads * size) for size in (nope + rope, nope + v, nope + rope, nope + rope, v)
  )
  k_rope = cute.runtime.make_fake_tensor(
    dtype,
    (cute.sym_int64(), rope),
    stride=(cute.sym_int64(divisibility=width), 1),
    assumed_align=VECTOR_BYTES,
  )
  sides = (q, kv, k_rope), (q_out, k_out, v_out)
  sources, targets = sides[::-1] if backward else sides
  angles = (fake(Float32, None, rope // 2) for _ in range(2))
  kernel = (QkvBackward if backward else QkvForward)(dtype, width, heads, nope, rope, v)
  return compile_kernel(kernel, *sources, *angles, *targets)


def _rows(t: Tensor) -> Tensor:
  """[B, S, ...] as one row per token, without a copy."""
  return t.view(t.shape[0] * t.shape[1], -1)


def _run(
  backward: bool,
  sources: tuple[Tensor, ...],
  angles: tuple[Tensor, ...],
  widths: tuple[int, int, int, int],
) -> tuple[Tensor, ...]:
  """(q, kv, k_rope) -> (q, k, v), or the latter's gradients -> the former's. widths: H, nope, rope,
  v.
  """
  heads, nope, rope, v = widths
  q, kv = (heads, nope + rope), (heads, nope + v)
  shapes = (q, kv, (rope,)) if backward else (q, q, (heads, v))
  first = sources[0]
  targets = tuple(first.new_empty(*first.shape[:2], *shape) for shape in shapes)
  if first.numel():
    run = compile_qkv(backward, first.dtype, *widths)
    run(*map(_rows, sources), *angles, *map(_rows, targets))
  return targets


class _MlaQkv(torch.autograd.Function):
  @staticmethod
  def forward(ctx, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor):
    (heads, qk), rope = q.shape[2:], k_rope.shape[-1]
    ctx.save_for_backward(cos, sin)
    ctx.widths = heads, qk - rope, rope, kv.shape[-1] - (qk - rope)
    return _run(False, (q, kv, k_rope), (cos, sin), ctx.widths)

  @staticmethod
  @once_differentiable
  def backward(ctx, *grads: Tensor):
    grads = tuple(grad.contiguous() for grad in grads)
    return *_run(True, grads, ctx.saved_tensors, ctx.widths), None, None


def _check(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, rope: int) -> None:
  check_device(check_same_device(q, kv, k_rope, cos, sin))
  batch, seq, nope = *q.shape[:2], q.shape[-1] - rope
  check(
    kv.shape[:3] == q.shape[:3] and k_rope.shape == (batch, seq, rope) and 0 <= nope < kv.shape[-1],
    f"mla_qkv: q, kv, k_rope have shapes {tuple(q.shape)}, {tuple(kv.shape)}, "
    f"{tuple(k_rope.shape)}; need [B, S, H, nope + {rope}], [B, S, H, nope + v] and [B, S, {rope}]",
  )
  check(
    cos.shape == sin.shape == (seq, rope // 2) and cos.dtype == sin.dtype == torch.float32,
    f"mla_qkv: cos and sin are {cos.dtype} {tuple(cos.shape)}, {tuple(sin.shape)}; need fp32 "
    f"{(seq, rope // 2)}",
  )
  for what, width in (("q's unrotated part", nope), ("k_rope", rope), ("v", kv.shape[-1] - nope)):
    vector_width(q.dtype, width, f"mla_qkv: {what}")
  contiguous(cos=cos, sin=sin)


def _key(k_rope: Tensor) -> Tensor:
  """k_rope itself when its tokens lie at one stride of whole 16-byte accesses, else a copy."""
  tokens = k_rope.stride(0) == k_rope.shape[1] * k_rope.stride(1) or k_rope.shape[0] == 1
  step = VECTOR_BYTES // k_rope.element_size()
  aligned = k_rope.data_ptr() % VECTOR_BYTES == 0 and k_rope.stride(1) % step == 0
  return k_rope if tokens and aligned and k_rope.stride(2) == 1 else k_rope.contiguous()


def mla_qkv(
  q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, rope_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
  """See kernels.ops.Ops.mla_qkv. Widths nope, rope and v are multiples of 8 (bf16) or 4 (fp32)."""
  _check(q, kv, k_rope, cos, sin, rope_dim)
  return _MlaQkv.apply(q.contiguous(), kv.contiguous(), _key(k_rope), cos, sin)
