"""The head and its cross-entropy, in chunks of tokens, with the gradients made on the way forward.

For each chunk (three GEMMs, one pass over the logits, nothing of [T, V] size):
  z = x · weightᵀ       one GEMM; its epilogue keeps each row's max and Σ exp and the target's logit
                        in fp32, and stores z in fp16
  loss = logsumexp(z) - z[target]       from those fp32 values, never from the rounded logits
  dz = softmax(z) - onehot(target)      from the stored z, fp32, rounded once to bf16, over z
  dx = dz · weight,   dweight += dzᵀ · x            dweight accumulates over chunks in fp32
Backward multiplies dx and dweight by the incoming scalar. FLOPs: 6 · T · D · V.
Extra memory: chunk · V logits in 2 bytes, V · D fp32 and, in backward, V · D in the gradient's
dtype; the latter not where an fp32 gradient is already there, to which backward adds in one pass.

z in fp16, because its rounding is a relative error of exp(z), |z| times that of the format: at
logits of standard deviation 4 (emulated in float64) dx and dweight err by up to 1.7 and 1.4 times
a rounding to bf16, and by 4.6 and 4.5 with z in bf16. The softmax is over the stored z: its own sum
cancels what rounding a large logit does to the whole row. With the epilogue's sum, which would
spare a reduction, both err by up to 2.7. fp16 ends at 65504. From a logit above it the loss is
still right, but dx and dweight are not finite, which stops a run: it has diverged.

0.90 of a dense product's rate on one H200 (kernels/RESULTS.md).
"""

from __future__ import annotations

import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr
from quack.compile_utils import make_fake_tensor
from quack.cross_entropy import CrossEntropy
from quack.epilogue.library import lse_target_epi
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cuda.gemms import accumulate, check_operands, config
from kernels.cuda.jit import cached, compile_kernel
from kernels.gradient import scaled_gradient
from kernels.ops import check

VOCABULARY = 128  # V is a multiple of this
TOKENS = 8  # a chunk's rows are padded to a multiple of this
VECTOR = 8  # logits in 16 bytes


class SoftmaxGradient(CrossEntropy):
  """QuACK's kernel from fp16 logits to their bf16 gradient, which may lie over them.

  A thread writes exactly the elements it has read before; no other thread, and no other block of
  the cluster that shares a row, reads them from global memory. mLoss [T] is scratch: the kernel
  computes a loss as well, here from scratch in place of the targets' logits.
  """

  def __init__(self, vocab: int):
    super().__init__(Float16, vocab, online_softmax=False)

  @cute.jit
  def __call__(self, mZ, mTarget, mLoss, mDz, stream):
    self._set_cluster_n()
    tiled_copy, tiler, threads_per_row = self._get_tiled_copy(vecsize=VECTOR)
    self.kernel(
      mZ,
      mTarget,
      mTargetLogit=mLoss,
      mLoss=mLoss,
      mLSE=None,
      mdX=mDz,
      mWeight=None,
      ignore_index=Int32(-1),
      tiler_mn=tiler,
      tiled_copy=tiled_copy,
      threads_per_row=threads_per_row,
    ).launch(
      grid=[cute.ceil_div(mZ.shape[0], tiler[0]), self.cluster_n, 1],
      block=[tiled_copy.size, 1, 1],
      cluster=[1, self.cluster_n, 1] if const_expr(self.cluster_n > 1) else None,
      stream=stream,
    )


@cached
def compile_softmax_gradient(vocab: int):
  rows = cute.sym_int()
  z, dz = (make_fake_tensor(dtype, (rows, vocab), VECTOR) for dtype in (Float16, BFloat16))
  target, loss = (make_fake_tensor(dtype, (rows,)) for dtype in (Int64, Float32))
  return compile_kernel(SoftmaxGradient(vocab), z, target, loss, dz)


def _softmax_gradient(z: Tensor, target: Tensor) -> Tensor:
  """softmax(z) - onehot(target) in bf16 over the memory of z, fp16 [T, V]; 0 where target is -1."""
  dz = z.view(torch.bfloat16)
  compile_softmax_gradient(z.shape[1])(z, target, z.new_empty(len(z), dtype=torch.float32), dz)
  return dz


def _logits(x: Tensor, weight: Tensor, target: Tensor, out: Tensor | None) -> Tensor:
  """fp32 losses [T] of one chunk; its fp16 logits go to `out` [T, V] unless None."""
  res = lse_target_epi(
    x,
    weight.mT,
    store_d=out is not None,
    out=None if out is None else {"D": out},
    target=target,
    config=config("logits"),
  )
  return torch.where(target >= 0, res["lse"] - res["target_logit"], 0.0)


def _pad(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
  """Rows up to a multiple of TOKENS: zeros with an ignored target."""
  more = -len(target) % TOKENS
  if not more:
    return x, target
  return torch.cat([x, x.new_zeros(more, x.shape[1])]), torch.cat(
    [target, target.new_full((more,), -1)]
  )


def _scaled(dx: Tensor, factor: Tensor, chunk: int) -> Tensor:
  """dx · factor (0-d), rounded once: `dx * factor` would first round the factor to bf16."""
  out = torch.empty_like(dx)
  for whole, part in zip(out.split(chunk), dx.split(chunk), strict=True):
    whole.copy_(part.float() * factor)
  return out


class _LinearCrossEntropy(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, chunk: int, with_grad: bool):
    need_dx, need_dw = (with_grad and need for need in ctx.needs_input_grad[:2])
    tokens, vocab = x.shape[0], weight.shape[0]
    losses = x.new_empty(tokens, dtype=torch.float32)
    dx = torch.empty_like(x) if need_dx else None
    new = torch.empty_like if tokens else torch.zeros_like
    dw = new(weight, dtype=torch.float32) if need_dw else None
    rows = min(chunk, tokens + -tokens % TOKENS)
    logits = x.new_empty(rows, vocab, dtype=torch.float16) if need_dx or need_dw else None
    for start in range(0, tokens, chunk):
      part = slice(start, min(start + chunk, tokens))
      x_c, target_c = _pad(x[part], target[part])
      z = None if logits is None else logits[: len(x_c)]
      losses[part] = _logits(x_c, weight, target_c, z)[: part.stop - start]
      if z is None:
        continue
      dz = _softmax_gradient(z, target_c)
      if need_dx:
        torch.mm(dz[: part.stop - start], weight, out=dx[part])
      if need_dw:
        accumulate(dz, x_c, dw, add=start > 0)
    ctx.save_for_backward(dx, dw, weight)
    ctx.chunk = chunk
    ctx.mark_non_differentiable(losses)
    return losses.sum(), losses

  @staticmethod
  @once_differentiable
  def backward(ctx, dsum: Tensor, _):
    dx, dw, weight = ctx.saved_tensors
    if dx is not None:
      dx = _scaled(dx, dsum, ctx.chunk)
    if dw is not None:
      dw = scaled_gradient(weight, dw, dsum)
    return dx, dw, None, None, None


def linear_cross_entropy(
  x: Tensor, weight: Tensor, target: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
  """See kernels.ops.Ops.linear_cross_entropy. bf16; V is a multiple of 128, chunk of 8."""
  check_operands(x=x, weight=weight)
  check(
    x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1] and target.shape == x.shape[:1],
    f"linear_cross_entropy: x, weight, target have shapes {tuple(x.shape)}, {tuple(weight.shape)}, "
    f"{tuple(target.shape)}; need [T, D], [V, D] and [T]",
  )
  check(
    target.dtype == torch.int64 and target.device == x.device,
    f"linear_cross_entropy: target is {target.dtype} on {target.device}; need int64 on {x.device}",
  )
  check(
    weight.shape[0] % VOCABULARY == 0 and weight.shape[0] > 0,
    f"linear_cross_entropy: vocabulary of {weight.shape[0]}; pad it to a multiple of {VOCABULARY}",
  )
  check(
    chunk > 0 and chunk % TOKENS == 0,
    f"linear_cross_entropy: chunk of {chunk} tokens; make it a positive multiple of {TOKENS}",
  )
  return _LinearCrossEntropy.apply(
    x.contiguous(), weight.contiguous(), target.contiguous(), chunk, torch.is_grad_enabled()
  )
