"""What operations keep for backward and need meanwhile, in bytes. Does not import torch.

One function an operation of kernels.ops, for what kernels.cuda keeps; `width` is the bytes of an
element, and counts are per token where no number of tokens or rows is given. Operations that share
an input keep it once: whoever sums counts it once.
"""

from __future__ import annotations

from typing import NamedTuple

from kernels.sizes import BLOCK, WIDTH

FP32 = WIDTH["fp32"]


def rms_norm(dim: int, width: int) -> int:
  """Kept: the input and 1/rms."""
  return dim * width + FP32


def linear(dim: int, width: int) -> int:
  """Kept: the input."""
  return dim * width


def attention(heads: int, qk: int, v: int, width: int, again: bool = False) -> int:
  """Kept: q, k and v, if backward does not have them again, the result and the sum's logarithm."""
  operands = 0 if again else 2 * qk + v
  return heads * ((operands + v) * width + FP32)


def mlp(ffn: int, width: int) -> int:
  """Kept beside the input: gate and up, before SwiGLU. Of `experts`: for each row. Nothing with
  kernels.ops.Recipe.recompute.
  """
  return 2 * ffn * width


def route(experts: int, top_k: int, score: str, balanced: bool) -> int:
  """Kept by route, layout and combine: of each choice its expert, gate, row, source and token; the
  scores, where a softmax or the balance loss wants them, then those of all layers side by side too.
  """
  kept = 5 * top_k * FP32
  if balanced:
    return kept + FP32 * (2 * experts + 1)
  return kept + FP32 * experts * (score == "softmax")


class Loss(NamedTuple):
  """Of linear_cross_entropy. Forward keeps the gradients; the logits live a chunk at a time."""

  dweight: int  # fp32
  dx: int
  logits: int


def linear_cross_entropy(tokens: int, dim: int, vocab: int, chunk: int, width: int) -> Loss:
  return Loss(vocab * dim * FP32, tokens * dim * width, min(chunk, tokens) * vocab * width)


def mlp_backward(
  rows: int, tokens: int, dim: int, ffn: int, width: int, again: bool = False
) -> int:
  """Needed in backward: dh, SwiGLU again and dx of each row, and gate and up if they are computed
  again; three gradients of each token.
  """
  parts = 5 if again else 3
  return rows * (parts * ffn + dim) * width + 3 * tokens * dim * width


def weights_apart(elements: int, width: int) -> float:
  """Needed in backward where weights' gradients are added afterwards: they, and the larger of two
  matrices, w13, in fp32.
  """
  return elements * width + elements * 2 / 3 * FP32


def adds_in_place(arch: str) -> bool:
  """Whether the experts' products add to fp32 gradients themselves: on a GPU."""
  return arch != "cpu"


class Copy(NamedTuple):
  """Of one element in a quantized copy of a weight (kernels.copies)."""

  formula: str
  nbytes: float


def quantized_copy(format: str, emulated: bool) -> Copy:
  """Data and scale; tensor cores want the scale of a square of 16 x 16 in each of its rows."""
  if format == "fp8":
    return Copy(f"1 + 1/{BLOCK[format]}", 1 + 1 / BLOCK[format])
  elements = BLOCK[format] ** 2 if emulated else BLOCK[format]
  return Copy(f"1/2 + 1/{elements}", 1 / 2 + 1 / elements)
