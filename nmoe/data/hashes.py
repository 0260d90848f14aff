"""The sha256 of files, remembered: a file of the same size, time and inode is not read again.

    {root}/data/hashes.json   path -> [size, mtime_ns, inode, sha256]

The store is a memory, not a record: it may be deleted at any time, and a file is hashed anew then.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from nmoe.errors import DataError
from nmoe.files import sha256

HASHES = "hashes.json"  # in the folder of prepared data
SETTLED_S = 2.0  # a file may change twice within a tick of its time: younger ones are not kept

Entry = tuple[int, int, int, str]


class Hashes:
  """sha256 of files in hex. As a context, what was learned is written down at its end.

  anew: read every file, whatever is remembered. Processes may use one store at once: the last to
  end decides what it holds. A store that can't be read or written only costs time.
  """

  def __init__(self, path: Path, anew: bool = False):
    self.path = path
    self._known = {} if anew else _stored(path)
    self._learned: dict[str, Entry] = {}

  def __call__(self, file: Path) -> str:
    """Raises DataError if the file cannot be read."""
    key = os.path.abspath(file)
    try:
      stat = os.stat(file)
      state = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
      known = self._known.get(key)
      if known is not None and known[:3] == state:
        return known[3]
      found = sha256(file)
    except OSError as error:
      raise DataError(
        f"{file}: cannot be read: {error}; check the file and its permissions"
      ) from error
    if time.time() - stat.st_mtime > SETTLED_S:
      self._known[key] = self._learned[key] = (*state, found)
    return found

  def __enter__(self) -> Hashes:
    return self

  def __exit__(self, *error: object) -> None:
    if not self._learned:
      return
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      descriptor, beside = tempfile.mkstemp(prefix=".hashes-", dir=self.path.parent)
      with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({**_stored(self.path), **self._learned}, file)
      os.replace(beside, self.path)
    except OSError:
      return  # a full or read-only disk: what was learned is learned again


def _stored(path: Path) -> dict[str, Entry]:
  """What a store holds; a damaged one holds nothing."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {key: (int(a), int(b), int(c), str(d)) for key, (a, b, c, d) in found.items()}
  except (OSError, ValueError, TypeError, AttributeError, RecursionError):
    return {}
