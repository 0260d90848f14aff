"""The versions that nmoe asks for, read from its own project file, and those that are installed.

Clauses are the few that the project file uses (==, >=, <), compared by release number, == by what
follows it too (4.0.0b36); a local part (2.13.0+cu130) does not count.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tomli

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_COMPARE = {">=": operator.ge, "<": operator.lt}
_CLAUSE = re.compile(r"(==|>=|<)\s*([\w.+]+)")


@dataclass(frozen=True)
class Requirement:
  """One line of the project file; `extra` is "" for what every installation has."""

  name: str
  line: str  # as pip takes it, e.g. "quack-kernels==0.6.5"
  extra: str

  def allows(self, version: str | None) -> bool:
    """Whether an installed version (None: not installed) satisfies the line."""
    return version is not None and satisfies(version, self.line)


def satisfies(version: str, clauses: str) -> bool:
  """Whether the version meets every clause in the text."""
  found = _parts(version)
  bounds = [(sign, _parts(bound)) for sign, bound in _CLAUSE.findall(clauses)]
  return all(
    found == bound if sign == "==" else _COMPARE[sign](found[0], bound[0]) for sign, bound in bounds
  )


def requirements() -> list[Requirement]:
  """Every requirement, from the checkout's project file or, without one, the installed metadata."""
  if _PROJECT.is_file():
    project = tomli.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    return [_requirement(line, extra) for extra, lines in extras.items() for line in lines]
  found = []
  for line in metadata.requires("nmoe") or ():
    line, _, marker = line.partition(";")
    extra = re.search(r"extra == [\"'](\w+)[\"']", marker)
    found.append(_requirement(line.strip(), extra[1] if extra else ""))
  return found


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
  return "pip install " + " ".join(f"'{r.line}'" for r in wanted)


def _requirement(line: str, extra: str) -> Requirement:
  return Requirement(re.match(r"[\w.-]+", line)[0], line, extra)


def _parts(version: str) -> tuple[tuple[int, ...], str]:
  """((4,), "b36") of "4.0.0b36+cu13"; trailing zeros dropped, so that 6 equals 6.0."""
  release, suffix = re.match(r"(\d+(?:\.\d+)*)([^+]*)", version).groups()
  numbers = [int(n) for n in release.split(".")]
  while numbers and numbers[-1] == 0:
    numbers.pop()
  return tuple(numbers), suffix
