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


CODE = ("nmoe", "stages", "kernels", "configs")
LARGEST = 1 << 20  # bytes of an untracked file in the diff


def provenance(repo: str | Path) -> tuple[str, str, str]:
  """(commit, diff, code_version) of a checkout; commit and diff are "" where git knows no commit.

  The diff holds what differs in the folders of CODE, and nothing else that lies around: the changes
  of tracked files and, whole, the untracked .py and .toml files; `git apply` takes it. Untracked
  files beyond LARGEST are named in its first line. code_version needs no git: 12 hex digits over
  names and bytes of the .py files of nmoe/ and kernels/, which decide what a run computes.
  """
  repo = Path(repo)
  code = hashlib.sha256()
  for path in sorted(p for package in ("nmoe", "kernels") for p in (repo / package).rglob("*.py")):
    code.update(f"{path.relative_to(repo).as_posix()}\0{path.stat().st_size}\0".encode())
    code.update(path.read_bytes())
  commit = _git(repo, "rev-parse", "HEAD").strip()
  diff = _changes(repo) if commit else ""
  return commit, diff, code.hexdigest()[:12]


def _changes(repo: Path) -> str:
  tracked = _git(repo, "diff", "HEAD", "--no-color", "--no-ext-diff", "--relative", "--", *CODE)
  listed = _git(repo, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
  names = [name for name in listed.split("\0") if name.endswith((".py", ".toml"))]
  large = [name for name in names if (repo / name).stat().st_size > LARGEST]
  added = "".join(_added(repo, name) for name in names if name not in large)
  return (f"left out: {', '.join(large)}\n" if large else "") + tracked + added


def _added(repo: Path, name: str) -> str:
  """A new file as git's diff shows it."""
  text = (repo / name).read_text(encoding="utf-8", errors="replace")
  lines = text.split("\n")
  ended = lines.pop() == ""
  if not ended:
    lines = text.split("\n")
  head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
  if not text:
    return head
  body = "".join(f"+{line}\n" for line in lines)
  end = "" if ended else "\\ No newline at end of file\n"
  return f"{head}--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n{body}{end}"


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
