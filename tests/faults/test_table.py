"""FAULTS.md names every test that is marked faults, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1]


def is_marked(node: ast.AST) -> bool:
  return "mark.faults" in ast.unparse(node)


def marked(tree: ast.Module) -> Iterator[str]:
  """The tests of a module that carry the mark, by themselves or by their module."""
  of_module = any(
    isinstance(node, ast.Assign)
    and ast.unparse(node.targets[0]) == "pytestmark"
    and is_marked(node.value)
    for node in tree.body
  )
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
      if of_module or any(map(is_marked, node.decorator_list)):
        yield node.name


def test_the_table_names_every_marked_test_and_no_other():
  """A test by its name, or by its folder."""
  table = (HERE / "FAULTS.md").read_text(encoding="utf-8")
  named = set(re.findall(r"`(test_\w+)`", table))
  folders = [HERE.parent / name for name in re.findall(r"`(tests/\w+/)`", table)]
  tests, apart = set(), set()
  for file in HERE.rglob("test_*.py"):
    found = set(marked(ast.parse(file.read_text(encoding="utf-8"))))
    (apart if file.parent in folders else tests).update(found)
  assert apart and all(folder.is_dir() for folder in folders)
  assert named - tests == set(), "named in FAULTS.md, but there is no such marked test"
  assert tests - named == set(), "marked faults, but not in FAULTS.md"


def test_rows_are_whole():
  rows = [line for line in (HERE / "FAULTS.md").read_text().splitlines() if line.startswith("| ")]
  cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
  assert all(len(row) == 5 for row in cells)
  said = {row[4] for row in cells} - {"85916c7", "---"}
  assert said <= {"red", "not red", "not run", "there was no launch"}
  assert all(len(row[1].split()) <= 8 for row in cells)
