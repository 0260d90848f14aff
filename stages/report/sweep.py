"""What a sweep concluded, as rows and as a figure: rates against loss, optima, shifts, budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmoe.records.reader import Experiment
from stages.judge.transfer import WINDOW
from stages.report.drawing import Cells, Curve, Dots, Figure, Panel, Rule, Shades
from stages.report.figures import COLORS, ORANGE

HEAD = ("group", "state", "shift, octaves", "regret, nats", "exponent", "noise, nats", "why")
SEGMENTS = 41  # points of a parabola that is drawn
STATES = {"transfers": "#0b7a5c", "drifts": "#a32626", "undecided": "#c2571a"}
PLACED = ("", "transfers", "drifts", "undecided", "cannot tell")  # others may lie anywhere
SLOPES = ((0.0, "#2a5fa8"), (0.5, "#f7f8fa"), (1.0, "#b3432b"))
HEALTH_HEAD = ("scale", "warm-up steps", "load, max / mean", "dead experts", "clipped share")
BUDGET = {
  "runs": "runs",
  "runs_asked": "runs asked for",
  "diverged": "diverged",
  "device_seconds": "seconds",
  "tokens": "tokens",
}


def is_sweep(experiment: Experiment) -> bool:
  """Whether its conclusion is that of `nmoe proxy sweep`."""
  return {"groups", "controls", "points"} <= experiment.conclusion.keys()


def group_rows(experiment: Experiment) -> list[list[str]]:
  """A row a group, and one for each control."""
  c = experiment.conclusion
  groups = [*c["groups"], *c["controls"]]
  return [
    [
      g["name"],
      g["state"] or "measured",
      _interval(g["shift"]),
      _interval(g["regret"]),
      _interval(g["exponent"]),
      _number(g["noise"]),
      g["reason"],
    ]
    for g in groups
  ]


def health_rows(experiment: Experiment) -> list[list[str]]:
  """Of every scale what else may differ between scales."""
  keys = ("warmup_steps", "load/max_over_mean", "load/dead", "optim/clipped")
  health = experiment.conclusion["health"].items()
  return [[name, *(_number(of.get(key)) for key in keys)] for name, of in health]


def budget_pairs(experiment: Experiment) -> list[tuple[str, str]]:
  budget = experiment.conclusion["budget"]
  return [(label, f"{budget[key]:,.0f}") for key, label in BUDGET.items()]


@dataclass(frozen=True)
class Line:
  """A grid of one seed: losses over x, log2 of the rate over the base's, and its parabola.

  optimum: (x, loss), None where no parabola was found. parabola: (x, loss) to draw, from there on.
  diverged: the x of runs without a loss.
  """

  group: str
  scale: str
  seed: int
  points: tuple[tuple[float, float], ...]
  diverged: tuple[float, ...]
  optimum: tuple[float, float] | None
  parabola: tuple[tuple[float, float], ...]


def lines(experiment: Experiment) -> list[Line]:
  """All that is drawn of a sweep: a line for each group or control, scale and seed, in the order of
  the points. A control's line at the base is the joint one.
  """
  c = experiment.conclusion
  judged = {g["name"]: g for g in (*c["groups"], *c["controls"])}
  grids: dict[tuple[str, str, int], dict[float, float | None]] = {}
  for p in c["points"]:
    grids.setdefault((p["group"], p["scale"], p["seed"]), {})[p["log2_rate"]] = p["loss"]
  return [_line(judged, *place, grid) for place, grid in grids.items()]


def _line(
  judged: Mapping[str, Any], group: str, scale: str, seed: int, grid: Mapping[float, float | None]
) -> Line:
  points = tuple((x, grid[x]) for x in sorted(grid) if grid[x] is not None)
  diverged = tuple(x for x in sorted(grid) if grid[x] is None)
  g = judged.get(group, {"optima": {}, "levels": {}, "curvature": {}})
  x, level = (g[key].get(scale, {}).get(str(seed)) for key in ("optima", "levels"))
  if x is None or level is None or not math.isfinite(x + level) or not points:
    return Line(group, scale, seed, points, diverged, None, ())
  best = min(points, key=lambda p: p[1])[0]
  xs = [best - WINDOW + 2 * WINDOW * k / (SEGMENTS - 1) for k in range(SEGMENTS)]
  parabola = tuple((at, level + g["curvature"][scale] * (at - x) ** 2) for at in xs)
  return Line(group, scale, seed, points, diverged, (x, level), parabola)


def figure(experiment: Experiment) -> Figure:
  """A panel a group: losses over log2 of the rate, a color a scale, parabolas and optima."""
  found = lines(experiment)
  scales = list(dict.fromkeys(line.scale for line in found))
  colors = {scale: COLORS[i % len(COLORS)] for i, scale in enumerate(scales)}
  first = found[0].seed if found else 0
  panels = []
  for name in dict.fromkeys(line.group for line in found):
    of = [line for line in found if line.group == name]
    marks = [
      mark
      for line in of
      for mark in _marks(line, colors[line.scale], 1.0 if line.seed == first else 0.3)
    ]
    x, y = "log2 of rate / base's", "" if panels else "held-out loss, nats"
    panels.append(Panel(marks, name, x, y, y_range=_reach(of)))
  return Figure(panels, 320)


def _marks(line: Line, color: str, opacity: float) -> list[Curve | Dots]:
  """Points, the parabola through them, and the optimum on it."""
  what = f"{line.group}, {line.scale}, seed {line.seed}"
  tips = [f"{what}: {y:.4f} at {x:+.3g}" for x, y in line.points]
  xs, ys = _columns(line.points)
  marks: list[Curve | Dots] = [
    Dots(xs, ys, [color], line.scale, size=6, tips=tips, opacity=opacity)
  ]
  if line.optimum:
    x, y = line.optimum
    tip = f"{what}: optimum {y:.4f} at {x:+.3g}"
    marks.insert(0, Curve(*_columns(line.parabola), color, width=1.3, opacity=opacity))
    marks.append(Dots([x], [y], [color], size=11, shape="open", tips=[tip], opacity=opacity))
  return marks


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
  return [x for x, _ in points], [y for _, y in points]


def _reach(found: Sequence[Line]) -> tuple[float, float] | None:
  """Of the losses, without the worst quarter: far from the optimum they tell nothing."""
  losses = sorted(loss for line in found for _, loss in line.points)
  if not losses:
    return None
  top = losses[(3 * (len(losses) - 1)) // 4]
  low = min([losses[0], *(line.optimum[1] for line in found if line.optimum)])
  pad = 0.1 * (top - low) or 0.1
  return low - pad, top + pad


def shifts(experiment: Experiment) -> Figure | None:
  """The shift of every group's and control's optimum with its interval, and the limit on it."""
  c = experiment.conclusion
  found = [g for g in (*c["groups"], *c["controls"]) if g["shift"]["n"]]
  marks = []
  for row, g in enumerate(found):
    mean, high = (g["shift"][key] for key in ("mean", "high"))
    half = high - mean if math.isfinite(high) else 0.0
    color, tips = STATES.get(g["state"], COLORS[0]), [_interval(g["shift"])]
    marks.append(Dots([mean], [row], [color], size=11, shape="diamond", tips=tips, half=half))
  limit = c["limits"]["max_shift"]
  known = [abs(g["shift"][key]) for g in found for key in ("low", "high") if g["state"] in PLACED]
  reach = 1.2 * max([2 * limit, *filter(math.isfinite, known)])
  panel = Panel(
    marks,
    x="shift of the optimum from base to the largest scale, octaves",
    x_range=(-reach, reach),
    rows=[f"{g['name']}: {g['state'] or 'measured'}" for g in found],
    rules=[Rule(0.0), *(Rule(x, ORANGE, "5 4", "limit") for x in (-limit, limit))],
  )
  return Figure([panel], 92 + 30 * len(found)) if found else None


def coords_figure(experiment: Experiment) -> Figure | None:
  """The slope of every class of tensors by optimizer and axis; what is out has a mark."""
  slopes = experiment.conclusion["coords"].get("slopes", ())
  if not slopes:
    return None
  columns = list(dict.fromkeys(f"{s['axis']}, {s['optimizer']}" for s in slopes))
  names = list(dict.fromkeys(s["name"] for s in slopes))
  by_place = {(s["name"], f"{s['axis']}, {s['optimizer']}"): s for s in slopes}
  cells = [[by_place.get((name, column)) for column in columns] for name in names]
  values = np.array([[s["interval"]["mean"] if s else math.nan for s in row] for row in cells])
  texts = [
    ["" if s is None else f"{_interval(s['interval'])}{' out' if s['out'] else ''}" for s in row]
    for row in cells
  ]
  tips = [[f"{name}, {column}" for column in columns] for name in names]
  edges = [c - 0.5 for c in range(len(columns) + 1)]
  shades = Shades("slope", SLOPES, -0.6, 0.6)
  panel = Panel([Cells(values, edges, shades, tips, texts, space=2)], rows=names, columns=columns)
  return Figure([panel], 70 + 21 * len(names), scale=shades)


def _interval(i: Mapping[str, float] | None) -> str:
  if i is None or not i["n"]:
    return "—"
  shown = f"{i['mean']:+.3g}"
  if math.isfinite(i["high"]):
    shown += f" [{i['low']:+.3g}, {i['high']:+.3g}]"
  return shown.replace("-", "−")


def _number(value: float | None) -> str:
  return "—" if value is None or not math.isfinite(value) else f"{value:.3g}"
