"""What a judge reads, results by arm and seed, and what it says: a verdict with its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nmoe.records.reader import Point


@dataclass(frozen=True)
class Result:
  """What one run came to. A run that diverged is an outcome, not missing data.

  point: the place of its arm on the axes of a sweep (`{}` where there is none).
  """

  arm: str
  seed: int
  values: Mapping[str, float]  # by the tags of nmoe.records.measures.MEASURES, among others
  diverged: bool = False
  point: Point = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
  """The results of a study: at most one an arm and seed, in the order of its runs."""

  results: tuple[Result, ...]

  @property
  def arms(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(result.arm for result in self.results))

  def of(self, arm: str) -> tuple[Result, ...]:
    """An arm's results in the order of seeds."""
    return tuple(sorted((r for r in self.results if r.arm == arm), key=lambda r: r.seed))

  def seeds(self, arm: str) -> tuple[int, ...]:
    return tuple(result.seed for result in self.of(arm))

  def values(self, arm: str, metric: str) -> tuple[float, ...]:
    """An arm's values of a measure in the order of seeds; NaN where a run diverged.

    KeyError if a run that completed has no such value.
    """
    return tuple(math.nan if r.diverged else r.values[metric] for r in self.of(arm))


@dataclass(frozen=True)
class Judgement:
  """A verdict ("confirmed", "refuted", "inconclusive", "described" or a judge's own word), its
  reason in a sentence, and the numbers behind it, which the record keeps as JSON.
  """

  verdict: str
  reason: str
  numbers: Mapping[str, Any] = field(default_factory=dict)
