"""Ownership: every row once, matrices whole, and ranks that carry the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_configs import tiny

from nmoe.config.file import load
from nmoe.config.parameters import is_matrix, owned_rows, owners, parameter_group, parameter_shapes
from nmoe.model.decoder import matrix_blocks

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("embed.weight", "layers.0.attention.o.weight", "layers.1.moe.experts.w2", "norm.weight")
PARAMETERS = st.lists(
  st.sampled_from(NAMES).flatmap(
    lambda name: st.tuples(
      st.just(name),
      st.lists(
        st.integers(1, 40),
        min_size=1 if name == "norm.weight" else 3 if "experts" in name else 2,
        max_size=1 if name == "norm.weight" else 3 if "experts" in name else 2,
      ),
    )
  ),
  min_size=1,
  max_size=12,
)


def sizes(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[int]:
  return [
    sum((stop - start) * math.prod(shapes[name][1:]) for name, (start, stop) in rows.items())
    for rows in owners(shapes, ranks)
  ]


@given(PARAMETERS, st.integers(1, 9))
def test_every_row_has_one_owner(drawn: list, ranks: int) -> None:
  shapes = {f"{i}.{name}": tuple(shape) for i, (name, shape) in enumerate(drawn)}
  found = owners(shapes, ranks)
  assert len(found) == ranks
  for name, shape in shapes.items():
    parts = sorted(rows[name] for rows in found if name in rows)
    assert parts[0][0] == 0 and parts[-1][1] == shape[0]
    assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
    assert all(start < stop for start, stop in parts)
    if len(shape) == 1 or (len(shape) == 2 and is_matrix(name, shape)):
      assert parts == [(0, shape[0])]


@given(PARAMETERS, st.integers(1, 9))
def test_rows_fill_the_ranks_to_one_level(drawn: list, ranks: int) -> None:
  """But for a row or a vector, no rank that got some has more than one that could have taken it."""
  shapes = {f"{i}.{name}": tuple(shape) for i, (name, shape) in enumerate(drawn)}
  rest = {n: s for n, s in shapes.items() if len(s) != 2 or not is_matrix(n, s)}
  carried = sizes(shapes, ranks)
  widest = max((math.prod(s[1:]) if len(s) > 1 else s[0] for s in rest.values()), default=0)
  for rows, size in zip(owners(shapes, ranks), carried, strict=True):
    if rest.keys() & rows.keys():
      assert size <= sum(carried) / ranks + max(carried) - min(carried)
      assert size <= min(carried) + ranks * widest


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_tables_and_experts_lie_over_all_ranks(ranks: int) -> None:
  """So that each bucket of a collective is of few blocks, and of one table."""
  config = load(CONFIGS / "moonlight" / "moonlight.toml", env={})
  shapes = parameter_shapes(config)
  for name in ("embed.weight", "head.weight", "layers.3.moe.experts.w2"):
    kind = "expert" if "experts" in name else "dense"
    same = {n: s for n, s in shapes.items() if parameter_group(n) == kind}
    counts = [stop - start for start, stop in (rows[name] for rows in owners(same, ranks))]
    assert len(counts) == ranks and max(counts) < 1.1 * shapes[name][0] / ranks + 1, name


@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_moonlight_is_balanced(ranks: int) -> None:
  """Within 2 % of the mean in elements and 20 % in the work of Newton-Schulz."""
  config = load(CONFIGS / "moonlight" / "moonlight.toml", env={})
  shapes = {n: s for n, s in parameter_shapes(config).items() if parameter_group(n) == "dense"}
  carried = sizes(shapes, ranks)
  assert max(carried) < 1.02 * sum(carried) / ranks
  work = [
    sum(math.prod(shapes[n]) * min(shapes[n]) for n in rows if is_matrix(n, shapes[n]))
    for rows in owners(shapes, ranks)
  ]
  assert max(work) < 1.2 * sum(work) / ranks


def test_matrices_are_those_that_muon_takes() -> None:
  config = tiny()
  for name, shape in parameter_shapes(config).items():
    assert is_matrix(name, shape) == bool(matrix_blocks(name, shape, config)), name


def test_experts_are_owned_by_replicas() -> None:
  config = tiny(launch__ranks=4, rdep__group=2, schedule__batch_tokens=192)
  found = owned_rows(config)
  assert [len(members) for members in found.values()] == [4, 4, 2]
  shapes = parameter_shapes(config)
  held = sum(
    (stop - start) * math.prod(shapes[name][1:])
    for rows in found["expert"]
    for name, (start, stop) in rows.items()
  )
  experts = [math.prod(s) for n, s in shapes.items() if parameter_group(n) == "expert"]
  assert held == sum(experts) // 2
