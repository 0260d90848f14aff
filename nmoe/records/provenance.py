"""What decides a run beside its configuration and data: its code, the versions, the machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from nmoe.errors import OtherCodeError

REPO = Path(__file__).resolve().parents[2]  # the checkout, or what it is installed as

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
AS_IT_IS = (  # a diff that `git apply` takes, whatever the user has configured
  *("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--relative"),
  *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short"),
)
GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_PREFIX")


def provenance(repo: str | Path) -> tuple[str, str, str]:
  """(commit, diff, code_version) of a checkout; commit and diff are "" where git knows no commit.

  The diff holds what differs in the folders of CODE, and nothing else that lies around: the changes
  of tracked files and, whole, the untracked .py and .toml files; `git apply` takes it. Untracked
  files beyond LARGEST are named in its first line. code_version needs no git: 12 hex digits over
  names and bytes of the .py files of nmoe/ and kernels/, which decide what a run computes.
  """
  repo = Path(repo)
  ours = _git(repo, "ls-files", "--", CODE[0])  # a package of some other checkout's .venv is not
  commit = _git(repo, "rev-parse", "HEAD").strip() if ours else ""
  diff = _changes(repo) if commit else ""
  return commit, diff, code_version(repo)


def code_version(repo: Path = REPO) -> str:
  """12 hex digits over names and bytes of a checkout's .py files that decide what a run does."""
  code = hashlib.sha256()
  found = (p for package in ("nmoe", "kernels") for p in (repo / package).rglob("*.py"))
  for path in sorted(p for p in found if p.is_file()):  # no editor's lock, a link to nowhere
    code.update(f"{path.relative_to(repo).as_posix()}\0{path.stat().st_size}\0".encode())
    code.update(path.read_bytes())
  return code.hexdigest()[:12]


@cache
def imported() -> tuple[str, dict[str, str]]:
  """(code_version, environment) of this process: as they were at the first call, which belongs
  before the import of what they cover.
  """
  return code_version(), environment()


def check_code(run_id: str, recorded: str) -> None:
  """OtherCodeError unless this process has imported the code that a run's record states.

  It has, if the files were that code before the imports and still are after them.
  """
  before, now = imported()[0], code_version()
  for version in (before, now):
    if version != recorded:
      raise OtherCodeError(
        f"run {run_id} is recorded with code {recorded}, but this process imported {version} from "
        f"{REPO}: files of nmoe/ or kernels/ were changed meanwhile; restore them and run again to "
        "go on; under the new code another run begins, or `nmoe prod launch --accept-code` goes on"
      )


def differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
  """Versions of a record that were found to be others, for people."""
  pairs = ((name, value, found.get(name, "none")) for name, value in recorded.items())
  return [f"{name} {value}, here {here}" for name, value, here in pairs if value != here]


def check_versions(run_id: str, recorded: Mapping[str, str]) -> None:
  """OtherCodeError unless this process found the versions that a run's record states."""
  changed = differences(recorded, imported()[1])
  if changed:
    raise OtherCodeError(
      f"run {run_id} is recorded with {'; '.join(changed)}: packages were changed after it was "
      "recorded; restore them, or run again for a new run"
    )


def _changes(repo: Path) -> str:
  tracked = _git(repo, "diff", "HEAD", *AS_IT_IS, "--", *CODE)
  listed = _git(repo, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
  named = [name for name in listed.split("\0") if name.endswith((".py", ".toml"))]
  names = [name for name in named if (repo / name).is_file()]
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
  """git's output about the repository that the folder lies in, whoever owns it and whatever git's
  environment names; "" where git is missing or fails.
  """
  unset = [word for name in GIT_PLACES for word in ("-u", name)]
  command = ["env", *unset, "git", "-c", "safe.directory=*", "-C", str(repo), *arguments]
  try:
    done = subprocess.run(command, capture_output=True, timeout=60)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def environment() -> dict[str, str]:
  """The versions and the machine that a record keeps."""
  found = {"python": sys.version.split()[0], "platform": platform.platform()}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found
