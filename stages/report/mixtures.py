"""What a swarm of mixtures concluded, as rows: models and their skill, mixtures and losses."""

from __future__ import annotations

import math

from nmoe.records.reader import Experiment

MODEL_HEAD = ("left one out", "RMSE", "skill", "rank correlation")


def is_swarm(experiment: Experiment) -> bool:
  """Whether its conclusion is that of `nmoe proxy mix`."""
  return "proposal" in experiment.conclusion


def model_rows(experiment: Experiment) -> list[list[str]]:
  models = experiment.conclusion["proposal"]["models"].items()
  keys = ("rmse", "skill", "rank")
  return [[name, *(_number(of[key]) for key in keys)] for name, of in models]


def head(experiment: Experiment) -> list[str]:
  sources = experiment.conclusion["sources"]
  return ["seed", *(f"share of {s}" for s in sources), *(f"{s}, bits per byte" for s in sources)]


def rows(experiment: Experiment) -> list[list[str]]:
  """A row a run: shares, and what each source's held-out text costs."""
  c = experiment.conclusion
  return [
    [str(m["seed"]), *(f"{m[s]:.3f}" for s in c["sources"]), *map(_number, m["bpb"])]
    for m in c["mixtures"]
  ]


def _number(value: float) -> str:
  return f"{value:.4f}" if math.isfinite(value) else "—"
