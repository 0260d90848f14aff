"""A checkpoint as a folder that HuggingFace's DeepSeek classes load.

It is read and written part by part (embedding, each layer, norm and head), so the host holds one
layer at a time, whatever the number of ranks that wrote the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nmoe import files
from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data import tokenizer
from nmoe.data.fast import write_tokenizer
from nmoe.errors import CheckpointError
from nmoe.model.hf_config import Dtype, generation_config, hf_config, model_type_of, positions
from nmoe.model.names import from_hf, state_shapes, to_hf
from nmoe.model.safetensors import Entry, Folder, ShardWriter, check_finite
from nmoe.records import checkpoint

TORCH: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Source:
  """The weights of a finished, verified checkpoint, rounded to `dtype` but for the routers."""

  stored: checkpoint.Stored
  config: Config
  dtype: Dtype

  @classmethod
  def open(cls, path: Path, dtype: Dtype | None, verified: bool = False) -> Source:
    """dtype None: that of the run's parameters. Hashes every file, unless the caller has; raises
    CheckpointError.
    """
    manifest = checkpoint.manifest(path)
    if not verified:
      checkpoint.verify(path)
    config = configs.loads(manifest["config"], f"{path}/manifest.json")
    own: Dtype = "float32" if config.target.dtype == "fp32" else "bfloat16"
    return cls(checkpoint.Stored.open(path), config, dtype or own)

  @property
  def path(self) -> Path:
    return self.stored.path

  @property
  def rounds(self) -> bool:
    """Whether the run's parameters are fp32 and the folder's bf16."""
    return self.dtype == "bfloat16" and self.config.target.dtype == "fp32"

  def parts(self) -> Iterator[list[str]]:
    """The names of the state with whole experts, in parts that are read together."""
    part: list[str] = []
    for name in state_shapes(self.config):
      if part and _part(part[-1]) != _part(name):
        yield part
        part = []
      part.append(name)
    yield part

  def read(self, names: list[str]) -> dict[str, Tensor]:
    """These tensors with whole experts. fp32 weights are the optimizer's masters where there are.

    Raises CheckpointError for one that is missing, or of another shape.
    """
    shapes, state, views = state_shapes(self.config), {}, {}
    for name in names:
      split = self._split(name)
      suffix = ".master" if self._has_masters(split[0]) else ""
      dtype = self.stored.about(split[0] + suffix).properties.dtype
      state[name] = torch.empty(shapes[name], dtype=dtype)
      rows = state[name] if len(split) > 1 or split[0] != name else [state[name]]
      views |= {one + suffix: row for one, row in zip(split, rows, strict=True)}
    self.stored.fill(views)
    return {name: state[name].to(self.dtype_of(name)) for name in names}

  def _has_masters(self, name: str) -> bool:
    return self.dtype == "float32" and f"{name}.master" in self.stored.names

  def dtype_of(self, name: str) -> torch.dtype:
    """Routers stay fp32."""
    return torch.float32 if ".router." in name else TORCH[self.dtype]

  def _split(self, name: str) -> list[str]:
    """The checkpoint's names of a tensor with whole experts."""
    block, _, weight = name.rpartition(".")
    if not block.endswith(".experts"):
      return [name]
    return [f"{block}.{e}.{weight}" for e in range(self.config.moe.num_experts)]


def _part(name: str) -> str:
  """ "layers.3" of a layer's tensor, else the tensor's own name."""
  return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
  """A hidden folder beside `out` to fill, renamed to it at the end; nothing stays if that fails.

  Raises CheckpointError if `out` is there and not empty, is written by another process, or cannot
  be written.
  """
  try:
    with files.alone(out) as partial:
      files.check_empty(out)
      yield partial
      files.check_empty(out)
      partial.replace(out)
  except OSError as error:
    free = shutil.disk_usage(out.parent if out.parent.exists() else Path("/")).free
    raise CheckpointError(
      f"{out} was not written ({error}; {free / 2**30:.2f} GiB free); make room or name another "
      "place, then run again"
    ) from error


def check_room(folder: Path, num_bytes: int) -> None:
  """CheckpointError if a file system has less room than is about to be written."""
  free = shutil.disk_usage(files.existing(folder)).free
  if num_bytes > free:
    raise CheckpointError(
      f"{folder} needs {num_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room or name "
      "another place, then run again"
    )


def write_folder(source: Source, folder: Path, shard_bytes: int) -> ShardWriter:
  """config.json, generation_config.json, the tokenizer and the weights, into an empty folder.

  Returns the writer with the hashes. Raises ConfigError for a model that no class computes, before
  anything is written.
  """
  text = tokenizer.get(source.config.data.tokenizer)
  config = hf_config(source.config, text.eot, source.dtype)
  entries = list(_entries(source))
  check_room(folder.parent, sum(entry.num_bytes for entry in entries))
  writer = ShardWriter(folder, entries, shard_bytes)
  for part in source.parts():
    for name, tensor in _named(source, source.read(part)).items():
      check_finite(source.path, name, tensor)
      writer.write(name, tensor)
  writer.finish()
  write_json(folder / "config.json", config)
  write_json(folder / "generation_config.json", generation_config(text.eot))
  write_tokenizer(folder, text, positions(source.config))
  return writer


def compare_tensors(source: Source, folder: Path) -> int:
  """Read a written folder again and compare it bit by bit; the number of our tensors in it.

  Raises CheckpointError naming the first that differs.
  """
  count = 0
  with Folder(folder) as there:
    found = from_hf(there, source.config, without_bias=not _biased(source))
    for part in source.parts():
      for name, tensor in source.read(part).items():
        _, read = next(found)
        if read.dtype != tensor.dtype or not torch.equal(read, tensor):
          raise CheckpointError(f"{folder}: {name} differs from {source.path}; write it again")
        count += 1
    next(found, None)  # nothing is left over
  return count


def write_json(path: Path, table: dict) -> None:
  path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _biased(source: Source) -> bool:
  return model_type_of(source.config) == "deepseek_v3"


def _entries(source: Source) -> Iterator[Entry]:
  """What the files will hold, in the order in which it comes."""
  shapes = state_shapes(source.config)
  for part in source.parts():
    empty = {n: torch.empty(shapes[n], dtype=source.dtype_of(n), device="meta") for n in part}
    for name, tensor in _named(source, empty).items():
      yield Entry(name, tensor.dtype, tuple(tensor.shape))


def _named(source: Source, state: dict[str, Tensor]) -> dict[str, Tensor]:
  """Under HuggingFace's names; without selection biases, which must be 0, for a class of none."""
  if not _biased(source):
    for name in [name for name in state if name.endswith("router.bias")]:
      bias = state.pop(name)
      if bias.device.type != "meta" and bias.any():
        raise CheckpointError(
          f"{source.path}: {name} is not 0, but with moe.score = 'softmax' no class of HuggingFace "
          "has a selection bias"
        )
  return to_hf(state)
