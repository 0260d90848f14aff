"""What the folders of checkpoints say of themselves, for those who do not load tensors.

A checkpoint is a folder step_00000300 whose manifest.json is written last: format, step, the run
and its configuration, how many tokens and samples it was trained on, sha256 and size of every other
file, and a sha256 over all that. Does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nmoe.errors import CheckpointError, CorruptError

FORMAT = 2
_NAME = re.compile(r"step_(\d{8})")


def steps(folder: Path) -> list[int]:
  """The finished checkpoints of a run, ascending."""
  if not folder.is_dir():
    return []
  folders = (p for p in folder.iterdir() if p.is_dir())
  return sorted(int(m[1]) for p in folders if (m := _NAME.fullmatch(p.name)))


def remedy_of(path: Path) -> str:
  """What to do about a damaged checkpoint: a run may have earlier ones, an import is made again."""
  if path.absolute().parent.parent.name == "imports":
    return "run `nmoe import` on the model's folder again"
  return f"delete {path} to resume from an earlier step"


def manifest(path: Path) -> dict[str, Any]:
  """The manifest of a finished checkpoint."""
  file, remedy = path / "manifest.json", remedy_of(path)
  try:
    found = json.loads(file.read_text())
  except (OSError, ValueError) as error:
    raise CorruptError(f"{file} cannot be read ({error}); {remedy}") from error
  if not isinstance(found, dict) or found.get("format") != FORMAT:
    format = found.get("format") if isinstance(found, dict) else None
    raise CheckpointError(f"{file} has format {format}, this version reads {FORMAT}; {remedy}")
  stated = found.pop("sha256", None)
  if stated != (hashed := digest(found)):
    raise CorruptError(f"{file} hashes to {hashed}, it states {stated}; {remedy}")
  place = _NAME.fullmatch(path.name)
  if place is not None and int(place[1]) != found["step"]:
    raise CheckpointError(
      f"{path} holds step {found['step']}: rename it to step_{found['step']:08d}, or {remedy}"
    )
  return found


def digest(manifest: dict[str, Any]) -> str:
  """The sha256 that a manifest states of all else in it."""
  text = json.dumps(manifest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
