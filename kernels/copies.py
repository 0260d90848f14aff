"""The quantized copies of weights, made when a weight is first used after it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor


class Key(NamedTuple):
  format: str
  emulate: bool
  leg: str
  salt: int


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
  A kernel that writes a weight may write its current copies too, and say so (`renew`).
  """

  def __init__(self) -> None:
    self.made: dict[Key, Copy] = {}

  def get(self, key: Key, weight: Tensor, make: Callable[[], Any]) -> Any:
    """The copy `key` of the weight, by `make()` if the weight is not what it was."""
    if not self._is_current(key, weight):
      self.made.pop(key, None)  # first, so that the new one can take its memory
      version = weight._version
      self.made[key] = Copy(weight.detach(), version, make())
    return self.made[key].quantized

  def current(self, weight: Tensor) -> dict[Key, Any]:
    """All copies of the weight as it is."""
    return {key: c.quantized for key, c in self.made.items() if self._is_current(key, weight)}

  def renew(self, keys: Iterable[Key], weight: Tensor) -> None:
    """Say that these copies were written with the weight: they are of what it is now."""
    for key in keys:
      self.made[key] = self.made[key]._replace(version=weight._version)

  def _is_current(self, key: Key, weight: Tensor) -> bool:
    copy = self.made.get(key)
    return copy is not None and all(
      (w.data_ptr(), w.shape, w.stride(), w.dtype, w._version)
      == (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, copy.version)
      for w in (copy.weight, weight)
    )
