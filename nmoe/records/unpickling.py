"""The description that torch.distributed.checkpoint pickles, read without running code."""

from __future__ import annotations

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from nmoe.errors import CorruptError
from nmoe.records.manifests import remedy_of

_METADATA_NAMES = {
  ("pathlib", "PosixPath"),  # of checkpoints that have one
  ("torch", "Size"),
  ("torch.serialization", "_get_layout"),
  ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
  *(
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
      "ChunkStorageMetadata",
      "Metadata",
      "MetadataIndex",
      "StorageMeta",
      "TensorProperties",
      "TensorStorageMetadata",
      "_MEM_FORMAT_ENCODING",
    )
  ),
}
_BROKEN_PICKLE = (  # what pickle's documentation says that a damaged one may raise
  OSError,
  pickle.UnpicklingError,
  AttributeError,
  EOFError,
  ImportError,
  IndexError,
  KeyError,
  TypeError,
  ValueError,
)


def _member(kind: type[Enum], name: str) -> Enum:
  """What Python 3.11.0 to 3.11.3 pickle a member of an enumeration as: getattr(kind, name)."""
  if isinstance(kind, type) and issubclass(kind, Enum):
    return kind[name]
  raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which is no enumeration")


class _Metadata(pickle.Unpickler):
  """Reads what DCP describes tensors with; anything else in the pickle is refused."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("builtins", "getattr"):
      return _member
    dtypes = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    if dtypes or (module, name) in _METADATA_NAMES:
      return super().find_class(module, name)
    raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


def read_metadata(path: Path) -> Metadata:
  """DCP's .metadata of a checkpoint, without running code that a pickle may hold."""
  try:
    with (path / ".metadata").open("rb") as file:
      found = _Metadata(file).load()
    if not isinstance(found, Metadata):
      raise pickle.UnpicklingError(f"it holds a {type(found).__name__}")
  except _BROKEN_PICKLE as error:
    raise CorruptError(f"{path}/.metadata cannot be read ({error}); {remedy_of(path)}") from error
  return found
