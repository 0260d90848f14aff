"""Both implementations export the contract, parameter by parameter."""

import ast
import inspect
from pathlib import Path

import pytest

from kernels import ops, reference

ROOT = Path(ops.__file__).parent.parent


def parameters(function):
  """(name, kind, default) of each parameter."""
  return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def exported(init: Path) -> dict[str, ast.FunctionDef]:
  """The functions that a package's __init__ imports from modules of ours, without importing it."""
  found = {}
  for node in ast.parse(init.read_text()).body:
    if not isinstance(node, ast.ImportFrom):
      continue
    module = ast.parse((ROOT / (node.module.replace(".", "/") + ".py")).read_text())
    defined = {d.name: d for d in module.body if isinstance(d, ast.FunctionDef)}
    found |= {alias.name: defined[alias.name] for alias in node.names}
  return found


def arguments(function: ast.FunctionDef) -> str:
  """The parameters as source, without annotations and self."""
  a = function.args
  for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs):
    arg.annotation = None
  a.args = [arg for arg in a.args if arg.arg != "self"]
  return ast.unparse(a)


def contract() -> dict[str, ast.FunctionDef]:
  module = ast.parse(Path(ops.__file__).read_text())
  protocol = next(d for d in module.body if isinstance(d, ast.ClassDef) and d.name == "Ops")
  return {d.name: d for d in protocol.body if isinstance(d, ast.FunctionDef)}


def test_reference_exports_the_contract():
  assert sorted(reference.__all__) == sorted(ops.FUNCTIONS)


@pytest.mark.parametrize("name", ops.FUNCTIONS)
def test_reference_has_the_contract_s_parameters(name):
  assert parameters(getattr(reference, name)) == parameters(getattr(ops.Ops, name))[1:]


def test_cuda_exports_the_contract():
  functions = exported(ROOT / "kernels/cuda/__init__.py")
  missing = sorted(set(ops.FUNCTIONS) - set(functions))
  assert not missing, f"kernels.cuda lacks {missing}"


def test_cuda_has_the_contract_s_parameters():
  functions = exported(ROOT / "kernels/cuda/__init__.py")
  for name, method in contract().items():
    if name in functions:
      assert arguments(functions[name]) == arguments(method), name
