"""The rules a parser can hold: arrows, rooms, circles, sizes, a reference and a test a kernel."""

import ast
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from kernels.ops import FUNCTIONS

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "nmoe", "stages")  # each may import itself and those before it
ROOMS = {  # of a floor, folders or single files: likewise
  "kernels": (
    "arch errors sizes costs arithmetic copies ops shapes gradient halves ragged places formats "
    "buffers flight exchange reference cuda tools"
  ).split(),
  "nmoe": (
    "errors wording tables files records config machine data distributed model evals train bench"
  ).split(),
  "stages": (
    "text interrupts app judge launch report viz watch admission workbench branches runs "
    "comparable study show research ablate proxy checkpoints evals export imports proofs prod "
    "demo cli"
  ).split(),
}
LONG_FILE, MAX_FILE = 400, 600  # lines; a long file's docstring says why it is one thing
MAX_FUNCTION, MEDIAN_FUNCTION = 80, 15
LAZY = {"stages.cli"}  # imports inside its commands, so that --help is instant
APART = {  # a target picks one of the two by name; production never imports the oracle
  "kernels.cuda": {"kernels.reference"},
  "nmoe": {"kernels.reference", "kernels.cuda"},
  "stages": {"kernels.reference", "kernels.cuda"},
}
OURS = {"session", "config", "ops", "rdep", "exchange"}  # parameters with a type of ours
OPAQUE = {"Any", "object", "ModuleType"}
DEVICE = {"kernel", "jit"}  # CuTeDSL's decorators: cute.kernel, cute.jit


def module_name(path: Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {
  module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
  for floor in FLOORS
  for path in sorted((ROOT / floor).rglob("*.py"))
}


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
  """The names of our modules that the statements of a tree import, wherever they stand."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"line {node.lineno}: relative import"
      inside = [f"{node.module}.{alias.name}" for alias in node.names]
      names = [name if name in known else node.module for name in inside]
    else:
      continue
    yield from (name for name in names if name.split(".")[0] in FLOORS)


def graph(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
  return {name: set(imported(tree, set(trees))) for name, tree in trees.items()}


def upward(edges: dict[str, set[str]]) -> list[str]:
  """The arrows from a lower floor to a higher one."""
  floor = {name: FLOORS.index(name.split(".")[0]) for name in set(edges).union(*edges.values())}
  return [f"{a} -> {b}" for a in edges for b in sorted(edges[a]) if floor[b] > floor[a]]


def room(name: str) -> str | None:
  """The floor and room of a module as "floor.room"; None for a floor's own __init__."""
  floor, *inside = name.split(".")
  return f"{floor}.{inside[0]}" if inside else None


def back(edges: dict[str, set[str]]) -> list[str]:
  """The arrows from a room to a later one of its floor."""
  order = {f"{floor}.{name}": n for floor in ROOMS for n, name in enumerate(ROOMS[floor])}
  pairs = ((a, b) for a in edges for b in sorted(edges[a]) if a.split(".")[0] == b.split(".")[0])
  return [f"{a} -> {b}" for a, b in pairs if room(b) and order[room(b)] > order[room(a)]]


def within(name: str, place: str) -> bool:
  """Whether a module is this floor or room, or stands in it."""
  return name == place or name.startswith(place + ".")


def together(edges: dict[str, set[str]]) -> list[str]:
  """The arrows between rooms that stay apart."""
  return [
    f"{a} -> {b}"
    for a in edges
    for b in sorted(edges[a])
    if any(
      within(a, place) and within(b, other) for place in APART for other in sorted(APART[place])
    )
  ]


def homeless(names: Iterable[str]) -> list[str]:
  """The modules that stand in no room."""
  rooms = {f"{floor}.{name}" for floor in ROOMS for name in ROOMS[floor]}
  return [name for name in names if room(name) not in {None, *rooms}]


def circle(edges: dict[str, set[str]]) -> list[str]:
  """One circle of imports as a path, or []."""
  done: set[str] = set()

  def visit(name: str, path: list[str]) -> list[str]:
    if name in path:
      return [*path[path.index(name) :], name]
    if name in done:
      return []
    for other in sorted(edges.get(name, ())):
      if found := visit(other, [*path, name]):
        return found
    done.add(name)
    return []

  return next((found for name in edges if (found := visit(name, []))), [])


def hidden(tree: ast.AST) -> list[str]:
  """Parameters that stand for one of our own types and are typed Any, a module or nothing."""
  arguments = (a for f in functions(tree) for a in (*f.args.args, *f.args.kwonlyargs))
  return [
    f"line {a.lineno}: {a.arg}"
    for a in arguments
    if a.arg in OURS and (a.annotation is None or ast.unparse(a.annotation) in OPAQUE)
  ]


def defined(body: Iterable[ast.AST]) -> set[str]:
  """The names that a module's statements bind, those under an if, try or with among them."""
  names = set()
  for node in body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
      names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      names.add(node.id)
    else:
      names |= defined(ast.iter_child_nodes(node))
  return names


def missing(tree: ast.AST, trees: dict[str, ast.Module]) -> list[str]:
  """What a tree imports from our modules that is not there."""
  return [
    f"line {node.lineno}: {node.module} has no {alias.name}"
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom) and node.module in trees
    for alias in node.names
    if alias.name not in defined(trees[node.module].body)
    and f"{node.module}.{alias.name}" not in trees
  ]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
  return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def is_device(function: ast.FunctionDef) -> bool:
  decorators = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
  return any(isinstance(d, ast.Attribute) and d.attr in DEVICE for d in decorators)


def length(node: ast.FunctionDef) -> int:
  return node.end_lineno - node.lineno + 1


def too_long(text: str) -> bool:
  """Whether a module has more than MAX_FILE lines, or more than LONG_FILE and says no reason."""
  lines, told = len(text.splitlines()), ast.get_docstring(ast.parse(text)) or ""
  why = re.search(r"one (file|thing)", told, re.IGNORECASE)
  return lines > MAX_FILE or (lines > LONG_FILE and why is None)


def test_arrows_point_downward():
  assert upward(graph(TREES)) == []


def test_no_circle():
  assert circle(graph(TREES)) == []


def test_every_module_stands_in_a_room():
  assert homeless(TREES) == []


def test_no_arrow_back_between_rooms():
  assert back(graph(TREES)) == []


def test_production_imports_neither_the_oracle_nor_a_target_s_kernels():
  assert together(graph(TREES)) == []


def test_the_order_names_only_rooms_that_are_there():
  rooms = {room(name) for name in TREES}
  assert {f"{floor}.{name}" for floor in ROOMS for name in ROOMS[floor]} <= rooms


BROKEN = {
  "kernels.a": "def f():\n  from nmoe import b",
  "nmoe.b": "import stages.c\nfrom nmoe.d import x",
  "nmoe.d": "import torch\nfrom nmoe import b as renamed, errors",
  "stages.c": "from kernels import a",
}


def test_the_rules_see_what_they_forbid():
  """Upward arrows and circles are found through every form of import, also inside functions."""
  parse = {name: ast.parse(text) for name, text in BROKEN.items()}
  edges = graph(parse)
  assert upward(edges) == ["kernels.a -> nmoe.b", "nmoe.b -> stages.c"]
  assert circle(edges) == ["nmoe.b", "nmoe.d", "nmoe.b"]


def test_the_rules_see_an_arrow_back_and_a_file_in_no_room():
  """Planted in the house as it stands; an arrow down or inside a room is none."""
  planted = {
    "nmoe.data.new": "from nmoe.train.loop import train\nfrom nmoe import errors",
    "nmoe.train.new": "def f():\n  import nmoe.bench.rdep",
    "stages.judge.new": "from stages import runs\nfrom nmoe.train import loop",
    "kernels.reference.new": "from kernels.cuda.adamw import adamw\nfrom kernels import ops",
    "kernels.cuda.new": "from kernels.cuda import adamw\nimport kernels.reference.swiglu",
    "nmoe.alone": "import torch",
  }
  trees = TREES | {name: ast.parse(text) for name, text in planted.items()}
  assert back(graph(trees)) == [
    "nmoe.data.new -> nmoe.train.loop",
    "nmoe.train.new -> nmoe.bench.rdep",
    "stages.judge.new -> stages.runs",
    "kernels.reference.new -> kernels.cuda.adamw",
  ]
  assert homeless(trees) == ["nmoe.alone"]
  assert together(graph(trees)) == ["kernels.cuda.new -> kernels.reference.swiglu"]


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_type_hides_an_arrow(name):
  assert hidden(TREES[name]) == []


def test_the_rule_sees_a_hidden_type():
  text = "def f(session: Any, ops: ModuleType, rdep, x: Any, *, config: object, exchange: E): ..."
  assert hidden(ast.parse(text)) == [
    f"line 1: {name}" for name in ("session", "ops", "rdep", "config")
  ]


@pytest.mark.parametrize("folder", ["gpu", "compile"])
def test_tests_that_ci_does_not_collect_import_what_is_there(folder):
  tests = sorted((ROOT / "tests" / folder).glob("*.py"))
  own = {f"{folder}.{path.stem}": ast.parse(path.read_text(encoding="utf-8")) for path in tests}
  found = {name: missing(tree, TREES | own) for name, tree in own.items()}
  assert {name: lines for name, lines in found.items() if lines} == {}
  gone = ast.parse("from kernels.ops import FUNCTIONS, gone\nfrom kernels import ops, nothing")
  assert missing(gone, TREES) == [
    "line 1: kernels.ops has no gone",
    "line 2: kernels has no nothing",
  ]


@pytest.mark.parametrize("name", sorted(TREES.keys() - LAZY))
def test_imports_stand_at_the_top(name):
  found = [
    f"line {inner.lineno}"
    for function in functions(TREES[name])
    for inner in ast.walk(function)
    if isinstance(inner, (ast.Import, ast.ImportFrom))
  ]
  assert found == []


@pytest.mark.parametrize("name", TREES)
def test_sizes(name):
  path = ROOT / (name.replace(".", "/") + ".py")
  path = path if path.is_file() else path.with_suffix("") / "__init__.py"
  assert not too_long(path.read_text(encoding="utf-8"))
  long = [
    f"{function.name}: {length(function)} lines"
    for function in functions(TREES[name])
    if length(function) > MAX_FUNCTION and not is_device(function)
  ]
  assert long == []


def test_no_file_of_tests_is_too_long():
  files = (ROOT / "tests").rglob("*.py")
  assert [path for path in files if too_long(path.read_text(encoding="utf-8"))] == []


def test_the_rule_sees_a_file_that_is_too_long():
  """At 401 lines a reason helps, at 601 none does."""
  told = {reason: f'"""Tests. {reason}"""\n' for reason in ("", "One file: they share a server.")}
  for more, found in ((399, [False, False]), (400, [True, False]), (600, [True, True])):
    assert [too_long(doc + "x = 1\n" * more) for doc in told.values()] == found


@pytest.mark.parametrize("floor", FLOORS)
def test_functions_are_short(floor):
  trees = [tree for name, tree in TREES.items() if name.split(".")[0] == floor]
  lengths = [length(f) for tree in trees for f in functions(tree) if not is_device(f)]
  assert statistics.median(lengths) <= MEDIAN_FUNCTION


@pytest.mark.parametrize("floor", FLOORS)
def test_the_floor_s_readme_names_every_module(floor):
  """In backticks, by its last name; of kernels/ only what stands beside its rooms."""
  quoted = re.findall(r"`([^`]+)`", (ROOT / floor / "README.md").read_text(encoding="utf-8"))
  words = {word.removesuffix(".py") for text in quoted for word in re.split(r"[/ ]", text)}
  modules = [name for name in TREES if floor != "kernels" or name.count(".") == 1]
  last = {name.rpartition(".")[2] for name in modules if name.startswith(f"{floor}.")}
  assert sorted(last - words) == []


def exported(package: str) -> set[str]:
  """The names in a package's __all__, without importing it."""
  for node in TREES[package].body:
    if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
      return set(ast.literal_eval(node.value))
  return set()


def test_the_reference_has_every_operation_of_the_contract():
  assert sorted(set(FUNCTIONS) - exported("kernels.reference")) == []


def test_every_cuda_operation_is_of_the_contract_and_has_a_reference():
  assert sorted(exported("kernels.cuda") - set(FUNCTIONS)) == []
  assert sorted(exported("kernels.cuda") - exported("kernels.reference")) == []


def test_every_cuda_module_has_a_test():
  """A tests/…/test_NAME.py, or a test that imports the module."""
  files = list((ROOT / "tests").rglob("*.py"))
  named = {path.stem.removeprefix("test_") for path in files}
  used = set().union(*(imported(ast.parse(path.read_text()), set(TREES)) for path in files))
  modules = [name for name in TREES if name.startswith("kernels.cuda.")]
  assert [m for m in modules if m not in used and m.rpartition(".")[2] not in named] == []
