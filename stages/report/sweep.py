"""What a sweep concluded, as rows and as a figure: rates against loss, optima, shifts, budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nmoe.records.reader import Experiment
from stages.judge.transfer import WINDOW
from stages.report.figures import COLORS, finish

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


def figure(experiment: Experiment) -> go.Figure:
  """A panel a group: losses over log2 of the rate, a color a scale, parabolas and optima."""
  found = lines(experiment)
  names = list(dict.fromkeys(line.group for line in found))
  panels = make_subplots(1, len(names), subplot_titles=names, horizontal_spacing=0.05)
  scales = list(dict.fromkeys(line.scale for line in found))
  colors = {scale: COLORS[i % len(COLORS)] for i, scale in enumerate(scales)}
  shown: set[str] = set()
  first_seed = found[0].seed if found else 0
  for line in found:
    place = {"row": 1, "col": names.index(line.group) + 1}
    common = {"legendgroup": line.scale, "name": line.scale, "hovertext": f"seed {line.seed}"}
    common["opacity"] = 1.0 if line.seed == first_seed else 0.3
    for trace in _traces(line, colors[line.scale]):
      first = line.scale not in shown and trace.mode == "markers"
      shown |= {line.scale} if first else set()
      panels.add_trace(trace.update(common | {"showlegend": first}), **place)
  panels.update_xaxes(title_text="log2 of rate / base's")
  panels.update_yaxes(title_text="held-out loss, nats", col=1)
  for column, name in enumerate(names, start=1):
    panels.update_yaxes(range=_reach([line for line in found if line.group == name]), col=column)
  return finish(panels, 380)


def _traces(line: Line, color: str) -> list[go.Scatter]:
  """Points, the parabola through them, and the optimum on it."""
  marks = (
    (line.points, {"mode": "markers", "marker": {"color": color, "size": 6}}),
    (line.parabola, {"mode": "lines", "line": {"color": color, "width": 1.3}}),
    (
      (line.optimum,) if line.optimum else (),
      {"mode": "markers", "marker": {"color": color, "size": 11, "symbol": "diamond-open"}},
    ),
  )
  return [
    go.Scatter(x=[x for x, _ in of], y=[y for _, y in of], **style) for of, style in marks if of
  ]


def _reach(found: Sequence[Line]) -> list[float] | None:
  """Of the losses, without the worst quarter: far from the optimum they tell nothing."""
  losses = sorted(loss for line in found for _, loss in line.points)
  if not losses:
    return None
  top = losses[(3 * (len(losses) - 1)) // 4]
  pad = 0.1 * (top - losses[0]) or 0.1
  return [losses[0] - pad, top + pad]


def shifts(experiment: Experiment) -> go.Figure:
  """The shift of every group's and control's optimum with its interval, and the limit on it."""
  c = experiment.conclusion
  found = [g for g in (*c["groups"], *c["controls"]) if g["shift"]["n"]]
  drawn = go.Figure()
  for g in found:
    low, high = (g["shift"][key] for key in ("low", "high"))
    known = math.isfinite(high)
    bars = {"array": [high - g["shift"]["mean"] if known else 0], "thickness": 2, "width": 7}
    state = g["state"] or "measured"
    drawn.add_trace(
      go.Scatter(
        x=[g["shift"]["mean"]],
        y=[f"{g['name']}: {state}"],
        error_x={"type": "data", **bars} if known else None,
        mode="markers",
        marker={"size": 11, "symbol": "diamond", "color": STATES.get(state, COLORS[0])},
        hovertext=_interval(g["shift"]),
        showlegend=False,
      )
    )
  for edge in (-c["limits"]["max_shift"], c["limits"]["max_shift"]):
    drawn.add_vline(x=edge, line={"color": "#c2571a", "width": 1.5, "dash": "dash"})
  drawn.add_vline(x=0, line={"color": "#1c2127", "width": 1})
  known = [abs(g["shift"][key]) for g in found for key in ("low", "high") if g["state"] in PLACED]
  reach = 1.2 * max([2 * c["limits"]["max_shift"], *filter(math.isfinite, known)])
  title = "shift of the optimum from base to the largest scale, octaves"
  drawn.update_xaxes(title_text=title, range=[-reach, reach])
  drawn.update_yaxes(autorange="reversed", showgrid=False)
  return finish(drawn, 130 + 34 * len(found))


def coords_figure(experiment: Experiment) -> go.Figure | None:
  """The slope of every class of tensors by optimizer and axis; what is out has a mark."""
  slopes = experiment.conclusion["coords"].get("slopes", ())
  if not slopes:
    return None
  columns = list(dict.fromkeys(f"{s['axis']}, {s['optimizer']}" for s in slopes))
  names = list(dict.fromkeys(s["name"] for s in slopes))
  by_place = {(s["name"], f"{s['axis']}, {s['optimizer']}"): s for s in slopes}
  cells = [[by_place.get((name, column)) for column in columns] for name in names]
  values = [[s["interval"]["mean"] if s else None for s in row] for row in cells]
  texts = [
    ["" if s is None else f"{_interval(s['interval'])}{' out' if s['out'] else ''}" for s in row]
    for row in cells
  ]
  heat = go.Heatmap(x=columns, y=names, z=values, text=texts, texttemplate="%{text}", xgap=2)
  heat.update(ygap=1, colorscale=SLOPES, zmid=0, zmin=-0.6, zmax=0.6, hoverinfo="skip")
  heat.update(colorbar={"title": "slope", "thickness": 10, "outlinewidth": 0, "len": 0.9})
  drawn = go.Figure(heat)
  drawn.update_yaxes(autorange="reversed", showgrid=False)
  drawn.update_xaxes(showgrid=False, side="top")
  return finish(drawn, 110 + 22 * len(names))


def _interval(i: Mapping[str, float] | None) -> str:
  if i is None or not i["n"]:
    return "—"
  if not math.isfinite(i["high"]):
    return f"{i['mean']:+.3g}"
  return f"{i['mean']:+.3g} [{i['low']:+.3g}, {i['high']:+.3g}]"


def _number(value: float | None) -> str:
  return "—" if value is None or not math.isfinite(value) else f"{value:.3g}"
