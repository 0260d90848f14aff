"""Files: their hash, their folder, the locks that processes take on them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from nmoe.errors import ConfigError

STALE_S = 3600.0  # nobody writes one file for so long


def sha256(path: Path) -> str:
  """Of the content, in hex. Raises OSError."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def resolved(path: str | Path) -> Path:
  """Absolute, without links; a leading ~ is a home folder. Of a circle of links: the path itself,
  which the first use of it refuses. ConfigError for a relative one in a folder that is gone.
  """
  try:
    return Path(os.path.realpath(os.path.expanduser(path)))
  except FileNotFoundError as error:
    raise ConfigError(
      f"{path} is of the current folder, which is gone; go to another, or name a whole path"
    ) from error


def check_out(path: Path | None) -> None:
  """ConfigError if an --out cannot become a file: before what is to stand there is measured."""
  if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
    raise ConfigError(f"--out {path} is no file of a folder that is there; name another")


def existing(path: Path) -> Path:
  """The path itself or the nearest folder above it that is there."""
  path = path.absolute()
  return path if path.exists() else existing(path.parent)


def replace(path: Path, text: str) -> Path:
  """Write a file that a reader finds as it was or as it is to be, whoever else writes it too.

  What a writer that was killed left beside it an hour ago is removed. Raises OSError.
  """
  for left in path.parent.glob(f".{path.name}-*.new"):
    with suppress(FileNotFoundError):
      if time.time() - left.stat().st_mtime > STALE_S:
        left.unlink()
  new = path.with_name(f".{path.name}-{secrets.token_hex(4)}.new")
  try:
    new.write_text(text, encoding="utf-8")
    return new.rename(path)
  finally:
    new.unlink(missing_ok=True)


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
