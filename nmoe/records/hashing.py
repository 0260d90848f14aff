"""torch.distributed.checkpoint's writer of files, which hashes them while they are written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class HashedFile:
  """A file of bytes that are hashed on their way into it, one after the other."""

  def __init__(self, file: IO[bytes]):
    self.file, self.size, self.hash = file, 0, hashlib.sha256()

  def write(self, data: bytes | memoryview) -> int:
    self.hash.update(data)
    self.size += memoryview(data).nbytes
    return self.file.write(data)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.file, name)


class HashedFiles(FileSystem):
  """The files that this rank writes: name -> size and sha256 of what went into each."""

  def __init__(self) -> None:
    self.written: dict[str, dict[str, Any]] = {}

  @contextmanager
  def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
    with super().create_stream(path, mode) as file:
      if "w" not in mode:
        yield file
        return
      stream = HashedFile(file)
      yield stream
    self.written[Path(path).name] = {"size": stream.size, "sha256": stream.hash.hexdigest()}


class HashingWriter(dcp.FileSystemWriter):
  """Less the path that DCP pickles: Python 3.13 names the class of one otherwise.

  Nothing is copied ahead: the thread that writes makes no CUDA context.
  """

  def __init__(self, folder: Path):
    super().__init__(folder, per_thread_copy_ahead=0)
    self.fs = self.files = HashedFiles()

  def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
    """Raises the OSError of a file itself: the other ranks hear what is raised and nothing of the
    errors behind it, and torch's archive makes an error of its position in the file of it.
    """
    try:
      return super().write_data(plan, planner)
    except RuntimeError as error:
      if (found := below(error)) is error:
        raise
      raise OSError(*found.args) from error

  def storage_meta(self) -> StorageMeta:
    return StorageMeta(save_id=self.save_id)


def below(error: BaseException) -> BaseException:
  """The OSError behind an error, if there is one; else the error itself."""
  found: BaseException | None = error
  while found is not None and not isinstance(found, OSError):
    found = found.__context__
  return found or error
