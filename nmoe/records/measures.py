"""The measures of a run: what its results hold, how a number is written, which way is better.

A configuration's `experiment.metric`, a run's results and a report read them here. A new kind of
result is one more entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


MEASURES = {  # in the order in which a report lists them
  "val/bpb": Measure("held-out bits per byte", ".4f", "lower", heldout=True),
  "val/loss": Measure("held-out loss, nats per token", ".4f", "lower", heldout=True),
  **{
    f"eval/{suite}/{name}": Measure(label.format(suite), format, better)
    for suite in ("quick", "olmes", "core", "bigbench", "short")
    for name, label, format, better in (
      ("bpb", "answers of suite {}, bits per byte", ".4f", "lower"),
      ("acc", "accuracy on suite {}", ".4f", "higher"),
    )
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
