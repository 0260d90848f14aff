"""The versions that nmoe asks for, read from its own project file, and those that are installed.

A pre-release counts (4.0.0b36), and a local part (2.13.0+cu130) does not.

NVSHMEM stands here and in no extra: torch's CUDA wheel pins an older one, so that pip would refuse
to install both. It goes on top: `pip install --no-deps nvidia-nvshmem-cu13==3.8.0`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tomli
from packaging.requirements import Requirement as Line
from packaging.specifiers import SpecifierSet

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
NVSHMEM = "nvidia-nvshmem-cu13==3.8.0"  # needed with the extra `cuda`


@dataclass(frozen=True)
class Requirement:
  """One line of the project file; `extra` is "" for what every installation has."""

  name: str
  line: str  # as pip takes it, e.g. "quack-kernels==0.6.5"
  extra: str

  def allows(self, version: str | None) -> bool:
    """Whether an installed version (None: not installed) satisfies the line."""
    return version is not None and satisfies(version, str(Line(self.line).specifier))


def satisfies(version: str, clauses: str) -> bool:
  """Whether the version meets all clauses, e.g. ">=3.11,<3.15" (PEP 440)."""
  return SpecifierSet(clauses).contains(version, prereleases=True)


def requirements() -> list[Requirement]:
  """Every requirement, from the checkout's project file or, without one, the installed metadata;
  NVSHMEM as one of the extra `cuda`.
  """
  return [*_declared(), _requirement(NVSHMEM, "cuda")]


def _declared() -> list[Requirement]:
  if _PROJECT.is_file():
    project = tomli.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    return [_requirement(line, extra) for extra, lines in extras.items() for line in lines]
  extras = metadata.metadata("nmoe").get_all("Provides-Extra") or ()
  return [_requirement(line, _extra(line, extras)) for line in metadata.requires("nmoe") or ()]


def python_clauses() -> str:
  """The project's requires-python, e.g. ">=3.11,<3.13"."""
  if _PROJECT.is_file():
    return tomli.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["requires-python"]
  return metadata.metadata("nmoe")["Requires-Python"]


def installed(name: str) -> str | None:
  """The installed version of a distribution, or None."""
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None


def pip_line(wanted: list[Requirement]) -> str:
  """The command that installs the requirements."""
  alone = "--no-deps " if [r.line for r in wanted] == [NVSHMEM] else ""
  return f"pip install {alone}" + " ".join(f"'{r.line}'" for r in wanted)


def _requirement(line: str, extra: str) -> Requirement:
  parsed = Line(line)
  parsed.marker = None
  return Requirement(parsed.name, str(parsed), extra)


def _extra(line: str, extras: Iterable[str]) -> str:
  """The extra that a line of metadata belongs to; "" if to every installation."""
  marker = Line(line).marker
  if marker is None or marker.evaluate({"extra": ""}):
    return ""
  return next((extra for extra in extras if marker.evaluate({"extra": extra})), "")
