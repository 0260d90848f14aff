"""The quantized copies of weights, made when a weight is first used after it changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor


class Copy(NamedTuple):
  weight: Tensor  # shares the weight's memory, so that no other tensor comes to its address
  version: int  # of the weight when it was quantized
  quantized: Any


class Copies:
  """The copies of one module's weights; its owner lets them go with itself.

  A copy belongs to a tensor's memory and to torch's count of the writes to it (`Tensor._version`),
  and is made anew as soon as either differs. So what changes a weight (AdamW, Muon, the owners'
  rows, a checkpoint, an initialisation) need not know of copies, nor come in any order; what writes
  through a raw pointer must raise the count (torch.autograd.graph.increment_version), as it must
  for autograd. Only writes through `Tensor.data` stay unseen: nothing here writes weights so.
  """

  def __init__(self) -> None:
    self.made: dict[Hashable, Copy] = {}

  def get(self, key: Hashable, weight: Tensor, make: Callable[[], Any]) -> Any:
    """The copy `key` of the weight, by `make()` if the weight is not what it was."""
    if not self._is_current(key, weight):
      self.made.pop(key, None)  # first, so that the new one can take its memory
      version = weight._version
      self.made[key] = Copy(weight.detach(), version, make())
    return self.made[key].quantized

  def _is_current(self, key: Hashable, weight: Tensor) -> bool:
    copy = self.made.get(key)
    return copy is not None and all(
      (w.data_ptr(), w.shape, w.stride(), w.dtype, w._version)
      == (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, copy.version)
      for w in (copy.weight, weight)
    )
