"""A sweep as lines: a metric over one axis, a line for each place on the others, and its parabola.

The fit is the judge's (`stages.judge.transfer.fit`), over log2 of the axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nmoe.records.measures import MEASURES
from nmoe.records.reader import Experiment, Run
from nmoe.records.snapshot import Snapshot
from stages.judge.transfer import fit
from stages.viz.answers import Json, experiment_row, measures, plain

Place = str | float


def sweep(seen: Snapshot, e: Experiment, query: Mapping[str, str]) -> Json:
  """The lines of an experiment whose arms have places on axes. query: axis, hue and metric chosen;
  those that make no sense are replaced by ones that do.
  """
  points = {arm.name: dict(arm.point) for arm in e.arms if arm.point}
  axes = list(dict.fromkeys(axis for point in points.values() for axis in point))
  if not axes:
    return plain(experiment_row(e) | {"axes": []})
  axis = query.get("axis") if query.get("axis") in axes else _axis(points, axes)
  others = [other for other in axes if other != axis]
  hue = query.get("hue") if query.get("hue") in others else _hue(others)
  panel = next((a for a in others if a != hue and not _function_of(points, a, hue)), None)
  runs = [run for run in seen.runs if run.experiment_id == e.id and run.arm in points]
  known = [key for key in MEASURES if any(key in run.results for run in runs)]
  asked = query.get("metric", e.headline.metric)
  metric = asked if asked in known else e.headline.metric
  lines: dict[tuple[Place, Place], list[Run]] = {}
  for run in runs:
    at = points[run.arm]
    lines.setdefault((at.get(panel, ""), at.get(hue, "")), []).append(run)
  return plain(
    experiment_row(e)
    | {
      "conclusion": e.conclusion,
      "axes": axes,
      "axis": axis,
      "hue": hue,
      "panel": panel,
      "metric": metric,
      "metrics": known,
      "octaves": axis.startswith("log2_"),
      "lines": [
        {"panel": place[0], "hue": place[1]} | _line(of, axis, metric, points)
        for place, of in lines.items()
      ],
      "measures": measures(),
    }
  )


def _axis(points: Mapping[str, Mapping[str, Place]], axes: Sequence[str]) -> str:
  numeric = [a for a in axes if all(isinstance(p.get(a), (int, float)) for p in points.values())]
  rates = [a for a in numeric if "rate" in a or "lr" in a]
  return [*rates, *numeric, *axes][0]


def _hue(others: Sequence[str]) -> str | None:
  return "scale" if "scale" in others else next(iter(others), None)


def _function_of(points: Mapping[str, Mapping[str, Place]], axis: str, other: str | None) -> bool:
  """Whether `other` determines `axis`, which then says nothing new."""
  pairs = {(p.get(other), p.get(axis)) for p in points.values()}
  return len(pairs) == len({x for x, _ in pairs})


def _line(
  runs: Sequence[Run], axis: str, metric: str, points: Mapping[str, Mapping[str, Place]]
) -> Json:
  """The runs of a line by place, and the parabola of their seeds where there are enough points."""
  by: dict[Place, list[Run]] = {}
  for run in runs:
    by.setdefault(points[run.arm].get(axis, ""), []).append(run)
  places = sorted(by, key=lambda x: (isinstance(x, str), x))
  shown = [
    {
      "x": x,
      "arm": by[x][0].arm,
      "runs": [
        {"id": r.id, "seed": r.seed, "status": r.status, "value": r.results.get(metric, math.nan)}
        for r in sorted(by[x], key=lambda r: r.seed)
      ],
    }
    for x in places
  ]
  return {"points": shown, "fit": _fitted(by, axis, metric)}


def _fitted(by: Mapping[Place, Sequence[Run]], axis: str, metric: str) -> Json | None:
  """Optimum of every seed in octaves, its level, and the curvature that they share."""
  of = MEASURES.get(metric)
  if of is None or of.better == "higher" or any(isinstance(x, str) for x in by):
    return None
  if not axis.startswith("log2_") and min(by) <= 0:
    return None
  seeds: dict[int, dict[float, float]] = {}
  for x, runs in by.items():
    u = float(x) if axis.startswith("log2_") else math.log2(x)
    for run in runs:
      if metric in run.results or run.finished:
        seeds.setdefault(run.seed, {})[u] = run.results.get(metric, math.nan)
  seeds = dict(sorted(seeds.items(), key=lambda pair: -len(pair[1])))  # the whole grid first
  found = fit(seeds) if seeds else None
  if found is None or not found.curvature > 0:
    return None
  levels = {
    seed: _level(seeds[seed], found.curvature, at, found.best)
    for seed, at in found.optimum.items()
    if math.isfinite(at)
  }
  noise = math.sqrt(found.rss / found.freedom) if found.freedom > 0 else math.nan
  return {
    "best": found.best,
    "interior": found.interior,
    "curvature": found.curvature,
    "noise": noise,
    "optima": found.optimum,
    "levels": levels,
  }


def _level(grid: Mapping[float, float], curvature: float, at: float, best: float) -> float:
  near = [
    y - curvature * (x - at) ** 2
    for x, y in grid.items()
    if math.isfinite(y) and abs(x - best) <= 2
  ]
  return sum(near) / len(near)
