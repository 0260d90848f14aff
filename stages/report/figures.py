"""The plots of a report. Each takes arms and returns a figure, or None where nothing was logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from stages.judge.paired import Paired
from stages.report.curves import band
from stages.report.drawing import (
  Band,
  Bars,
  Cells,
  Curve,
  Dots,
  Figure,
  Panel,
  Rule,
  Shades,
)
from stages.report.findings import LEGS, Arm

COLORS = ("#45494e", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # as in the dashboard
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
  "#d3d7dc",
  "#56b4e9",
  "#0072b2",
  "#0c5a44",
  "#e69f00",
  "#4e4167",
  "#bc6616",
  "#5a4c16",
  "#009e73",
  "#cc79a7",
)
FLIGHT_SCALE = ((0.0, "#a32626"), (0.35, "#e6b97a"), (0.6, "#f4f6f9"), (1.0, "#1f5fbf"))
ORANGE = COLORS[2]
MAX_POINTS, MAX_COLUMNS = 1200, 120


def curves(
  arms: Sequence[Arm], panels: Sequence[tuple[str, str]], skip: float = 0.0
) -> Figure | None:
  """One panel per (tag, title) that was logged: mean over seeds, a band from min to max.

  Runs that did not complete are dotted lines of their own. The y axis leaves out what lies above
  everything after the first `skip` of the tokens, so that the late differences can be seen.
  """
  shown = [
    (tag, title) for tag, title in panels if any(tag in run for a in arms for run in a.logged)
  ]
  drawn = [
    Panel(
      [
        mark
        for arm, color in zip(arms, _colors(arms), strict=True)
        for mark in _curve(arm, tag, color)
      ],
      title,
      "tokens",
      y_range=_reach(arms, tag, skip) if skip else None,
    )
    for tag, title in shown
  ]
  return Figure(drawn, 290) if drawn else None


def _reach(arms: Sequence[Arm], tag: str, skip: float) -> tuple[float, float] | None:
  """Bounds of a tag's finite values after `skip` of the tokens, with a margin."""
  series = [s for arm in arms for done in (True, False) for s in arm.series(tag, done)]
  start = skip * max(x[-1] for x, _ in series)
  late = np.concatenate([y[(x >= start) & np.isfinite(y)] for x, y in series])
  if not len(late):
    return None
  pad = 0.05 * float(np.ptp(late)) or 0.05 * abs(float(late[0])) or 1.0
  return float(late.min()) - pad, float(late.max()) + pad


def _curve(arm: Arm, tag: str, color: str) -> list[Band | Curve]:
  marks: list[Band | Curve] = []
  done = arm.series(tag)
  if done:
    x, mean, low, high = thin(*band(done))
    marks = [Band(x, low, high, color), Curve(x, mean, color, arm.name)]
  for x, y in arm.series(tag, completed=False):
    name = f"{arm.name}, not completed"
    marks.append(Curve(*thin(x, y), color, name, width=1.5, dash="2 3"))
  return marks


def differences(
  judged: Paired,
  seeds: Sequence[int],
  title: str,
  direction: str,
  min_effect: float,
  scale: float = 1.0,
) -> Figure:
  """Every seed's paired difference and the mean with its interval, against 0 and min_effect.

  `seeds` are those of judged.differences; `scale` takes the metric to the unit of `title`.
  """
  each = [scale * d for d in judged.differences]
  mean = scale * judged.mean_difference
  half = scale * (judged.high - judged.mean_difference) if math.isfinite(judged.high) else 0.0
  edge = scale * min_effect
  edges = {"lower": [-edge], "higher": [edge], "none": [-edge, edge]}[direction]
  effect = [Rule(x, ORANGE, "5 4", "smallest effect that matters") for x in edges if edge]
  reach = [0.0, *edges, *each, mean - half, mean + half]
  pad = 0.06 * (max(reach) - min(reach)) or 1.0
  rows = [f"seed {seed}" for seed in seeds] + [f"mean, {judged.confidence:.0%} interval"]
  tips = [f"seed {seed}: {d:+.4g}" for seed, d in zip(seeds, each, strict=True)]
  last = len(rows) - 1
  panel = Panel(
    [
      Dots(each, range(last), [COLORS[0]], size=9, tips=tips),
      Dots([mean], [last], [COLORS[1]], size=11, shape="diamond", tips=[f"{mean:+.4g}"], half=half),
    ],
    x=title,
    x_range=(min(reach) - pad, max(reach) + pad),
    rows=rows,
    rules=[Rule(0.0), *effect],
  )
  return Figure([panel], 92 + 26 * len(rows))


def load_heatmap(arms: Sequence[Arm]) -> Figure | None:
  """Load of the fullest expert over the mean, layer by step, averaged over seeds; 1 is balanced."""
  shown = [arm for arm in arms if arm.layers() and arm.series(_load_tag(arm.layers()[0]))]
  maps = []
  for arm in shown:
    rows = [band(arm.series(_load_tag(layer)))[:2] for layer in arm.layers()]
    x, *means = thin(rows[0][0], *(mean for _, mean in rows), limit=MAX_COLUMNS)
    maps.append((x, np.stack(means)))
  if not maps:
    return None
  highest = float(np.nanmax([np.nanmax(means) for _, means in maps]))
  shades = Shades("max / mean", LOAD_SCALE, 1.0, max(highest, 1.01))
  panels = [_load_panel(arm, x, means, shades) for arm, (x, means) in zip(shown, maps, strict=True)]
  most = max(len(arm.layers()) for arm in shown)
  return Figure(panels, 76 + 20 * most, across=2, scale=shades)


def _load_panel(arm: Arm, x: np.ndarray, means: np.ndarray, shades: Shades) -> Panel:
  names = [f"layer {layer}" for layer in arm.layers()]
  tips = [
    [f"{name}, {at:,.0f} tokens: {value:.2f}" for at, value in zip(x, row, strict=True)]
    for name, row in zip(names, means, strict=True)
  ]
  before = 2 * x[0] - x[1] if len(x) > 1 else 0.0
  cells = Cells(means, [max(0.0, float(before)), *map(float, x)], shades, tips)
  return Panel([cells], arm.name, "tokens", rows=names)


def _load_tag(layer: int) -> str:
  return f"moe/{layer}/load_max_over_mean"


def flight_heatmap(arms: Sequence[Arm]) -> Figure | None:
  """Signal over quantization noise by product and leg, at the last measured step."""
  shown = [(arm, arm.flight("sqnr_db")) for arm in arms if arm.flight("sqnr_db")]
  known = [v for _, values in shown for v in values.values() if math.isfinite(v)]
  if not known:
    return None
  shades = Shades("signal over noise, dB", FLIGHT_SCALE, min(known), max(known))
  panels = [_flight_panel(arm, values, shades) for arm, values in shown]
  most = max(len(panel.rows) for panel in panels)
  return Figure(panels, 70 + 20 * most, across=2, scale=shades)


def _flight_panel(arm: Arm, values: Mapping[tuple[int, str, str], float], shades: Shades) -> Panel:
  places = list(dict.fromkeys(place[:2] for place in values))
  rows = np.array([[values.get((*place, leg), math.nan) for leg in LEGS] for place in places])
  names = [f"layer {layer} {product}" for layer, product in places]
  texts = [[f"{v:.1f}" for v in row] for row in rows]
  tips = [[f"{name}, {leg}" for leg in LEGS.values()] for name in names]
  edges = [c - 0.5 for c in range(len(LEGS) + 1)]
  cells = Cells(rows, edges, shades, tips, texts, space=2)
  return Panel([cells], arm.name, rows=names, columns=tuple(LEGS.values()))


def phases(arms: Sequence[Arm]) -> Figure | None:
  """Milliseconds per step by phase, over all steps and seeds of an arm that completed."""
  spent = {p: [1000 * arm.per_step(f"time/{p}_s") for arm in arms] for p in PHASES}
  totals = [sum(of) for of in zip(*spent.values(), strict=True)]
  begin = [0.0] * len(arms)
  marks = []
  for phase, color in zip(PHASES, PHASE_COLORS, strict=True):
    bars = []
    for row, ms in enumerate(spent[phase]):
      share = ms / totals[row] if totals[row] else 0.0
      bars.append((row, begin[row], ms, f"{share:.0%}", f"{phase}: {ms:.2f} ms, {share:.1%}"))
      begin[row] += ms
    marks += [Bars(bars, color, phase)] if any(spent[phase]) else []
  if not marks:
    return None
  panel = Panel(marks, x="ms per step", x_range=(0.0, max(totals)), rows=[arm.name for arm in arms])
  return Figure([panel], 76 + 40 * len(arms))


def _colors(arms: Sequence[Arm]) -> list[str]:
  """The baseline is grey, variants are not; an arm alone is no baseline."""
  first = 1 if len(arms) == 1 else 0
  return [COLORS[(first + i) % len(COLORS)] for i in range(len(arms))]


def thin(x: np.ndarray, *ys: np.ndarray, limit: int = MAX_POINTS) -> list[np.ndarray]:
  """At most `limit` points, evenly chosen, the last one always kept."""
  keep = np.arange(len(x) - 1, -1, -max(1, math.ceil(len(x) / limit)))[::-1]
  return [column[keep] for column in (x, *ys)]
