"""Every kernel has a test and a bench: found by following the source, so nothing is imported.

A kernel is a class with a @cute.kernel method in kernels/cuda, or an operation that kernels.cuda
exports (some run QuACK's or a library's kernels). It is covered if the tests, or the benches of
kernels/tools, reach it from name to name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from kernels import ops

ROOT = Path(ops.__file__).parents[1]
Name = tuple[str, str]  # a module, and what it defines at its top

ELSEWHERE = {  # kernels that no bench of one process can run, and what measures them
  ("kernels.cuda.puts", "Put"): "NVSHMEM between processes; tests/gpu/test_rdep.py runs it",
  ("kernels.cuda.puts", "SignalPut"): "as Put",
}


def parsed(folder: str) -> dict[str, ast.Module]:
  return {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
      path.read_text(encoding="utf-8")
    )
    for path in sorted((ROOT / folder).rglob("*.py"))
  }


OURS = parsed("kernels")
PLANTED = "kernels.cuda.planted"
MODULES = {*OURS, PLANTED}
TESTS = parsed("tests/gpu") | parsed("tests/compile")


def own(tree: ast.Module) -> dict[str, ast.AST]:
  """What a module defines at its top."""
  found: dict[str, ast.AST] = {}
  for node in tree.body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      found[node.name] = node
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
  return found


def imported(tree: ast.Module) -> dict[str, Name]:
  """The names that a module imports, and what they name; "" stands for a module of the kernels."""
  return {
    alias.asname or alias.name: (f"{node.module}.{alias.name}", "")
    if f"{node.module}.{alias.name}" in MODULES
    else (node.module, alias.name)
    for node in tree.body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
  }


def named(node: ast.AST, tree: ast.Module, module: str) -> Iterator[Name]:
  """What a definition names, of its own module or another."""
  here, there = own(tree), imported(tree)
  for part in ast.walk(node):
    if isinstance(part, ast.Name):
      if part.id in here:
        yield module, part.id
      elif part.id in there:
        yield there[part.id]
    elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
      target, inside = there.get(part.value.id, ("", ""))
      if target and not inside:
        yield target, part.attr


def reached(roots: dict[str, ast.Module], trees: dict[str, ast.Module]) -> set[Name]:
  """All that the whole text of the roots names, and what that names in turn."""
  todo = [name for module, tree in roots.items() for name in named(tree, tree, module)]
  found: set[Name] = set()
  while todo:
    module, name = todo.pop()
    if (module, name) in found or module not in trees:
      continue
    found.add((module, name))
    tree = trees[module]
    if name in own(tree):
      todo += named(own(tree)[name], tree, module)
    elif name in imported(tree):
      todo.append(imported(tree)[name])
  return found


def is_kernel(node: ast.AST) -> bool:
  decorators = (d for m in ast.walk(node) for d in getattr(m, "decorator_list", ()))
  return isinstance(node, ast.ClassDef) and any(ast.unparse(d) == "cute.kernel" for d in decorators)


def kernels(trees: dict[str, ast.Module]) -> set[Name]:
  """The classes with device code, and the exported operations where they are defined."""
  exported = imported(trees["kernels.cuda"]).values()
  cuda = {m: tree for m, tree in trees.items() if m.startswith("kernels.cuda.")}
  classes = {(m, name) for m, t in cuda.items() for name, node in own(t).items() if is_kernel(node)}
  return classes | set(exported)


def uncovered(roots: dict[str, ast.Module], trees: dict[str, ast.Module]) -> set[Name]:
  return kernels(trees) - reached(roots, trees)


def benches(trees: Iterable[str]) -> dict[str, ast.Module]:
  return {m: OURS[m] for m in trees if m.startswith("kernels.tools.benches.")}


def test_there_are_kernels():
  found = kernels(OURS)
  assert {
    ("kernels.cuda.combine", "CombineForward"),
    ("kernels.cuda.loss", "linear_cross_entropy"),
  } <= found
  assert len(found) > 30


def test_every_kernel_has_a_bench():
  assert uncovered(benches(OURS), OURS) == ELSEWHERE.keys()


def test_every_kernel_has_a_test():
  assert uncovered(TESTS, OURS | TESTS) == set()


TEXT = """
import cutlass.cute as cute
from kernels.cuda.jit import cached, compile_kernel

class Planted:
  @cute.kernel
  def kernel(self, mX):
    pass

@cached
def compile_planted():
  return compile_kernel(Planted())

def planted(x):
  return compile_planted()(x)
"""


def test_a_kernel_without_is_seen():
  """A planted module is listed until something names what launches it."""
  trees = OURS | {PLANTED: ast.parse(TEXT)}
  new = (PLANTED, "Planted")
  assert uncovered(benches(OURS), trees) == {*ELSEWHERE, new}
  assert uncovered(TESTS, trees | TESTS) == {new}
  caller = ast.parse("from kernels.cuda import planted\ndef bench(x):\n  planted.planted(x)")
  assert uncovered(benches(OURS) | {"bench": caller}, trees) == ELSEWHERE.keys()
  idle = ast.parse("from kernels.cuda import planted")
  assert uncovered(benches(OURS) | {"bench": idle}, trees) == {*ELSEWHERE, new}


def test_an_operation_without_a_bench_is_seen():
  without = {m: tree for m, tree in benches(OURS).items() if not m.endswith(".dense")}
  lost = {name for _, name in uncovered(without, OURS)}
  assert {"attention", "linear_cross_entropy", "mla_qkv", "rms_norm", "mlp"} <= lost
