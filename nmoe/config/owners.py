"""Who owns a parameter that several ranks hold: the one place that says it.

The owner alone keeps the fp32 masters and the moments and computes the update (ZeRO, arXiv
1910.02054). Matrices have one owner, so that Muon needs no other rank (as in distributed Muon,
arXiv 2502.16982); everything else is cut by rows: embedding, head, routers and norms, which AdamW
updates element by element, and routed experts, each row of which is a whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Span = tuple[int, int]  # of rows: start, stop


def parameter_group(name: str) -> Literal["dense", "router", "expert"]:
  """The optimizer's group of a parameter (its learning rate and weight decay), from its name."""
  if ".experts." in name:
    return "expert"
  return "router" if ".router." in name else "dense"


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
  """Whether a parameter is a matrix or a stack of them: what Muon may update.

  Norms, embedding, head and routers are not.
  """
  part = name.removesuffix(".weight").rpartition(".")[2]
  return len(shape) > 1 and part not in ("embed", "head", "router")


def owners(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> list[dict[str, Span]]:
  """The rows that each rank owns of each parameter; no entry where it owns none.

  A pure function of names, shapes and order. First the matrices, the dearest first, each to the
  rank with the least work so far, counted in Newton-Schulz's multiplications (its products have
  min(A, B)² · max(A, B)); then the rest, in order, fills all ranks to the same number of elements.
  A rank that matrices alone bring above that level gets no more.
  """
  owned: list[dict[str, Span]] = [{} for _ in range(ranks)]
  work, elements = [0] * ranks, [0] * ranks
  whole = {name: s for name, s in shapes.items() if len(s) == 2 and is_matrix(name, s)}
  for name, (a, b) in sorted(whole.items(), key=lambda item: -math.prod(item[1]) * min(item[1])):
    rank = work.index(min(work))
    owned[rank][name] = (0, a)
    work[rank] += a * b * min(a, b)
    elements[rank] += a * b
  rest = {name: shape for name, shape in shapes.items() if name not in whole}
  level = _level(elements, sum(math.prod(shape) for shape in rest.values()))
  rank = 0
  for name, shape in rest.items():
    start, width = 0, math.prod(shape[1:])
    while start < shape[0]:
      while rank < ranks - 1 and elements[rank] >= level:
        rank += 1
      room = math.ceil((level - elements[rank]) / width) if rank < ranks - 1 else shape[0]
      stop = min(shape[0], start + room)
      owned[rank][name] = (start, stop)
      elements[rank] += (stop - start) * width
      start = stop
  return owned


def _level(elements: list[int], more: int) -> float:
  """To what the ranks with the fewest elements rise when `more` are poured over them."""
  lowest = sorted(elements)
  return min((more + sum(lowest[:k])) / k for k in range(1, len(lowest) + 1))
