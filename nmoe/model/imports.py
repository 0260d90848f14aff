"""A folder of HuggingFace's DeepSeek classes as a configuration and a checkpoint of ours.

nmoe.model.hf_folder reads config.json. Every tensor is accounted for, in both directions. The
weights lie in

  {root}/imports/DIGEST/step_00000000/   a checkpoint without an optimizer
  {root}/imports/DIGEST/tokenizer.json   if the folder has one

in bf16, or all in fp32 if one of them has another type than bf16 (routers aside, which always
are): nothing is rounded. DIGEST covers the configuration and each tensor; a run begins from them
by `[model] init = "import:DIGEST"`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import CheckpointError
from nmoe.files import publish, sha256, unfinished
from nmoe.model.export import check_room
from nmoe.model.hf_folder import described_in
from nmoe.model.imported import imported_at
from nmoe.model.names import computed, from_hf, state_shapes
from nmoe.model.safetensors import Folder, check_finite
from nmoe.records import checkpoint
from nmoe.records.root import Root

PARTIAL = "import"  # as unfinished folders are called


@dataclass(frozen=True)
class Imported:
  """What became of a folder. unknown: keys that were not understood; left: tensors not needed;
  wide: those that bf16 would round, of a model that config.json does not say to be in fp32.
  """

  config: Config
  digest: str
  unknown: list[str]
  left: list[str]
  wide: list[str]


def import_folder(folder: Path, root: Root) -> Imported:
  """Read, check and store a folder's model; it is found if it is there already.

  Raises ConfigError or CheckpointError naming the key or tensor that does not fit.
  """
  described = described_in(folder)
  config, without_bias = described.config, described.without_bias
  with Folder(folder) as files:
    left, shapes = sorted(computed(files, config)), files.described()
    deque(from_hf(shapes, config, without_bias), maxlen=0)  # names and shapes, read in no time
    wide = _wide({name: x for name, x in shapes.items() if name not in left}, config)
    if wide:
      config = configs.changed(config, {"target.dtype": "fp32"})
    check_sums(folder)
    config = _store(folder, root, config, from_hf(files, config, without_bias))
  return Imported(config, config.model.init.removeprefix("import:"), described.unknown, left, wide)


def _wide(tensors: Mapping[str, Tensor], config: Config) -> list[str]:
  """The names of what would be rounded. Routers, `mlp.gate`, are fp32 in every model."""
  if config.target.dtype == "fp32":
    return []
  return [n for n, x in tensors.items() if x.dtype != torch.bfloat16 and ".mlp.gate." not in n]


def _stored(name: str, tensor: Tensor, fp32: bool) -> Tensor:
  """In the dtype of the model's parameter."""
  return tensor.to(torch.float32 if fp32 or ".router." in name else torch.bfloat16)


def _store(folder: Path, root: Root, config: Config, state: Iterator[tuple[str, Tensor]]) -> Config:
  """Write the weights as they come; the configuration that begins from them."""
  told, fp32 = hashlib.sha256(configs.to_toml(config).encode()), config.target.dtype == "fp32"

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

  try:
    check_room(root.imports, state_bytes(config))
    with unfinished(root.imports, PARTIAL) as partial:
      checkpoint.save_streamed(partial, 0, hashed(), meta)
      if (folder / "tokenizer.json").is_file():
        shutil.copy(folder / "tokenizer.json", partial)
      _replace(partial, imported_at(named(), root))
  except OSError as error:
    raise CheckpointError(
      f"{root.imports} cannot be written ({error}); make room or name another root, then run again"
    ) from error
  return named()


def _replace(partial: Path, folder: Path) -> None:
  """Publish a folder; one of the same digest stays if it is whole. Raises OSError."""
  if folder.exists():
    try:
      checkpoint.verify(folder / "step_00000000")
    except CheckpointError:
      shutil.rmtree(folder)
  publish(partial, folder)


def check_sums(folder: Path) -> None:
  """CheckpointError for a file of weights that is not what an export's nmoe.json says.

  A folder without an nmoe.json, from elsewhere, has no sums to compare.
  """
  told = folder / "nmoe.json"
  if not told.is_file():
    return
  remedy = "copy the folder again, or delete its nmoe.json if its weights were changed on purpose"
  try:
    sums = dict(json.loads(told.read_text(encoding="utf-8"))["sha256"]["files"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{told} cannot be read ({error!r}); {remedy}") from error
  for name, wanted in sums.items():
    try:
      found = sha256(folder / name)
    except OSError as error:
      raise CheckpointError(f"{folder / name} cannot be read ({error}); {remedy}") from error
    if found != wanted:
      raise CheckpointError(
        f"{folder / name} has sha256 {found[:12]}, nmoe.json says {str(wanted)[:12]}; {remedy}"
      )


def state_bytes(config: Config) -> int:
  """Of all weights as they are stored."""
  shapes, wide = state_shapes(config), config.target.dtype == "fp32"
  return sum(
    torch.Size(shape).numel() * (4 if wide or ".router." in name else 2)
    for name, shape in shapes.items()
  )
