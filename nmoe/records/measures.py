"""The measures of a run: what its results hold, how a number is written, which way is better.

A configuration's `experiment.metric`, a run's results and a report read them here. A new kind of
result is one more entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Measure:
  """One result of a run.

  label             what it is, and in which unit it is shown
  format, factor    shown is f"{value * factor:{format}}"
  better            the direction in which a model or machine improves
  device_dependent  whether another machine or library version gives another value: then only runs
                    of one device and one set of versions are compared
  heldout           whether it is measured on the held-out set: then only on one set
  """

  label: str
  format: str
  better: Literal["lower", "higher"]
  device_dependent: bool = False
  factor: float = 1.0
  heldout: bool = False

  def show(self, value: float, sign: str = "") -> str:
    """The value in its unit; exact zeros are "0", what is not finite is "—"."""
    if not math.isfinite(value):
      return "—"
    return f"{value * self.factor:{sign}{self.format}}".replace("-", "−") if value else "0"


SUITE = {  # what every suite measures, beside what it does of its tasks
  "bpb": Measure("answers of suite {}, bits per byte", ".4f", "lower"),
  "acc": Measure("accuracy, mean over the tasks of suite {} that have one", ".4f", "higher"),
}


def of_suite(suite: str, name: str) -> Measure:
  """`eval/SUITE/NAME`, NAME one of SUITE."""
  return replace(SUITE[name], label=SUITE[name].label.format(suite))


MEASURES = {  # in the order in which a report lists them
  "val/bpb": Measure("held-out bits per byte", ".4f", "lower", heldout=True),
  "val/loss": Measure("held-out loss, nats per token", ".4f", "lower", heldout=True),
  **{
    f"eval/{suite}/{name}": of_suite(suite, name)
    for suite in ("quick", "olmes", "core", "bigbench", "short")
    for name in SUITE
  },
  "eval/core/core": Measure("CORE", ".4f", "higher"),
  "train/loss": Measure("training loss, nats per token", ".4f", "lower"),
  "train/tokens_per_s": Measure("tokens per second", ",.0f", "higher", True),
  "train/mfu": Measure("model FLOPs utilisation, %", ".1f", "higher", True, 100.0),
  "memory/peak_bytes": Measure("peak memory, GiB", ".2f", "lower", True, 2.0**-30),
  "wall_s": Measure("wall time, s", ",.1f", "lower", True),
  "load/max_over_mean": Measure("fullest expert over mean, worst layer", ".2f", "lower"),
  "load/dead": Measure("dead experts, all layers", ".3g", "lower"),
}


def measured(tag: str) -> Measure | None:
  """What a metric is: of MEASURES, or one of SUITE as `eval/NAME/…`, of a suite in NAME.toml; None:
  neither.
  """
  first, _, rest = tag.partition("/")
  suite, _, name = rest.rpartition("/")
  own = first == "eval" and name in SUITE and suite and "/" not in suite
  return MEASURES.get(tag) or (of_suite(suite, name) if own else None)


def of_metric(tag: str) -> Measure:
  """The same of a metric that a configuration was checked to have."""
  found = measured(tag)
  assert found is not None, tag
  return found
