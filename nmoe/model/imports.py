"""A folder of HuggingFace's DeepSeek classes as a configuration and a checkpoint of ours.

nmoe.model.hf_folder reads config.json. Every tensor is accounted for, in both directions. The
weights lie in

  {root}/imports/DIGEST/step_00000000/   a checkpoint without an optimizer
  {root}/imports/DIGEST/tokenizer.json   if the folder has one

where DIGEST covers the configuration and each tensor; `[model] init = "import:DIGEST"` begins a run
from them.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import CheckpointError
from nmoe.model.export import check_room
from nmoe.model.hf_folder import described_in
from nmoe.model.names import computed, from_hf, state_shapes
from nmoe.model.safetensors import Folder, check_finite
from nmoe.records import checkpoint
from nmoe.records.root import Root


@dataclass(frozen=True)
class Imported:
  """What became of a folder. unknown: keys that were not understood; left: tensors not needed."""

  config: Config
  digest: str
  unknown: list[str]
  left: list[str]


def import_folder(folder: Path, root: Root) -> Imported:
  """Read, check and store a folder's model; it is found if it is there already.

  Raises ConfigError or CheckpointError naming the key or tensor that does not fit.
  """
  described = described_in(folder)
  config, without_bias = described.config, described.without_bias
  with Folder(folder) as files:
    left, shapes = sorted(computed(files, config)), files.described()
    deque(from_hf(shapes, config, without_bias), maxlen=0)  # names and shapes, read in no time
    config = _store(folder, root, config, from_hf(files, config, without_bias))
  return Imported(config, config.model.init.removeprefix("import:"), described.unknown, left)


def _stored(name: str, tensor: Tensor, fp32: bool) -> Tensor:
  """In the dtype of the model's parameter."""
  return tensor.to(torch.float32 if fp32 or ".router." in name else torch.bfloat16)


def _store(folder: Path, root: Root, config: Config, state: Iterator[tuple[str, Tensor]]) -> Config:
  """Write the weights as they come; the configuration that begins from them."""
  told, fp32 = hashlib.sha256(configs.to_toml(config).encode()), config.target.dtype == "fp32"
  imports = root.imports

  def hashed() -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state:
      weight = _stored(name, tensor, fp32).contiguous()
      check_finite(folder, name, weight)
      told.update(name.encode())
      told.update(weight.view(-1).view(torch.uint8).numpy())
      yield name, weight

  def named() -> Config:
    return configs.changed(config, {"model.init": f"import:{told.hexdigest()[:16]}"})

  def meta() -> dict[str, Any]:
    return {"run": f"import of {folder.resolve().name}", "config": configs.to_toml(named())}

  partial = None
  try:
    imports.mkdir(parents=True, exist_ok=True)
    check_room(imports, state_bytes(config))
    partial = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=imports))
    checkpoint.save_streamed(partial, 0, hashed(), meta)
    if (folder / "tokenizer.json").is_file():
      shutil.copy(folder / "tokenizer.json", partial)
    partial.chmod(0o755)
    final = root.imported(named().model.init.removeprefix("import:"))
    if not final.exists():
      partial.rename(final)
  except OSError as error:
    raise CheckpointError(
      f"{imports} cannot be written ({error}); make room or name another root, then run again"
    ) from error
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)
  return named()


def state_bytes(config: Config) -> int:
  """Of all weights as they are stored."""
  shapes, wide = state_shapes(config), config.target.dtype == "fp32"
  return sum(
    torch.Size(shape).numel() * (4 if wide or ".router." in name else 2)
    for name, shape in shapes.items()
  )
