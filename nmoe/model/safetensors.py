"""Weights in safetensors files: a folder of them read by name, and shards written as they come.

A file is a length of 8 bytes, a header of JSON (name -> dtype, shape, place) and the bytes of the
tensors. The writer needs names, dtypes and shapes before the first tensor, and holds none of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nmoe.errors import CheckpointError
from nmoe.model.hf_folder import BLOCK, INDEX, SINGLE, weight_map

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
MAPPED = 1 << 28  # bytes of files that a reader keeps in memory
FLOATS = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
FP8, SCALES = {"F8_E4M3": torch.bfloat16}, (*FLOATS, "F8_E8M0")  # fp8 weights as they come
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has yet to fetch


@dataclass(frozen=True)
class Entry:
  """A tensor that a shard is to hold."""

  name: str
  dtype: torch.dtype
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    return self.dtype.itemsize * torch.Size(self.shape).numel()


class ShardWriter:
  """Writes tensors in the order of `entries` into shards of at most `limit` bytes each (a larger
  tensor has one of its own), and model.safetensors.index.json.

  `sha256` has the hash of each tensor's bytes, `files` that of each finished file.
  """

  def __init__(self, folder: Path, entries: Sequence[Entry], limit: int):
    self.folder, self.sha256, self.files = folder, {}, {}
    self._shards = _shards(entries, limit)
    self._names = [
      f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors" for i in range(len(self._shards))
    ]
    self._entries = self._write()
    next(self._entries)

  def write(self, name: str, tensor: Tensor) -> None:
    """The next tensor; it must be the one announced."""
    self._entries.send((name, tensor))

  def finish(self) -> None:
    """Write the index, after the last tensor."""
    places = {
      entry.name: file
      for file, shard in zip(self._names, self._shards, strict=True)
      for entry in shard
    }
    assert places.keys() == self.sha256.keys()
    total = sum(entry.num_bytes for shard in self._shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

  def _write(self) -> Iterator[None]:
    for file, shard in zip(self._names, self._shards, strict=True):
      digest = hashlib.sha256()
      with (self.folder / file).open("wb") as stream:
        for part in _header(shard):
          digest.update(part)
          stream.write(part)
        for i, entry in enumerate(shard):
          name, tensor = yield
          assert (name, tensor.dtype, tuple(tensor.shape)) == (entry.name, entry.dtype, entry.shape)
          data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
          self.sha256[name] = hashlib.sha256(data).hexdigest()
          digest.update(data)
          stream.write(data)
          if i + 1 == len(shard):
            stream.flush()
            self.files[file] = digest.hexdigest()
    yield


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
  shards: list[list[Entry]] = [[]]
  size = 0
  for entry in entries:
    if shards[-1] and size + entry.num_bytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(entry)
    size += entry.num_bytes
  return shards


def _header(shard: Sequence[Entry]) -> tuple[bytes, bytes]:
  """The length of the header and the header, which ends at a multiple of 8 bytes."""
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  end = 0
  for entry in shard:
    begin, end = end, end + entry.num_bytes
    place = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    header[entry.name] = place
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little"), text


class Folder(Mapping[str, Tensor]):
  """The tensors of a model's folder by name, read when they are asked for.

  DeepSeek's fp8 weights (`X.weight` with `X.weight_scale_inv`, a scale per 128 x 128 block) come as
  bf16, without their scales. As a context it closes the files. Raises CheckpointError for files
  that are missing, broken, or not what the index says.
  """

  def __init__(self, folder: Path):
    self.folder, self._open, self._stack = folder, {}, ExitStack()
    self._mapped = 0  # bytes read since the files were opened
    self._places = self._places_of(weight_map(folder))
    self._scales = {
      name
      for name in self._places
      if name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") in self._places
    }

  def __getitem__(self, name: str) -> Tensor:
    if name in self._scales:
      raise KeyError(name)
    tensor = self._tensor(name)
    scale = f"{name}_scale_inv"
    return dequantized(name, tensor, self._tensor(scale)) if scale in self._scales else tensor

  def described(self) -> dict[str, Tensor]:
    """Every tensor without its numbers (on device meta), to check names, shapes and types in no
    time.

    Raises CheckpointError for one of a type that is no weight's: integers, or fp8 without scales.
    """
    return {name: self._described(name) for name in self}

  def _described(self, name: str) -> Tensor:
    about, scale = self._opened(self._places[name]).get_slice(name), f"{name}_scale_inv"
    kind, shape = about.get_dtype(), about.get_shape()
    types = FLOATS if scale not in self._scales else FP8
    if kind not in types:
      raise CheckpointError(
        f"{self.folder}: {name!r} is of type {kind}; weights are {', '.join(FLOATS)}, or "
        f"{', '.join(FP8)} beside {name}_scale_inv"
      )
    if scale in self._scales:
      scales = self._opened(self._places[scale]).get_slice(scale)
      if (found := scales.get_dtype()) not in SCALES:
        raise CheckpointError(
          f"{self.folder}: {scale!r} is of type {found}; scales are {', '.join(SCALES)}"
        )
      _check_scales(name, shape, scales.get_shape())
    return torch.empty(shape, dtype=types[kind], device="meta")

  def __iter__(self) -> Iterator[str]:
    return (name for name in self._places if name not in self._scales)

  def __len__(self) -> int:
    return len(self._places) - len(self._scales)

  def __enter__(self) -> Folder:
    return self

  def __exit__(self, *_: object) -> None:
    self._stack.close()

  def _tensor(self, name: str) -> Tensor:
    """Pages of a file that were read stay in this process until the file is closed, so it is."""
    file = self._places[name]
    if self._mapped > MAPPED:
      self._stack.close()
      self._open.clear()
      self._mapped = 0
    tensor = self._opened(file).get_tensor(name)
    self._mapped += tensor.nbytes
    return tensor

  def _opened(self, file: str) -> safe_open:
    if file not in self._open:
      self._open[file] = self._stack.enter_context(safe_open(self.folder / file, "pt"))
    return self._open[file]

  def _places_of(self, weight_map: dict[str, str] | None) -> dict[str, str]:
    held: dict[str, str] = {}
    for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]:
      try:
        self._opened(file)
      except (OSError, SafetensorError) as error:
        raise CheckpointError(
          f"{self.folder / file} cannot be read ({error}); {_remedy(self.folder / file)}"
        ) from error
      for name in sorted(self._open[file].keys()):
        if name in held:
          raise CheckpointError(f"{self.folder}: {name!r} is in {held[name]} and in {file}")
        held[name] = file
    if weight_map is not None and held != weight_map:
      name = min(n for n in held.keys() | weight_map if held.get(n) != weight_map.get(n))
      raise CheckpointError(
        f"{self.folder}: {name!r} is in {held.get(name, 'no file')}, the index says "
        f"{weight_map.get(name, 'none')}"
      )
    return held


def _remedy(path: Path) -> str:
  """For a file that is no safetensors."""
  try:
    with path.open("rb") as stream:
      pointer = stream.read(len(POINTER)) == POINTER
  except OSError:
    pointer = False
  return (
    "it is a pointer: run `git lfs pull` in its folder" if pointer else "fetch the folder again"
  )


def check_finite(where: Path, name: str, tensor: Tensor) -> None:
  """CheckpointError for a NaN or an infinite number; makes no tensor of its own."""
  if not all(map(torch.isfinite, tensor.aminmax())):
    raise CheckpointError(
      f"{where}: {name} has numbers that are not finite; it is no trained model"
    )


def dequantized(name: str, weight: Tensor, scale: Tensor) -> Tensor:
  """weight [O, I] in fp8 times its scales [⌈O / 128⌉, ⌈I / 128⌉], rounded to bf16."""
  _check_scales(name, weight.shape, scale.shape)
  rows, columns = weight.shape
  wide = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
  return (weight.float() * wide).bfloat16()


def _check_scales(name: str, weight: Sequence[int], scale: Sequence[int]) -> None:
  if len(weight) != 2:
    raise CheckpointError(f"{name}: an fp8 weight {tuple(weight)} is no matrix of {BLOCK}-blocks")
  wanted = tuple(-(-size // BLOCK) for size in weight)
  if tuple(scale) != wanted:
    raise CheckpointError(
      f"{name}: an fp8 weight {tuple(weight)} has scales {tuple(scale)}, {wanted} are needed"
    )
