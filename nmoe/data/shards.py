"""Token shards on disk: `.npy` files, listed with their hashes in `manifest.json`.

A split (train or heldout) of a source is
  {split}-tokens-00000.npy …  uint16 or uint32, every document followed by the separator
  {split}-offsets.npy         uint64 [documents + 1], first token of each document, then the end
  {split}-hashes.npy          uint64 [documents], first 8 bytes (little endian) of a text's sha256
  train-counts.npy            int64 [V], how often each id occurs; of no other split
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nmoe.errors import DataError
from nmoe.files import sha256

FORMAT = 2  # raise it whenever a source would give other tokens, or what is there is not enough
SHARD_TOKENS = 1 << 27
MANIFEST = "manifest.json"


def digest(value: Any) -> str:
  """sha256 of a JSON value in its canonical form, in hex."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
  return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class NpyWriter:
  """A one-dimensional .npy file of unknown length; the header is completed on close."""

  def __init__(self, path: Path, dtype: np.dtype | type):
    self.path, self.dtype, self.length = path, np.dtype(dtype), 0
    self._file = path.open("wb", buffering=0)
    self._header()

  def append(self, values: np.ndarray) -> None:
    data = np.ascontiguousarray(values, dtype=self.dtype).tobytes()
    written = 0
    while written < len(data):
      written += self._file.write(memoryview(data)[written:])
    self.length += len(values)

  def close(self) -> None:
    """Complete the header and put the file on disk."""
    with self._file:
      self._file.seek(0)
      self._header()
      os.fsync(self._file.fileno())

  def abandon(self) -> None:
    """Close as it is, after an error; nothing happens to a closed file."""
    self._file.close()

  def _header(self) -> None:
    shape = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
    np.lib.format.write_array_header_1_0(self._file, shape)


class SplitWriter:
  """Writes one split of a source into a folder; `finish` returns its entry of the manifest.

  counted: how often each id occurs is written too.
  """

  def __init__(self, folder: Path, split: str, vocab_size: int, counted: bool):
    self._folder, self._split = folder, split
    self._dtype = token_dtype(vocab_size)
    self._counts = np.zeros(vocab_size, dtype=np.int64) if counted else None
    self._offsets = NpyWriter(folder / f"{split}-offsets.npy", np.uint64)
    self._hashes = NpyWriter(folder / f"{split}-hashes.npy", np.uint64)
    self._offsets.append(np.zeros(1))
    self._shards: list[NpyWriter] = []
    self._tokens = self._bytes = 0

  def append(self, documents: list[np.ndarray], hashes: np.ndarray, num_bytes: int) -> None:
    """Documents as ids with separators, their hashes (uint64), and the bytes of their text."""
    if not documents:
      return
    if not self._shards or self._shards[-1].length >= SHARD_TOKENS:
      self._roll()
    tokens = np.concatenate(documents)
    self._shards[-1].append(tokens)
    if self._counts is not None:
      self._counts += np.bincount(tokens, minlength=len(self._counts))
    ends = self._tokens + np.cumsum([len(d) for d in documents])
    self._offsets.append(ends)
    self._hashes.append(hashes)
    self._tokens, self._bytes = int(ends[-1]), self._bytes + num_bytes

  def finish(self) -> dict[str, Any]:
    if self._shards:
      self._shards[-1].close()
    self._offsets.close()
    self._hashes.close()
    if self._counts is not None:
      counts = NpyWriter(self._folder / f"{self._split}-counts.npy", np.int64)
      counts.append(self._counts)
      counts.close()
    shards = [{"file": shard.path.name, "tokens": shard.length} for shard in self._shards]
    return {
      "documents": self._hashes.length,
      "tokens": self._tokens,
      "bytes": self._bytes,
      "shards": shards,
    }

  def __enter__(self) -> SplitWriter:
    return self

  def __exit__(self, *error: object) -> None:
    for writer in (self._offsets, self._hashes, *self._shards):
      writer.abandon()

  def _roll(self) -> None:
    if self._shards:
      self._shards[-1].close()
    name = f"{self._split}-tokens-{len(self._shards):05d}.npy"
    self._shards.append(NpyWriter(self._folder / name, self._dtype))


class Stream:
  """The concatenated tokens of a split's shards, memory-mapped."""

  def __init__(self, shards: list[np.ndarray]):
    self._shards = shards
    self._starts = [0, *np.cumsum([len(s) for s in shards]).tolist()]
    self.length: int = self._starts[-1]

  def first(self, length: int) -> Stream:
    """The stream of the first `length` tokens."""
    ends = [max(0, length - start) for start in self._starts[:-1]]
    return Stream([shard[:end] for shard, end in zip(self._shards, ends, strict=True) if end])

  def read(self, offset: int, out: np.ndarray) -> None:
    """Fill `out` with the tokens from `offset` on; behind the last token comes the first."""
    filled = 0
    while filled < len(out):
      i = bisect_right(self._starts, offset) - 1
      at = offset - self._starts[i]
      piece = self._shards[i][at : at + len(out) - filled]
      out[filled : filled + len(piece)] = piece
      filled += len(piece)
      offset = (offset + len(piece)) % self.length


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
  """The manifest's table of the .npy files in a folder: their bytes and hashes."""
  paths = sorted(folder.glob("*.npy"))
  return {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
  """Write manifest.json with a hash over the rest of itself."""
  text = json.dumps({**manifest, "sha256": digest(manifest)}, indent=1)
  with (folder / MANIFEST).open("w", encoding="utf-8") as file:
    file.write(text + "\n")
    file.flush()
    os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
  """The manifest of a folder, checked against its own hash. Raises DataError."""
  path = folder / MANIFEST
  remedy = f"delete {folder} and prepare the mixture again"
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise DataError(f"{path}: no readable manifest ({error}); {remedy}") from error
  if not isinstance(manifest, dict) or "sha256" not in manifest:
    raise DataError(f"{path}: not a manifest of prepared data; {remedy}")
  expected = manifest.pop("sha256")
  found = digest(manifest)
  if found != expected:
    raise DataError(f"{path}: its content hashes to {found}, it states {expected}; {remedy}")
  if manifest.get("format") != FORMAT:
    raise DataError(
      f"{path}: format is {manifest.get('format')}, this version reads {FORMAT}; {remedy}"
    )
  return manifest


def check_files(
  folder: Path, manifest: dict[str, Any], hash_of: Callable[[Path], str] | None = sha256
) -> None:
  """Compare a folder's files with its manifest: sizes, and contents by hash_of. DataError."""
  for name, entry in manifest["files"].items():
    path = folder / name
    remedy = f"delete {folder} and prepare the mixture again"
    try:
      size = path.stat().st_size
      found = hash_of(path) if hash_of else entry["sha256"]
    except OSError as error:
      raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if size != entry["bytes"]:
      raise DataError(f"{path}: holds {size} bytes, the manifest says {entry['bytes']}; {remedy}")
    if found != entry["sha256"]:
      raise DataError(f"{path}: sha256 is {found}, the manifest says {entry['sha256']}; {remedy}")


def load_array(path: Path) -> np.ndarray:
  """A memory-mapped .npy file as a plain read-only array (an empty one is read)."""
  try:
    return np.asarray(np.load(path, mmap_mode="r"))
  except (OSError, ValueError) as error:
    raise DataError(
      f"{path}: not a readable .npy file ({error}); delete {path.parent} and prepare again"
    ) from error


def open_stream(folder: Path, entry: dict[str, Any]) -> Stream:
  return Stream([load_array(folder / shard["file"]) for shard in entry["shards"]])
