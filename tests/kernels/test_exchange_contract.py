"""The three exchanges and their memories are what kernels/exchange.py says, by their source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kernels import exchange

ROOT = Path(exchange.__file__).parents[1]
EXCHANGES = ("kernels.reference.exchange", "kernels.cuda.exchange", "kernels.cuda.puts")
MEMORIES = ("kernels.reference.symmetric", "kernels.cuda.symmetric", "kernels.cuda.puts")


def tree(module: str) -> ast.Module:
  return ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


CONTRACT = {d.name: d for d in tree("kernels.exchange").body if isinstance(d, ast.ClassDef)}


def methods(owner: ast.ClassDef | ast.Module) -> dict[str, ast.FunctionDef]:
  return {d.name: d for d in owner.body if isinstance(d, ast.FunctionDef)}


def signature(function: ast.FunctionDef) -> str:
  """Parameters with annotations and defaults, and the result, as source; without self.

  A generator that contextlib.contextmanager decorates returns what the decorator makes of it.
  """
  a = function.args
  a.args = [arg for arg in a.args if arg.arg != "self"]
  result = ast.unparse(function.returns)
  if any(ast.unparse(d) == "contextmanager" for d in function.decorator_list):
    result = result.replace("Iterator[", "AbstractContextManager[")
  return f"({ast.unparse(a)}) -> {result}"


def attributes(owner: ast.ClassDef) -> set[str]:
  """The names that __init__ gives self."""
  targets = [n for n in ast.walk(methods(owner)["__init__"]) if isinstance(n, ast.Attribute)]
  return {
    n.attr for n in targets if isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
  }


def lineage(module: str) -> list[ast.ClassDef]:
  """The class Exchange of a module, then the one of ours that it extends."""
  body = tree(module).body
  found = next(d for d in body if isinstance(d, ast.ClassDef) and d.name == "Exchange")
  renamed = {
    alias.asname or alias.name: f"{node.module}.{alias.name}"
    for node in body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  bases = [renamed[base.value.id] for base in found.bases]
  return [found, *(more for base in bases for more in lineage(base))]


def faults(classes: list[ast.ClassDef]) -> list[str]:
  """Where an implementation and the contract differ."""
  wanted = methods(CONTRACT["Exchange"])
  found = {n: f for c in reversed(classes) for n, f in methods(c).items() if n[0] != "_"}
  wanted_signature = {name: signature(f) for name, f in wanted.items()}
  found_signature = {name: signature(f) for name, f in found.items()}
  names = {n.target.id for n in CONTRACT["Exchange"].body if isinstance(n, ast.AnnAssign)}
  return [
    *(f"{name}: missing" for name in sorted(wanted.keys() - found.keys())),
    *(f"{name}: not of the contract" for name in sorted(found.keys() - wanted.keys())),
    *(f"{name}: no attribute" for name in sorted(names - set().union(*map(attributes, classes)))),
    *(
      f"{name}: {found_signature[name]}, not {wanted_signature[name]}"
      for name in sorted(wanted.keys() & found.keys())
      if found_signature[name] != wanted_signature[name]
    ),
  ]


@pytest.mark.parametrize("module", EXCHANGES)
def test_an_exchange_is_the_contract_s(module):
  classes = lineage(module)
  assert faults(classes) == []
  made = methods(CONTRACT["MakeExchange"])["__call__"]
  for init in (methods(c)["__init__"] for c in classes):
    assert signature_of_init(init) == ast.unparse(made.args).removeprefix("self, ")


def signature_of_init(init: ast.FunctionDef) -> str:
  return ast.unparse(init.args).removeprefix("self, ")


@pytest.mark.parametrize("module", MEMORIES)
def test_a_memory_is_the_contract_s(module):
  body = tree(module).body
  exported = next(
    ast.literal_eval(n.value)
    for n in body
    if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
  )
  assert sorted(exported) == ["Exchange", "allocate", "release"]
  origin = {
    alias.name: n.module for n in body if isinstance(n, ast.ImportFrom) for alias in n.names
  }
  for name, wanted in methods(CONTRACT["Memory"]).items():
    found = methods(tree(origin.get(name, module)))[name]
    assert signature(found) == signature(wanted), name


BROKEN = """
class Exchange:
  def __init__(self, peers, rank, deadline_s):
    self.peers, self.rank, self.capacity, self.rows, self.fused = peers, rank, 1, 1, True

  def post_counts(self, trip: int, counts: Tensor) -> None:
    pass

  def receive(self, num_rows: int, format: str = "bf16") -> tuple[Tensor, Tensor, Tensor]:
    pass

  def late(self) -> list[int]:
    pass

  def extra(self) -> None:
    pass
"""


def test_the_comparison_sees_what_differs():
  found = faults(ast.parse(BROKEN).body)
  contract = "beside collect fetch join leaving mark multiply overflowed places replayed".split()
  contract += ["reply", "send", "wait"]
  assert found[: len(contract)] == [f"{name}: missing" for name in contract]
  assert [line.split(",")[0] for line in found[len(contract) :]] == [
    "extra: not of the contract",
    "blocks: no attribute",
    "in_place: no attribute",
    "late: () -> list[int]",
    "post_counts: (trip: int",
    "receive: (num_rows: int",
  ]


def used(module: ast.Module) -> set[str]:
  """What a module asks of things that it calls exchange."""
  return {
    n.attr
    for n in ast.walk(module)
    if isinstance(n, ast.Attribute)
    and ast.unparse(n.value).rpartition(".")[2] == "exchange"
    and ast.unparse(n.value) != "kernels.exchange"
  }


def test_nmoe_uses_the_contract_alone():
  body = CONTRACT["Exchange"].body
  offered = {n.target.id for n in body if isinstance(n, ast.AnnAssign)} | set(
    methods(CONTRACT["Exchange"])
  )
  uses = {
    path: used(ast.parse(path.read_text(encoding="utf-8")))
    for path in (ROOT / "nmoe").rglob("*.py")
  }
  assert {str(path): names - offered for path, names in uses.items() if names - offered} == {}
  assert {"send", "receive", "capacity"} <= set().union(*uses.values())
  assert used(ast.parse("self.exchange.mine")) - offered == {"mine"}
