"""Checkpoints: one directory a step, written beside and renamed, hashed, verified at load.

  {root}/checkpoints/{run_id}/step_00000300/
    manifest.json     format, step, configuration, fingerprint, sha256 and size of every other file,
                      and a sha256 over all that
    .metadata, *.distcp   torch.distributed.checkpoint's own files

Tensors are stored by parameter name, experts one by one under their global id
(`layers.3.moe.experts.17.w13`), so a checkpoint does not know how many ranks wrote it: any number
of ranks that divides the experts reads it. What several ranks hold is stored once; of what they own
in parts (`Part`) each stores its own. A directory without the final name is unfinished and is
never read. `.metadata` is a pickle by DCP: it is read first with the classes it needs and no other,
and may name tensors only. A run saves through `Writer`: its steps wait for a copy to host memory
only. Each rank hashes the files that it writes while it writes them; of n ranks that load, rank r
verifies the files i with i mod n = r, and all hear what all found.

One file: what is written and what is read back must be changed together.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
  ChunkStorageMetadata,
  Metadata,
  MetadataIndex,
  StorageMeta,
  TensorProperties,
  TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from nmoe.errors import CheckpointError, CommError, CorruptError, DiskFullError, NmoeError
from nmoe.files import existing, sha256
from nmoe.records.hashing import HashingWriter, below
from nmoe.records.manifests import FORMAT, digest, manifest, remedy_of, steps
from nmoe.records.root import Root
from nmoe.records.unpickling import read_metadata

STREAMED = "__0_0.distcp"  # as DCP calls the first file of rank 0
T = TypeVar("T")
STATE = {  # what a checkpoint holds, by the last part of a tensor's name; weights are the rest
  "moments": ("exp_avg", "exp_avg_sq", "momentum"),
  "masters": ("master",),
  "router biases": ("bias",),
  "optimizer steps": ("steps",),
}
_EXPERT = re.compile(r"(.*\.experts)\.(w13|w2)(\..*)?")


@dataclass(frozen=True)
class Fence:
  """What may forbid an attempt to write: `check` raises an NmoeError. `attempt` names its partial
  checkpoints, so that no other attempt touches them; 0: a run without attempts.
  """

  attempt: int = 0
  check: Callable[[], None] = lambda: None


class Part(Tensor):
  """Rows of a larger tensor. `shape` is theirs, `size()` that of the whole.

  The other methods are how torch.distributed.checkpoint learns where a tensor belongs, so that it
  stores and loads these rows only.
  """

  start: int  # the first row's place in the whole
  whole: int  # number of the whole's rows

  @staticmethod
  def of(rows: Tensor, start: int, whole: int) -> Part:
    """The tensor itself with its place; shares its memory."""
    part = rows.as_subclass(Part)
    part.start, part.whole = start, whole
    return part

  @property
  def rows(self) -> Tensor:
    return self.as_subclass(Tensor)

  def size(self) -> torch.Size:
    return torch.Size((self.whole, *self.shape[1:]))

  def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
    offsets = torch.Size((self.start, *[0] * (self.ndim - 1)))
    return [ChunkStorageMetadata(offsets, self.shape)]

  def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
    (chunk,) = self.__create_chunk_list__()
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.rows), self.size())
    index = MetadataIndex(name, chunk.offsets)
    return [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]

  def __get_tensor_shard__(self, _: object) -> Tensor:
    return self.rows


def directory(root: Path, run_id: str) -> Path:
  return Root(root).checkpoints(run_id)


def split_experts(state: dict[str, Tensor], first_expert: int) -> dict[str, Tensor]:
  """Name each expert's slice by its global id. Slices are views, so loading into them fills the
  whole.
  """
  named = {}
  for key, tensor in state.items():
    match = _EXPERT.fullmatch(key)
    if match is None:
      named[key] = tensor
      continue
    first = first_expert + tensor.start if isinstance(tensor, Part) else first_expert
    for e, matrix in enumerate(tensor.as_subclass(Tensor), first):
      named[f"{match[1]}.{e}.{match[2]}{match[3] or ''}"] = matrix
  return named


def save(
  folder: Path,
  step: int,
  state: dict[str, Tensor],
  first_expert: int,
  meta: dict[str, Any],
  group: dist.ProcessGroup | None = None,
  fence: Fence | None = None,
) -> Path:
  """Write state as checkpoint `step`; every rank calls it. Returns the finished directory.

  group: the ranks, by gloo; None is the default group, if there is one. Raises CheckpointError on
  every rank, leaving earlier checkpoints untouched and no half of this one. fence: rank 0 asks it
  before it takes the final name; its NmoeError is raised on every rank.
  """
  final, beside = folder / f"step_{step:08d}", folder / f"step_{step:08d}.partial"
  if fence is not None and fence.attempt:
    beside = beside.with_name(f"{beside.name}-{fence.attempt}")
  named, single = split_experts(state, first_expert), not dist.is_initialized()

  def begin() -> None:
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)

  def finish() -> None:
    _seal(beside, {"format": FORMAT, "step": step, **meta}, written)
    if fence is not None:
      fence.check()
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    _sync(folder)

  try:
    by_rank_0(begin, group)
    with _alone():
      storage = HashingWriter(beside)
      dcp.save(named, storage_writer=storage, process_group=group, no_dist=single)
    written = {
      name: file for part in _gathered(storage.files.written, group) for name, file in part.items()
    }
    by_rank_0(finish, group)
  except NmoeError:
    _clear(beside)
    raise
  except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
    _clear(beside)
    free = shutil.disk_usage(existing(folder)).free
    own = _below(error)
    full = isinstance(own, OSError) and own.errno in (errno.ENOSPC, errno.EDQUOT)
    raise (DiskFullError if full else CheckpointError)(
      f"checkpoint step {step} was not written to {folder} ({_cause(error)}; {free / 2**30:.2f} "
      "GiB free); "
      "earlier checkpoints are intact: free space, then run again to continue"
    ) from error
  return final


class Writer:
  """Writes a run's checkpoints in a thread, one at a time, and keeps the newest `keep`.

  Every rank has one and calls it alike. group: all ranks, a gloo group that nothing else uses. The
  host memory of one more state stays allocated. As a context it ends the write under way, and
  raises its failure unless another error is on its way. fence: what may forbid a checkpoint.

  Where the disk is full, all but the newest and the permanent ones give way, and it is tried once
  more; `pruned` has the step and the error. finished: told of each write's seconds, in its thread.
  """

  def __init__(
    self,
    folder: Path,
    keep: int,
    first_expert: int = 0,
    group: dist.ProcessGroup | None = None,
    fence: Fence | None = None,
    finished: Callable[[float], None] = lambda _: None,
  ):
    self.folder, self.keep, self.first_expert, self.group = folder, keep, first_expert, group
    self.fence = fence or Fence()
    self.finished = finished
    self.pruned: list[tuple[int, str]] = []
    self._host: dict[str, Tensor] = {}
    self._thread = ThreadPoolExecutor(1, "checkpoint")
    self._write: Future | None = None

  @torch.no_grad()
  def copy(self, state: dict[str, Tensor]) -> None:
    """Copy the state to host memory; from then on it may change. Waits for the write before."""
    self.wait()
    for name, x in state.items():
      if name not in self._host:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._host[name] = Part.of(host, x.start, x.whole) if isinstance(x, Part) else host
      self._host[name].copy_(x, non_blocking=True)
    if any(x.is_cuda for x in state.values()):
      torch.cuda.synchronize()

  def start(self, step: int, meta: dict[str, Any]) -> None:
    """Begin to write what was copied as checkpoint `step`."""
    self._write = self._thread.submit(self._save, step, meta)

  @property
  def failed(self) -> bool:
    """Whether a write has failed on this rank meanwhile: `wait`, which all ranks must come to
    alike, raises its error.
    """
    write = self._write
    return write is not None and write.done() and write.exception() is not None

  def wait(self) -> None:
    """Return when the last write is a finished checkpoint. Raises its CheckpointError."""
    write, self._write = self._write, None
    if write is not None:
      write.result()

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
    lost = isinstance(error, CommError)  # without its ranks no write can end
    self._thread.shutdown(wait=not lost)
    if error is None:
      self.wait()
    elif not lost and self._write is not None and (failed := self._write.exception()):
      error.add_note(str(failed))

  def _save(self, step: int, meta: dict[str, Any]) -> None:
    begun = time.monotonic()
    what = (step, self._host, self.first_expert, meta, self.group, self.fence)
    try:
      save(self.folder, *what)
    except DiskFullError as error:
      if not self._made_room():
        raise
      save(self.folder, *what)
      self.pruned.append((step, str(error)))
    if not dist.is_initialized() or dist.get_rank() == 0:
      prune(self.folder, self.keep, self.fence.attempt)
    self.finished(time.monotonic() - begun)

  def _made_room(self) -> bool:
    """Whether there was an older checkpoint to delete. Collective."""
    deleted = []

    def delete() -> None:
      self.fence.check()
      before = steps(self.folder)
      prune(self.folder, 1, self.fence.attempt)
      deleted.extend(set(before) - set(steps(self.folder)))

    by_rank_0(delete, self.group)
    return any(_gathered(deleted, self.group))


def load(
  folder: Path,
  step: int,
  state: dict[str, Tensor],
  first_expert: int,
  group: dist.ProcessGroup | None = None,
) -> None:
  """Fill the tensors of `state` in place from checkpoint `step`, after `verify_together`.
  Collective; group as in `save`.
  """
  verify_together(folder / f"step_{step:08d}", group)
  fill(folder, step, state, first_expert, group)


def fill(
  folder: Path,
  step: int,
  state: dict[str, Tensor],
  first_expert: int,
  group: dist.ProcessGroup | None = None,
) -> None:
  """`load` of a checkpoint that is verified. CheckpointError if it holds another state."""
  path, single = folder / f"step_{step:08d}", not dist.is_initialized()
  try:
    with _alone():
      dcp.load(
        split_experts(state, first_expert), checkpoint_id=path, process_group=group, no_dist=single
      )
  except (OSError, RuntimeError, KeyError, dcp.api.CheckpointException) as error:
    raise CheckpointError(f"{path} does not hold this run's state: {_cause(error)}") from error


def save_streamed(
  folder: Path, step: int, state: Iterable[tuple[str, Tensor]], meta: Callable[[], dict[str, Any]]
) -> Path:
  """Write tensors with whole experts as they come, in one process, as checkpoint `step`.

  The host holds the one tensor that is being written. meta is asked after the last of them.
  Returns the finished directory. Raises CheckpointError, and leaves no half of it, nor does an
  error of `state`.
  """
  final, beside = folder / f"step_{step:08d}", folder / f"step_{step:08d}.partial"
  stored = Metadata({}, storage_data={}, storage_meta=StorageMeta())
  try:
    beside.mkdir(parents=True)
    with (beside / STREAMED).open("wb") as file:
      for name, tensor in state:
        for key, one in split_experts({name: tensor}, 0).items():
          _append(file, key, one, stored)
    (beside / ".metadata").write_bytes(pickle.dumps(stored))
    _seal(beside, {"format": FORMAT, "step": step, **meta()})
    beside.rename(final)
  except (OSError, RuntimeError) as error:
    free = shutil.disk_usage(existing(folder)).free
    raise CheckpointError(
      f"{final} was not written ({_cause(error)}; {free / 2**30:.2f} GiB free); make room, then "
      "run again"
    ) from error
  finally:
    shutil.rmtree(beside, ignore_errors=True)
  return final


def _append(file: IO[bytes], name: str, tensor: Tensor, stored: Metadata) -> None:
  """A tensor as torch.distributed.checkpoint stores one, and where it lies."""
  begin, none = file.tell(), torch.Size([0] * tensor.ndim)
  torch.save(tensor.detach().clone(memory_format=torch.contiguous_format), file)
  about = TensorProperties.create_from_tensor(tensor)
  chunks = [ChunkStorageMetadata(none, tensor.shape)]
  stored.state_dict_metadata[name] = TensorStorageMetadata(about, tensor.shape, chunks)
  place = _StorageInfo(file.name.rpartition("/")[2], begin, file.tell() - begin)
  stored.storage_data[MetadataIndex(name, none)] = place


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
  """Every wanted tensor of a finished checkpoint on the CPU, experts under their global ids."""
  verify(path)
  stored = Stored.open(path)
  return stored.tensors([name for name in stored.names if wanted(name)])


@dataclass(frozen=True)
class Stored:
  """What a checkpoint that `verify` has seen holds, to read it part by part on the CPU."""

  path: Path
  metadata: Metadata

  @classmethod
  def open(cls, path: Path) -> Stored:
    return cls(path, read_metadata(path))

  @property
  def names(self) -> Mapping[str, TensorStorageMetadata]:
    """Name -> size and dtype of every tensor."""
    return self.metadata.state_dict_metadata

  def about(self, name: str) -> TensorStorageMetadata:
    """Size and dtype of a tensor. CheckpointError for one that it does not hold."""
    if name not in self.names:
      raise CheckpointError(f"{self.path} holds no {name!r}; is it of another model?")
    return self.names[name]

  def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
    """These tensors. CheckpointError for one that it does not hold."""
    state = {}
    for name in names:
      about = self.about(name)
      state[name] = torch.empty(about.size, dtype=about.properties.dtype)
    self.fill(state)
    return state

  def fill(self, state: dict[str, Tensor]) -> None:
    """Read these tensors in place, experts as views by their global ids.

    CheckpointError for one that it does not hold, or of another shape.
    """
    for name, tensor in state.items():
      if (held := self.about(name).size) != tensor.shape:
        raise CheckpointError(
          f"{self.path}: {name} is {tuple(held)}, its configuration says {tuple(tensor.shape)}; is "
          "it of another model?"
        )
    with _alone():
      dcp.load(state, storage_reader=_Opened(self), no_dist=True)


class _Opened(dcp.FileSystemReader):
  """Reads files by the metadata that was read and checked already."""

  def __init__(self, stored: Stored):
    super().__init__(stored.path)
    self.metadata = stored.metadata

  def read_metadata(self, *_: Any, **__: Any) -> Metadata:
    return self.metadata


def kind(name: str) -> str:
  """What a tensor of a checkpoint is: a key of STATE, or "weights"."""
  last = name.rpartition(".")[2]
  return next((what for what, names in STATE.items() if last in names), "weights")


def verify_together(path: Path, group: dist.ProcessGroup | None = None) -> None:
  """`verify`, each rank its share of the files; what one finds is a CorruptError on all."""
  if not dist.is_initialized():
    verify(path)
    return
  found = ""
  try:
    verify(path, dist.get_rank(), dist.get_world_size())
  except CheckpointError as error:
    found = str(error)
  wrong = [one for one in _gathered(found, group) if one]
  if wrong:
    raise CorruptError(wrong[0])


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
  """Compare the files i ≡ part mod parts with the manifest's size and sha256; CorruptError names
  the first that differs.
  """
  files = sorted(manifest(path)["files"].items())
  for name, want in files[part::parts]:
    file = path / name
    if not file.is_file():
      raise CorruptError(f"{file} is missing; {remedy_of(path)}")
    size = file.stat().st_size
    if size != want["size"] or (hashed := sha256(file)) != want["sha256"]:
      found = f"size {size}" if size != want["size"] else f"sha256 {hashed[:12]}"
      raise CorruptError(
        f"{file} is corrupt: {found}, manifest has size {want['size']} and sha256 "
        f"{want['sha256'][:12]}; {remedy_of(path)}"
      )
  read_metadata(path)


def prune(folder: Path, keep: int, attempt: int = 0) -> None:
  """Delete all but the newest `keep` checkpoints, and what `attempt` and those before it left
  unfinished: a newer one's is not theirs. Permanent ones stay.

  Before any is deleted the newest is verified: CheckpointError, and all stay, if it is corrupt.
  """
  paths = [folder / f"step_{step:08d}" for step in steps(folder)]
  old = [path for path in paths[:-keep] if not _is_permanent(path)]
  if old:
    verify(paths[-1])
  for path in old:
    shutil.rmtree(path)
  for partial in folder.glob("step_*.partial*"):
    if int(partial.name.partition(".partial")[2].removeprefix("-") or 0) <= attempt:
      shutil.rmtree(partial, ignore_errors=True)


def _is_permanent(path: Path) -> bool:
  """Whether it was written to be kept for good. One that cannot be read is not."""
  try:
    return bool(manifest(path).get("permanent"))
  except CheckpointError:
    return False


def set_aside(path: Path, group: dist.ProcessGroup | None = None) -> None:
  """Rename a checkpoint that is corrupt to PATH.corrupt, for people to look at. Collective."""

  def rename() -> None:
    corrupt = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(corrupt, ignore_errors=True)
    path.rename(corrupt)
    _sync(path.parent)

  by_rank_0(rename, group)


def _clear(partial: Path) -> None:
  if not dist.is_initialized() or dist.get_rank() == 0:
    shutil.rmtree(partial, ignore_errors=True)


def _gathered(mine: T, group: dist.ProcessGroup | None) -> list[T]:
  """Every rank's, by rank."""
  if not dist.is_initialized():
    return [mine]
  told = [mine] * dist.get_world_size()
  dist.all_gather_object(told, mine, group)
  return told


def by_rank_0(action: Callable[[], None], group: dist.ProcessGroup | None) -> None:
  """Do it on rank 0; all ranks go on after it, or raise its OSError or NmoeError."""
  failed = None
  single = not dist.is_initialized()
  if single or dist.get_rank() == 0:
    try:
      action()
    except (OSError, NmoeError) as error:
      failed = error
  if not single:
    told = [failed]
    dist.broadcast_object_list(told, group_src=0, group=group)
    failed = told[0]
  if failed is not None:
    raise failed


@contextmanager
def _alone() -> Iterator[None]:
  """Without DCP's warning, at every call, that one process saves or loads by itself."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    yield


def _seal(
  path: Path, meta: dict[str, Any], written: Mapping[str, dict[str, Any]] | None = None
) -> None:
  """Write the manifest and flush everything to the disk. written: what is known of the files; the
  others are read.
  """
  files, known = {}, written or {}
  for file in sorted(p for p in path.iterdir() if p.name != "manifest.json"):
    files[file.name] = known.get(file.name)
    if files[file.name] is None:
      files[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
      _sync(file)
  sealed = {**meta, "files": files}
  (path / "manifest.json").write_text(json.dumps({**sealed, "sha256": digest(sealed)}, indent=1))
  _sync(path / "manifest.json")
  _sync(path)


def _sync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _below(error: BaseException) -> BaseException:
  """The rank's own error below DCP's, or the OSError behind it."""
  if isinstance(error, dcp.api.CheckpointException):
    error = next(iter(error.failures.values()))[0]
  return below(error)


def _cause(error: BaseException) -> str:
  own = _below(error)
  lines = str(own).strip().splitlines()
  return f"{type(own).__name__}: {lines[-1] if lines else ''}"
