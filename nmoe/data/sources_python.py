"""Text found on any machine: the running Python's standard library and installed packages.

`code` gives each .py file. `prose` gives, for each file, its comments and the strings that stand
alone on their lines (docstrings). Both carry the file as their group, so that a held-out file's
docstrings are held out too.
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

from nmoe.data.mixture import PythonSource
from nmoe.data.sources import Document, Documents, Skip, decoded, read_bytes
from nmoe.errors import DataError

_PACKAGES = {"site-packages", "dist-packages"}
_SCANNER = re.compile(
  r"""
    (?P<comment> \#[^\n]* )
  | (?P<string> [rRbBuUfF]{0,2} (?:
      \"{3} (?P<double> [^\"\\]* (?: (?: \\. | \"(?!\"\") ) [^\"\\]* )* ) \"{3}
    | '{3} (?P<single> [^'\\]* (?: (?: \\. | '(?!'') ) [^'\\]* )* ) '{3}
    | \" [^\"\\\n]* (?: \\. [^\"\\\n]* )* \"
    | ' [^'\\\n]* (?: \\. [^'\\\n]* )* '
  ) )
  """,
  re.VERBOSE | re.DOTALL,
)
_REST_BLANK = re.compile(r"[ \t]*(?:\n|\Z)")


def identity(source: PythonSource, hash_of: Callable[[Path], str]) -> list[str]:
  """The files' hashes in order; the interpreter's place does not count."""
  return [hash_of(path) for path in _files(source.tree)]


def documents(source: PythonSource) -> Documents:
  for path in _files(source.tree):
    data = read_bytes(path)
    document = decoded(data, group=data)
    if source.part == "code" or isinstance(document, Skip):
      yield document
    else:
      yield Document(prose(document.text), group=data)


def prose(code: str) -> str:
  """Comments, and triple-quoted strings that stand alone on their lines: blocks in their order.

  Comments of neighbouring lines are one block, without their marks. Escapes stay as written.
  """
  blocks: list[str] = []
  comment_end = -2
  for match in _SCANNER.finditer(code):
    start, end = match.span()
    line_start = code.rfind("\n", 0, start) + 1
    opens_line = not code[line_start:start].strip(" \t")
    if match["comment"] is not None:
      line = match["comment"].lstrip("#!:").strip()
      if opens_line and line_start == comment_end + 1:
        blocks[-1] += "\n" + line
      else:
        blocks.append(line)
      comment_end = end
    elif opens_line and _REST_BLANK.match(code, end):
      body = match["double"] if match["double"] is not None else match["single"]
      blocks.append(inspect.cleandoc(body or ""))
  return "\n\n".join(block.strip() for block in blocks if block.strip())


def _files(tree: str) -> list[Path]:
  """The tree's .py files in order; DataError if there are none."""
  name, foreign = ("stdlib", _PACKAGES) if tree == "stdlib" else ("purelib", set())
  root = Path(sysconfig.get_path(name))
  foreign = foreign | {"__pycache__"}
  files = []
  for folder, folders, names in os.walk(root):
    folders[:] = set(folders) - foreign  # not walked: site-packages may be the larger part by far
    files += [Path(folder, name) for name in names if name.endswith(".py")]
  if not files:
    raise DataError(f"{root}: no .py files; use a Python that ships its {tree}' sources")
  return sorted(files)
