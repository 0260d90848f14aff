"""What decides a run beside its configuration and data: its code, the versions, the machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
  "torch",
  "numpy",
  "datasets",
  "tiktoken",
  "duckdb",
  "quack-kernels",
  "nvidia-cutlass-dsl",
)


def provenance(repo: str | Path) -> tuple[str, str, str]:
  """(commit, diff, code_version) of a checkout; commit and diff are "" where git knows no commit.

  The diff holds the changes of tracked files and, whole, the untracked .py and .toml files.
  code_version needs no git: 12 hex digits over names and bytes of the .py files of nmoe/ and
  kernels/, which decide what a run computes.
  """
  repo = Path(repo)
  code = hashlib.sha256()
  for path in sorted(p for package in ("nmoe", "kernels") for p in (repo / package).rglob("*.py")):
    code.update(f"{path.relative_to(repo).as_posix()}\0{path.stat().st_size}\0".encode())
    code.update(path.read_bytes())
  commit = _git(repo, "rev-parse", "HEAD").strip()
  diff = _git(repo, "diff", "HEAD", "--no-color", "--no-ext-diff", "--relative") if commit else ""
  listed = ("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "*.toml")
  for name in filter(None, _git(repo, *listed).split("\0") if commit else ()):
    diff += _git(repo, "diff", "--no-color", "--no-ext-diff", "--no-index", "--", "/dev/null", name)
  return commit, diff, code.hexdigest()[:12]


def _git(repo: Path, *arguments: str) -> str:
  """git's output; "" where git is missing or fails (1 is `diff --no-index`: files differ)."""
  try:
    done = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, timeout=60)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.decode(errors="replace") if done.returncode in (0, 1) else ""


def environment() -> dict[str, str]:
  """The versions and the machine that a record keeps."""
  found = {"python": sys.version.split()[0], "platform": platform.platform()}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found
