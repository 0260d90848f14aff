"""Roots of known metrics, and the hash of all that is in one."""

import hashlib
from pathlib import Path

from nmoe.records.metrics import Metrics

RUN = "20261123-142233-ab12"


def tree_hash(folder: Path) -> str:
  """Of every name, size, time and byte."""
  seen = hashlib.sha256()
  for path in sorted(folder.rglob("*")):
    at = path.lstat()
    seen.update(f"{path.relative_to(folder)} {at.st_mtime_ns} {at.st_size}\n".encode())
    seen.update(path.read_bytes() if path.is_file() else b"")
  return seen.hexdigest()


def write(root: Path, steps: range, run: str = RUN, scale: float = 1.0) -> None:
  writer = Metrics(root, run)
  for step in steps:
    writer.add(step, step * 10, {"loss": scale * step, "lr": 0.5})
  writer.flush()
