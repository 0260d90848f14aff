"""What a swarm of mixtures concluded, as rows and figures: models, mixtures, losses, the proof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from nmoe.records.reader import Experiment
from stages.report.drawing import Curve, Dots, Figure, Panel, Shades
from stages.report.figures import COLORS

MODEL_HEAD = ("left one out", "RMSE", "skill", "rank correlation")
PROOF_HEAD = ("proposed against", "difference, bits per byte", "95 %", "seeds", "verdict")
NAMED = {"proposed": COLORS[2], "natural": COLORS[3], "uniform": COLORS[4]}  # stand out
SWARM = "swarm"
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


def figure(experiment: Experiment) -> Figure:
  """Of two sources the share of one against the objective, of more a panel a pair of shares with
  the objective as color; proposed, natural and uniform mixture stand out, once each. Then what the
  law predicts of each mixture, left out, against what was seen.
  """
  c = experiment.conclusion
  swarm = [m for m in c["mixtures"] if not m["size"] and all(map(math.isfinite, m["bpb"]))]
  values = [_objective(c, m) for m in swarm]
  pairs = list(combinations(c["sources"], 2))
  scale = None
  if len(pairs) == 1:
    first = c["sources"][0]
    title, x, y = f"share of {first} and objective", f"share of {first}", "objective, bits per byte"
    panels = [Panel(_by_name(swarm, [m[first] for m in swarm], values, values), title, x, y)]
  else:
    scale = Shades("objective", LOSSES, min(values, default=0.0), max(values, default=1.0))
    panels = []
    for a, b in pairs:
      xs, ys = [m[a] for m in swarm], [m[b] for m in swarm]
      dots = Dots(xs, ys, list(map(scale.color, values)), tips=_tips(swarm, values))
      named = _by_name(swarm, xs, ys, values, size=15, shape="open", rest=False)
      panels.append(Panel([dots, *named], f"{a} and {b}", f"share of {a}", f"share of {b}"))
  predicted = _predictions(c["proposal"]["left_out"])
  return Figure([*panels, *predicted], 340, scale=scale)


def _by_name(
  mixtures: Sequence[Mapping[str, Any]],
  xs: Sequence[float],
  ys: Sequence[float],
  values: Sequence[float],
  rest: bool = True,
  size: float = 8,
  shape: str = "circle",
) -> list[Dots]:
  """Those of each name in its color, those without one, where asked for, first."""
  tips, found = _tips(mixtures, values), []
  for name, color in NAMED.items() if not rest else ({SWARM: COLORS[1]} | NAMED).items():
    of = [i for i, m in enumerate(mixtures) if (m["arm"] if m["arm"] in NAMED else SWARM) == name]
    if of:
      x, y, said = ([column[i] for i in of] for column in (xs, ys, tips))
      found.append(Dots(x, y, [color], name, size, shape, said))
  return found


def _tips(mixtures: Sequence[Mapping[str, Any]], values: Sequence[float]) -> list[str]:
  pairs = zip(mixtures, values, strict=True)
  return [f"{m['arm']} seed {m['seed']}: {v:.4f}" for m, v in pairs]


def _predictions(pairs: list[list[float]]) -> list[Panel]:
  """Seen against predicted, and the line on which they are equal."""
  if not pairs:
    return []
  said, seen = zip(*pairs, strict=True)
  ends = [min(*said, *seen), max(*said, *seen)]
  tips = [f"predicted {a:.4f}, seen {b:.4f}" for a, b in pairs]
  marks = [
    Curve(ends, ends, COLORS[0], width=1, dash="5 4"),
    Dots(said, seen, [COLORS[1]], size=7, tips=tips),
  ]
  title = "left one out: predicted and seen"
  return [Panel(marks, title, "predicted by the law of the others", "seen")]


def _objective(c: Mapping[str, Any], m: Mapping[str, Any]) -> float:
  return sum(w * loss for w, loss in zip(c["objective"], m["bpb"], strict=True))


def _number(value: float | None) -> str:
  return f"{value:.4f}" if value is not None and math.isfinite(value) else "—"
