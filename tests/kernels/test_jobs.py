"""The ahead-of-time build calls every operation that launches kernels."""

import ast
from pathlib import Path

from kernels.ops import FUNCTIONS

SOURCE = Path(__file__).parents[2] / "kernels" / "cuda" / "jobs.py"


def test_every_operation_has_a_job():
  tree = ast.parse(SOURCE.read_text())
  called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  own = {node.name.lstrip("_") for node in tree.body if isinstance(node, ast.FunctionDef)}
  # attention's job calls the library's inner functions
  assert sorted(set(FUNCTIONS) - called - own) == []
