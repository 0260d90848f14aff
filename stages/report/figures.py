"""The plots of a report. Each takes arms and returns a figure, or None where nothing was logged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from stages.judge.paired import Paired
from stages.report.curves import band
from stages.report.findings import LEGS, Arm

COLORS = ("#8a929c", "#1f5fbf", "#c2571a", "#0b7a5c", "#7a4fb5", "#b3366b")
LOAD_SCALE = ((0.0, "#f4f6f9"), (0.25, "#c5d7ee"), (0.6, "#4f86c9"), (1.0, "#12305e"))
PHASES = (
  "load",
  "forward",
  "backward",
  "graph",
  "clip",
  "step",
  "gather",
  "log",
  "eval",
  "checkpoint",
)
PHASE_COLORS = (
  "#c9ced6",
  "#7fa8dc",
  "#1f5fbf",
  "#55b1c9",
  "#e0a86a",
  "#12305e",
  "#a6761d",
  "#9aa3ae",
  "#6fb39b",
  "#b08fd0",
)
FLIGHT_SCALE = ((0.0, "#a32626"), (0.35, "#e6b97a"), (0.6, "#f4f6f9"), (1.0, "#1f5fbf"))
MAX_POINTS = 1200
FONT = 'ui-sans-serif, system-ui, "Helvetica Neue", Arial, sans-serif'


def curves(
  arms: Sequence[Arm], panels: Sequence[tuple[str, str]], skip: float = 0.0
) -> go.Figure | None:
  """One panel per (tag, title) that was logged: mean over seeds, a band from min to max.

  Runs that did not complete are dotted lines of their own. The y axis leaves out what lies above
  everything after the first `skip` of the tokens, so that the late differences can be seen.
  """
  shown = [
    (tag, title) for tag, title in panels if any(tag in run for a in arms for run in a.logged)
  ]
  if not shown:
    return None
  figure = make_subplots(
    1, len(shown), subplot_titles=[t for _, t in shown], horizontal_spacing=0.08
  )
  for column, (tag, _) in enumerate(shown, start=1):
    for arm, color in zip(arms, _colors(arms), strict=True):
      for trace in _curve(arm, tag, color, legend=column == 1):
        figure.add_trace(trace, row=1, col=column)
    if skip:
      figure.update_yaxes(range=_reach(arms, tag, skip), row=1, col=column)
  figure.update_xaxes(title_text="tokens")
  return finish(figure, 320)


def _reach(arms: Sequence[Arm], tag: str, skip: float) -> list[float] | None:
  """Bounds of a tag's finite values after `skip` of the tokens, with a margin."""
  series = [s for arm in arms for done in (True, False) for s in arm.series(tag, done)]
  start = skip * max(x[-1] for x, _ in series)
  late = np.concatenate([y[(x >= start) & np.isfinite(y)] for x, y in series])
  if not len(late):
    return None
  pad = 0.05 * float(np.ptp(late))
  return [float(late.min()) - pad, float(late.max()) + pad]


def _curve(arm: Arm, tag: str, color: str, legend: bool) -> list[go.Scatter]:
  common = {"legendgroup": arm.name, "line": {"color": color, "width": 2}, "mode": "lines"}
  traces = []
  done = arm.series(tag)
  if done:
    x, mean, low, high = _thin(*band(done))
    edge = {"line": {"width": 0}, "mode": "lines", "showlegend": False, "hoverinfo": "skip"}
    group = {"legendgroup": arm.name}
    mode = {"mode": "lines+markers"} if len(x) < 3 else {}
    traces = [
      go.Scatter(x=x, y=low, **edge, **group),
      go.Scatter(x=x, y=high, fill="tonexty", fillcolor=_faint(color), **edge, **group),
      go.Scatter(x=x, y=mean, name=arm.name, showlegend=legend, **(common | mode)),
    ]
  for x, y in arm.series(tag, completed=False):
    x, y = _thin(x, y)
    dotted = common | {"line": {"color": color, "width": 1.5, "dash": "dot"}}
    name = f"{arm.name}, not completed"
    traces.append(go.Scatter(x=x, y=y, name=name, showlegend=legend, **dotted))
    legend = False
  return traces


def differences(
  judged: Paired,
  seeds: Sequence[int],
  title: str,
  direction: str,
  min_effect: float,
  scale: float = 1.0,
) -> go.Figure:
  """Every seed's paired difference and the mean with its interval, against 0 and min_effect.

  `seeds` are those of judged.differences; `scale` takes the metric to the unit of `title`.
  """
  figure = go.Figure()
  rows = [f"seed {seed}" for seed in seeds]
  points = {"mode": "markers", "marker": {"size": 9, "color": COLORS[0]}, "showlegend": False}
  figure.add_trace(go.Scatter(x=[scale * d for d in judged.differences], y=rows, **points))
  bars, half = None, 0.0
  if math.isfinite(judged.high):
    half = scale * (judged.high - judged.mean_difference)
    bars = {"type": "data", "array": [half], "thickness": 2, "width": 7, "color": COLORS[1]}
  mean = {"mode": "markers", "marker": {"size": 11, "color": COLORS[1], "symbol": "diamond"}}
  label = f"mean, {judged.confidence:.0%} interval"
  at = [scale * judged.mean_difference]
  figure.add_trace(go.Scatter(x=at, y=[label], error_x=bars, showlegend=False, **mean))
  figure.add_vline(x=0, line={"color": "#1c2127", "width": 1})
  edge = scale * min_effect
  edges = {"lower": [-edge], "higher": [edge], "none": [-edge, edge]}
  for x in edges[direction] if min_effect else []:
    text = {"annotation_text": "smallest effect that matters", "annotation_font_size": 11}
    style = {"color": "#c2571a", "width": 1.5, "dash": "dash"}
    figure.add_vline(x=x, line=style, annotation_position="top", **text)
  reach = [0.0, *edges[direction], *(scale * d for d in judged.differences)]
  reach += [at[0] - half, at[0] + half]
  pad = 0.06 * (max(reach) - min(reach)) or 1.0
  figure.update_xaxes(title_text=title, range=[min(reach) - pad, max(reach) + pad])
  figure.update_yaxes(autorange="reversed", showgrid=False)
  return finish(figure, 130 + 34 * (len(rows) + 1))


def load_heatmap(arms: Sequence[Arm]) -> go.Figure | None:
  """Load of the fullest expert over the mean, layer by step, averaged over seeds; 1 is balanced."""
  shown = [arm for arm in arms if arm.layers() and arm.series(_load_tag(arm.layers()[0]))]
  if not shown:
    return None
  figure = make_subplots(
    1, len(shown), subplot_titles=[a.name for a in shown], horizontal_spacing=0.06
  )
  for column, arm in enumerate(shown, start=1):
    rows = [band(arm.series(_load_tag(layer)))[:2] for layer in arm.layers()]
    x, *means = _thin(rows[0][0], *(mean for _, mean in rows), limit=240)
    names = [f"layer {layer}" for layer in arm.layers()]
    tip = "%{y}<br>%{x:,.3s} tokens<br>max / mean %{z:.2f}<extra></extra>"
    heat = go.Heatmap(x=x, y=names, z=np.stack(means), coloraxis="coloraxis", hovertemplate=tip)
    figure.add_trace(heat, row=1, col=column)
  bar = {"title": "max / mean", "thickness": 10, "outlinewidth": 0, "len": 0.9}
  figure.update_yaxes(autorange="reversed")
  figure.update_layout(coloraxis={"colorscale": LOAD_SCALE, "cmin": 1, "colorbar": bar})
  figure.update_xaxes(title_text="tokens", showgrid=False)
  figure.update_yaxes(showgrid=False)
  return finish(figure, 170 + 26 * max(len(arm.layers()) for arm in shown))


def _load_tag(layer: int) -> str:
  return f"moe/{layer}/load_max_over_mean"


def flight_heatmap(arms: Sequence[Arm]) -> go.Figure | None:
  """Signal over quantization noise by product and leg, at the last measured step."""
  shown = [(arm, arm.flight("sqnr_db")) for arm in arms if arm.flight("sqnr_db")]
  if not shown:
    return None
  names = [arm.name for arm, _ in shown]
  figure = make_subplots(1, len(shown), subplot_titles=names, horizontal_spacing=0.16)
  for column, (_, values) in enumerate(shown, start=1):
    places = list(dict.fromkeys(place[:2] for place in values))
    rows = [[values.get((*place, leg), math.nan) for leg in LEGS] for place in places]
    cells = [[v if math.isfinite(v) else None for v in row] for row in rows]
    labels = [f"layer {layer} {product}" for layer, product in places]
    tip = "%{y}<br>%{x}<br>%{z:.1f} dB<extra></extra>"
    style = {"coloraxis": "coloraxis", "hovertemplate": tip, "texttemplate": "%{z:.1f}"}
    heat = go.Heatmap(x=list(LEGS.values()), y=labels, z=cells, xgap=2, ygap=1, **style)
    figure.add_trace(heat, row=1, col=column)
  bar = {"title": "dB", "thickness": 10, "outlinewidth": 0, "len": 0.9}
  figure.update_layout(coloraxis={"colorscale": FLIGHT_SCALE, "colorbar": bar})
  figure.update_yaxes(autorange="reversed", showgrid=False)
  figure.update_xaxes(showgrid=False)
  most = max(len({place[:2] for place in values}) for _, values in shown)
  return finish(figure, 130 + 22 * most)


def phases(arms: Sequence[Arm]) -> go.Figure | None:
  """Milliseconds per step by phase, over all steps and seeds of an arm that completed."""
  figure = go.Figure()
  names = [arm.name for arm in arms]
  totals = [sum(1000 * arm.per_step(f"time/{phase}_s") for phase in PHASES) for arm in arms]
  for phase, color in zip(PHASES, PHASE_COLORS, strict=True):
    width = [1000 * arm.per_step(f"time/{phase}_s") for arm in arms]
    if any(width):
      tip = f"{phase}: %{{x:.2f}} ms<extra></extra>"
      share = [w / t if t else 0.0 for w, t in zip(width, totals, strict=True)]
      text = {"text": [f"{s:.0%}" if s >= 0.05 else "" for s in share], "textposition": "inside"}
      text["insidetextanchor"] = "middle"
      bar = {"orientation": "h", "marker_color": color, "hovertemplate": tip, "width": 0.55}
      figure.add_trace(go.Bar(x=width, y=names, name=phase, **bar, **text))
  if not figure.data:
    return None
  figure.update_layout(barmode="stack", legend_traceorder="normal")
  figure.update_xaxes(title_text="ms per step")
  figure.update_yaxes(autorange="reversed", showgrid=False)
  return finish(figure, 130 + 44 * len(arms))


def _colors(arms: Sequence[Arm]) -> list[str]:
  """The baseline is grey, variants are not; an arm alone is no baseline."""
  first = 1 if len(arms) == 1 else 0
  return [COLORS[(first + i) % len(COLORS)] for i in range(len(arms))]


def _faint(color: str) -> str:
  red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
  return f"rgba({red},{green},{blue},0.18)"


def _thin(x: np.ndarray, *ys: np.ndarray, limit: int = MAX_POINTS) -> list[np.ndarray]:
  """At most `limit` points, evenly chosen, the last one always kept; float32, half the page."""
  keep = np.arange(len(x) - 1, -1, -max(1, math.ceil(len(x) / limit)))[::-1]
  return [column[keep].astype(np.float32) for column in (x, *ys)]


def finish(figure: go.Figure, height: int) -> go.Figure:
  """The figure in the report's style, `height` pixels high."""
  figure.update_layout(
    template="plotly_white",
    height=height,
    font={"family": FONT, "size": 12, "color": "#1c2127"},
    margin={"l": 8, "r": 8, "t": 46, "b": 48},
    legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.06, "yanchor": "bottom"},
    hoverlabel={"font_family": FONT},
  )
  grid = {"gridcolor": "#edeff2", "zeroline": False, "automargin": True}
  figure.update_xaxes(
    **grid, linecolor="#c9ced6", title_font_size=12, ticks="outside", tickcolor="#c9ced6", ticklen=4
  )
  figure.update_yaxes(**grid)
  figure.update_annotations(font_size=13)
  return figure
