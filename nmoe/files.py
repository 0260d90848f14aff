"""Files: their hash, their folder, the locks that processes take on them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
from pathlib import Path
from typing import IO


def sha256(path: Path) -> str:
  """Of the content, in hex. Raises OSError."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def existing(path: Path) -> Path:
  """The path itself or the nearest folder above it that is there."""
  path = path.absolute()
  return path if path.exists() else existing(path.parent)


def lock(file: IO, *, shared: bool = False, wait: bool = False) -> bool:
  """Take the lock (flock) of an open file; closing it lets go. False if another holds it.

  Raises OSError where the filesystem has no locks.
  """
  kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  try:
    fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EAGAIN, errno.EACCES):
      return False
    raise
  return True
