"""What a swarm of mixtures concluded, as rows and figures: models, mixtures, losses, the proof."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nmoe.records.reader import Experiment
from stages.report.figures import COLORS, finish

MODEL_HEAD = ("left one out", "RMSE", "skill", "rank correlation")
PROOF_HEAD = ("proposed against", "difference, bits per byte", "95 %", "seeds", "verdict")
LOSSES = ((0.0, "#12305e"), (0.5, "#7fa8dc"), (1.0, "#f0e3d4"))


def is_swarm(experiment: Experiment) -> bool:
  """Whether its conclusion is that of `nmoe proxy mix`."""
  return {"proposal", "objective"} <= experiment.conclusion.keys()


def model_rows(experiment: Experiment) -> list[list[str]]:
  models = experiment.conclusion["proposal"]["models"].items()
  keys = ("rmse", "skill", "rank")
  return [[name, *(_number(of[key]) for key in keys)] for name, of in models]


def proof_rows(experiment: Experiment) -> list[list[str]]:
  """A row a mixture and size that the proposal was run against."""
  return [
    [
      name,
      f"{one['mean_difference']:+.4f}",
      f"{one['low']:+.4f} … {one['high']:+.4f}",
      str(one["n"]),
      one["verdict"],
    ]
    for name, one in experiment.conclusion.get("against", {}).items()
  ]


def facts(experiment: Experiment) -> list[tuple[str, str]]:
  """Of the proposal: shares, epochs in the target's run, how far it is from the natural mixture."""
  c = experiment.conclusion
  if c["proposal"]["shares"] is None:
    return [("proposal", "none")]
  shares = zip(c["sources"], c["proposal"]["shares"], strict=True)
  pairs = [(f"share of {name}", f"{x:.3f}") for name, x in shares]
  pairs += [(f"epochs of {name}", f"{x:.2f}") for name, x in c.get("epochs", {}).items()]
  return [*pairs, ("KL from natural, nats", _number(c["proposal"]["divergence"]))]


def head(experiment: Experiment) -> list[str]:
  sources = experiment.conclusion["sources"]
  shares = (f"share of {s}" for s in sources)
  return ["mixture", "seed", *shares, *(f"{s}, bits per byte" for s in sources)]


def rows(experiment: Experiment) -> list[list[str]]:
  """A row a run: shares, and what each source's held-out text costs."""
  c = experiment.conclusion
  return [
    [m["arm"], str(m["seed"]), *(f"{m[s]:.3f}" for s in c["sources"]), *map(_number, m["bpb"])]
    for m in c["mixtures"]
  ]


def figure(experiment: Experiment) -> go.Figure:
  """Of two sources the share of one against the objective, of more a panel a pair of shares with
  the objective as color; then what the law predicts of each mixture, left out, against what was
  seen.
  """
  c = experiment.conclusion
  swarm = [m for m in c["mixtures"] if not m["size"] and all(map(math.isfinite, m["bpb"]))]
  pairs = list(combinations(c["sources"], 2))
  planes = [("share of " + c["sources"][0], "objective")] if len(pairs) == 1 else pairs
  titles = [" and ".join(pair) for pair in planes] + ["left one out: predicted and seen"]
  drawn = make_subplots(1, len(planes) + 1, subplot_titles=titles, horizontal_spacing=0.07)
  values = [_objective(c, m) for m in swarm]
  texts = [f"{m['arm']} seed {m['seed']}: {v:.4f}" for m, v in zip(swarm, values, strict=True)]
  style = {"mode": "markers", "showlegend": False, "hovertext": texts, "hoverinfo": "text"}
  marks = {"size": 8, "line": {"width": 0.5, "color": "#1c2127"}}
  for column, (a, b) in enumerate(planes, start=1):
    if len(pairs) == 1:
      x, y, color = [m[c["sources"][0]] for m in swarm], values, [_color(m) for m in swarm]
      marker = marks | {"color": color}
    else:
      x, y = ([m[name] for m in swarm] for name in (a, b))
      marker = marks | {"color": values, "colorscale": LOSSES, "showscale": column == 1}
      marker["colorbar"] = {"title": "objective", "thickness": 10, "outlinewidth": 0}
    drawn.add_trace(go.Scatter(x=x, y=y, marker=marker, **style), row=1, col=column)
    drawn.update_xaxes(title_text=a, col=column)
    drawn.update_yaxes(title_text=f"{b}, bits per byte" if len(pairs) == 1 else b, col=column)
  _predictions(drawn, c["proposal"]["left_out"], len(planes) + 1)
  return finish(drawn, 380)


def _predictions(drawn: go.Figure, pairs: list[list[float]], column: int) -> None:
  """Seen against predicted, and the line on which they are equal."""
  if not pairs:
    return
  said, seen = zip(*pairs, strict=True)
  ends = [min(*said, *seen), max(*said, *seen)]
  line = {"color": COLORS[0], "width": 1, "dash": "dash"}
  equal = go.Scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False)
  points = go.Scatter(
    x=said, y=seen, mode="markers", marker={"color": COLORS[1], "size": 7}, showlegend=False
  )
  drawn.add_trace(equal, row=1, col=column)
  drawn.add_trace(points, row=1, col=column)
  drawn.update_xaxes(title_text="predicted by the law of the others", col=column)
  drawn.update_yaxes(title_text="seen", col=column)


def _objective(c: Mapping[str, Any], m: Mapping[str, Any]) -> float:
  return sum(w * loss for w, loss in zip(c["objective"], m["bpb"], strict=True))


def _color(m: Mapping[str, Any]) -> str:
  """The proposal and the anchors stand out of the swarm."""
  named = {"proposed": COLORS[2], "natural": COLORS[3], "uniform": COLORS[4]}
  return named.get(m["arm"], COLORS[1])


def _number(value: float | None) -> str:
  return f"{value:.4f}" if value is not None and math.isfinite(value) else "—"
