"""What a sweep concluded, as rows and as a figure: rates against loss, optima, shifts, budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nmoe.records.reader import Experiment
from stages.report.figures import COLORS

HEAD = ("group", "state", "shift, octaves", "regret, nats", "exponent", "noise, nats", "why")
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
  return "groups" in experiment.conclusion and "points" in experiment.conclusion


def group_rows(experiment: Experiment) -> list[list[str]]:
  """A row a group, and one for the control."""
  c = experiment.conclusion
  groups = [*c["groups"], *([c["control"]] if c["control"] else ())]
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


def figure(experiment: Experiment) -> go.Figure:
  """A panel a group: losses over log2 of the rate, a color a scale, optima as dotted lines."""
  c = experiment.conclusion
  names = list(dict.fromkeys(p["group"] for p in c["points"]))
  panels = make_subplots(1, len(names), subplot_titles=names, horizontal_spacing=0.08)
  scales = list(dict.fromkeys(p["scale"] for p in c["points"]))
  colors = {scale: COLORS[i % len(COLORS)] for i, scale in enumerate(scales)}
  optima = {g["name"]: g["optima"] for g in c["groups"]}
  optima["off"] = (c["control"] or {}).get("optima", {})
  shown: set[str] = set()
  for column, name in enumerate(names, start=1):
    for scale, seed, xs, losses in _lines(c["points"], name):
      trace = go.Scatter(
        x=xs,
        y=losses,
        name=scale,
        legendgroup=scale,
        showlegend=scale not in shown,
        mode="lines+markers",
        line={"color": colors[scale]},
        hovertext=f"{scale} seed {seed}",
      )
      shown.add(scale)
      panels.add_trace(trace, row=1, col=column)
    for scale, by_seed in optima.get(name, {}).items():
      known = [x for x in by_seed.values() if x is not None and math.isfinite(x)]
      if known and scale in colors:
        mean = sum(known) / len(known)
        panels.add_vline(x=mean, line={"color": colors[scale], "dash": "dot"}, row=1, col=column)
  panels.update_xaxes(title_text="log2 of the rate over the base's")
  panels.update_yaxes(title_text="held-out loss, nats", col=1)
  panels.update_layout(height=380, template="plotly_white", margin={"t": 40, "b": 40})
  return panels


def _lines(
  points: list[Mapping[str, Any]], group: str
) -> Iterator[tuple[str, int, list[float], list[float]]]:
  """(scale, seed, x, loss) of a group's grids, what diverged left out."""
  found: dict[tuple[str, int], dict[float, float]] = {}
  for p in points:
    if p["group"] == group and p["loss"] is not None:
      found.setdefault((p["scale"], p["seed"]), {})[p["log2_rate"]] = p["loss"]
  for (scale, seed), grid in found.items():
    xs = sorted(grid)
    yield scale, seed, xs, [grid[x] for x in xs]


def _interval(i: Mapping[str, float] | None) -> str:
  if i is None or not i["n"]:
    return "—"
  if not math.isfinite(i["high"]):
    return f"{i['mean']:+.3g}"
  return f"{i['mean']:+.3g} [{i['low']:+.3g}, {i['high']:+.3g}]"


def _number(value: float | None) -> str:
  return "—" if value is None or not math.isfinite(value) else f"{value:.3g}"
