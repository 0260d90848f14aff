"""Tensors that backward computes again instead of keeping them: train.recompute.

  norm    what a norm hands to its products, again from the sum that the norm keeps
  qkv     attention's operands, again from the block's input and the latents
  swiglu  gate and up of every SwiGLU block, again from the block's rows, received ones among them
          (by the operations themselves: kernels.ops.Recipe.recompute)

The same kernels run on the same operands, so the results have the same bits. A GPU's fused sum and
norm (kernels.cuda.norm) normalises the sum before its rounding, which is not kept: there "norm"
leaves those of the residual stream as they are (Config.recomputes_residual_norms).

`Forgotten` works at autograd's door: what an operation saves of a forgotten tensor, or of a view of
it, is replaced by a note, and the first note that backward looks up computes the tensor again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Compute = Callable[[], tuple[Tensor, ...]]


class _Note(NamedTuple):
  """What is saved of a forgotten tensor: which, and the view of its storage."""

  index: int
  shape: torch.Size
  stride: tuple[int, ...]
  offset: int


class Kept:
  """Tensors that backward keeps, where operations ask for it."""

  def __init__(self, *tensors: Tensor):
    self.tensors = tensors

  def unsaved(self) -> AbstractContextManager:
    return nullcontext()

  def again(self) -> tuple[Tensor, ...]:
    """The tensors, without their graph."""
    return tuple(t.detach() for t in self.tensors)


class Forgotten:
  """Tensors that operations inside `unsaved()` use, but do not keep for backward.

  compute() returns them again, bit for bit and with the same strides; it must not hold them, and
  runs without gradients. What it returns is kept until backward has looked up every note.
  """

  def __init__(self, tensors: tuple[Tensor, ...], compute: Compute):
    self.compute = compute
    self.index = {t.untyped_storage().data_ptr(): i for i, t in enumerate(tensors)}
    self.notes = 0
    self.values: tuple[Tensor, ...] | None = None

  def unsaved(self) -> AbstractContextManager:
    """Inside, these tensors must be alive: they are known by their memory."""
    return saved_tensors_hooks(self._pack, self._unpack)

  def again(self) -> tuple[Tensor, ...]:
    """The tensors, without their graph; kept only while backward still looks up notes."""
    if self.values is not None:
      return self.values
    with torch.no_grad():
      values = self.compute()
    self.values = values if self.notes else None
    return values

  def _pack(self, tensor: Tensor) -> Tensor | _Note:
    index = self.index.get(tensor.untyped_storage().data_ptr())
    if index is None:  # an operation's own result would hold its graph, and that the result
      return tensor if tensor.is_leaf else tensor.detach()
    self.notes += 1
    return _Note(index, tensor.shape, tensor.stride(), tensor.storage_offset())

  def _unpack(self, saved: Tensor | _Note) -> Tensor:
    if not isinstance(saved, _Note):
      return saved
    value = self.again()[saved.index]
    self.notes -= 1
    if self.notes <= 0:
      self.values = None
    return value.as_strided(saved.shape, saved.stride, saved.offset)


Source = Kept | Forgotten


def source(forget: bool, tensors: tuple[Tensor, ...], compute: Compute) -> Source:
  """The tensors as backward is to have them: kept, or computed again."""
  return Forgotten(tensors, compute) if forget else Kept(*tensors)
