"""Files: their hash, their folder, the locks that processes take on them; and what is filled under
another name until it is whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from nmoe.errors import CheckpointError, ConfigError

STALE_S = 3600.0  # nobody writes one file for so long
TURN_S = 5.0  # in which a process has looked and begun, however slow the machine
_PARTIAL = re.compile(r"\.(.+)-[0-9a-f]{8}\.partial", re.DOTALL)


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
  """Write a file as `replacing` does. Raises OSError."""
  with replacing(path) as new:
    new.write_text(text, encoding="utf-8")
  return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """The name under which to write a file that a reader finds as it was or as it is to be, whoever
  else writes it too: it is renamed at the end.

  What a writer that was killed left beside it an hour ago is removed. Raises OSError.
  """
  for left in path.parent.glob(f".{path.name}-*.new"):
    with suppress(FileNotFoundError):
      if time.time() - left.stat().st_mtime > STALE_S:
        left.unlink()
  new = path.with_name(f".{path.name}-{secrets.token_hex(4)}.new")
  try:
    yield new
    new.rename(path)
  finally:
    new.unlink(missing_ok=True)


@contextmanager
def unfinished(parent: Path, name: str) -> Iterator[Path]:
  """A new hidden folder of `parent` to fill; what is not renamed by then is removed.

  It is locked meanwhile, so that others see whether who fills it lives. Raises OSError.
  """
  parent.mkdir(parents=True, exist_ok=True)
  folder, handle = _begun(parent, name)
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)


@contextmanager
def alone(out: Path) -> Iterator[Path]:
  """A folder of `unfinished` for what is to be at `out`; CheckpointError where another process has
  one: of several that ask at once, the first gets it. Raises OSError.
  """
  out.parent.mkdir(parents=True, exist_ok=True)
  with ExitStack() as filling:
    with _turn(out.parent):
      check_alone(out)
      partial = filling.enter_context(unfinished(out.parent, out.name))
    yield partial


def check_alone(out: Path) -> None:
  """CheckpointError if another process fills a folder of `unfinished` that is to be at `out`."""
  if busy := under_way(out.parent, out.name):
    raise CheckpointError(
      f"another process is writing {out}, in {busy[0]}; wait for it, or name another place"
    )


def check_empty(out: Path) -> None:
  """CheckpointError unless a folder can come to `out`: nothing is there, or an empty one."""
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise CheckpointError(f"{out} is there already; name an empty or new folder")


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
  """One process at a time looks whether others are at something in a folder, and begins.

  Without locks, or where another program keeps the folder's, it is not waited for.
  """
  handle, until = None, time.monotonic() + TURN_S
  try:
    with suppress(OSError):
      handle = os.open(folder, os.O_RDONLY)
      while not lock(handle) and time.monotonic() < until:
        time.sleep(0.01)
    yield
  finally:
    if handle is not None:
      os.close(handle)


def _begun(parent: Path, name: str) -> tuple[Path, int]:
  """A new folder and its locked handle."""
  while True:
    folder = parent / f".{name}-{secrets.token_hex(4)}.partial"
    folder.mkdir()
    with suppress(FileNotFoundError):  # taken for a killed one's before it was locked
      handle = os.open(folder, os.O_RDONLY)
      with suppress(OSError):  # a filesystem without locks: nobody clears there
        lock(handle, wait=True)
      if folder.exists():
        return folder, handle
      os.close(handle)


def under_way(parent: Path, name: str) -> list[Path]:
  """The folders of `unfinished` of this name that somebody may fill now."""
  found = []
  for folder in _partials(parent, name):
    with _taken(folder, shared=True) as left:
      found += [] if left else [folder]
  return found


def clear_unfinished(parent: Path, name: str) -> list[Path]:
  """Remove what killed processes left of `unfinished` under this name; the folders removed."""
  removed = []
  for folder in _partials(parent, name):
    with _taken(folder) as left:
      if left:
        shutil.rmtree(folder, ignore_errors=True)
        removed += [] if folder.exists() else [folder]
  return removed


def _partials(parent: Path, name: str) -> list[Path]:
  paths = []
  with suppress(OSError):  # none there, or not for us to see
    paths = sorted(parent.iterdir())
  return [p for p in paths if (m := _PARTIAL.fullmatch(p.name)) and m[1] == name]


@contextmanager
def _taken(folder: Path, shared: bool = False) -> Iterator[bool]:
  """Whether nobody fills a folder, which is locked then. Of one that cannot be opened, or on a
  filesystem without locks, nobody knows: False.
  """
  handle, left = None, False
  with suppress(OSError):
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    left = lock(handle, shared=shared)
  try:
    yield left
  finally:
    if handle is not None:
      os.close(handle)


def publish(partial: Path, folder: Path) -> None:
  """Rename a folder to a name that says what is in it; that another was faster is as good. Raises
  OSError.
  """
  try:
    partial.rename(folder)
  except OSError:
    if not folder.exists():
      raise


def lock(file: IO | int, *, shared: bool = False, wait: bool = False) -> bool:
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
