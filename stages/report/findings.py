"""What the records hold about an experiment, as data: arms, results with their differences, texts.

Everything is read from the databases; of a running experiment there is what it has so far. HTML and
terminal show the same findings; nothing of either is in here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from nmoe.records import metrics
from nmoe.records.measures import MEASURES, Measure, measured, of_metric
from nmoe.records.metrics import Series
from nmoe.records.reader import Experiment, Export, Hypothesis, Link, Reader, Run
from nmoe.wording import counted
from stages.judge.paired import Paired, compare
from stages.judge.single import Single, describe
from stages.report.curves import time_to_loss

RESULTS = {  # the measures, and what a report adds to them
  "val/bpb": MEASURES["val/bpb"],
  "unigram_bpb": Measure("bits per byte of a unigram model", ".4f", "lower"),
  "val/loss": MEASURES["val/loss"],
  "to_baseline": Measure("tokens to the baseline's final loss", ",.0f", "lower"),
} | MEASURES


def measure_of(key: str) -> Measure:
  """What a row of results or a metric is."""
  return RESULTS.get(key) or of_metric(key)


LEGS = {
  "fprop_x": "x, forward",
  "fprop_w": "w, forward",
  "dgrad_dy": "dy, for dx",
  "dgrad_w": "w, for dx",
  "wgrad_x": "x, for dw",
  "wgrad_dy": "dy, for dw",
}
PRODUCTS = ("q", "q_a", "q_b", "kv_a", "kv_b", "o", "dense", "shared", "experts")


@dataclass(frozen=True)
class Arm:
  """The runs of one arm, one per seed in seed order, and what each of them logged."""

  name: str
  runs: tuple[Run, ...]
  logged: tuple[dict[str, Series], ...]

  def values(self, key: str) -> list[float]:
    """A result of every run; NaN where a run has none."""
    return [run.results.get(key, math.nan) for run in self.runs]

  def series(self, tag: str, completed: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, values) of the runs that completed, or of those that did not."""
    return [
      (logged[tag][1], logged[tag][2])
      for run, logged in zip(self.runs, self.logged, strict=True)
      if tag in logged and (run.status == "completed") == completed
    ]

  def per_step(self, tag: str) -> float:
    """A tag that accumulates between log rows, per step, over the runs that completed; else 0."""
    total = steps = 0.0
    for run, logged in zip(self.runs, self.logged, strict=True):
      if run.status == "completed" and tag in logged:
        total += float(logged[tag][2].sum())
        steps += max(int(series[0][-1]) for series in logged.values())
        steps -= run.branch.step if run.branch else 0
    return total / steps if steps else 0.0

  def flight(self, kind: str) -> dict[tuple[int, str, str], float]:
    """The last value of `flight/{layer}/{product}/{leg}/{kind}`, its mean over the runs that have
    it: (layer, product with its matrix, leg) -> value, in the model's order.
    """
    found: dict[tuple[int, str, str], list[float]] = {}
    for logged in self.logged:
      for tag, series in logged.items():
        parts = tag.split("/")
        if parts[0] == "flight" and parts[4:] == [kind]:
          *matrix, leg = parts[3].split(".")
          place = (int(parts[1]), " ".join([parts[2], *matrix]), leg)
          found.setdefault(place, []).append(float(series[2][-1]))
    order = sorted(found, key=lambda p: (p[0], PRODUCTS.index(p[1].split()[0]), p[1]))
    return {place: sum(found[place]) / len(found[place]) for place in order}

  def layers(self) -> list[int]:
    """The MoE layers that logged their load."""
    found = {int(tag.split("/")[1]) for logged in self.logged for tag in logged if _is_load(tag)}
    return sorted(found)


def _is_load(tag: str) -> bool:
  return tag.startswith("moe/") and tag.endswith("/load_max_over_mean")


@dataclass(frozen=True)
class Cell:
  """A number as text, and what qualifies it: its interval, the runs that it lacks."""

  number: str
  aside: str = ""

  def __str__(self) -> str:
    return f"{self.number} {self.aside}".strip()


@dataclass(frozen=True)
class Row:
  """One result of every arm, and the variant's paired difference where there are two arms."""

  key: str
  label: str
  arms: tuple[Single, ...]
  difference: Paired | None

  def show(self, value: float, sign: str = "") -> str:
    """A result in its unit; a loss that is not reached is "never"."""
    if self.key == "to_baseline" and value == math.inf:
      return "never"
    return measure_of(self.key).show(value, sign)

  def cells(self) -> list[Cell]:
    """Every arm's mean with its interval."""
    return [self._plus_minus(one) for one in self.arms]

  def difference_cell(self) -> Cell:
    d = self.difference
    if d is None or not d.n:
      return Cell("—")
    known = d.sd and math.isfinite(d.high)
    bounds = f"[{self.show(d.low, '+')}, {self.show(d.high, '+')}]" if known else ""
    return Cell(self.show(d.mean_difference, "+"), bounds)

  def _plus_minus(self, one: Single) -> Cell:
    half = one.high - one.mean
    spread = f"± {self.show(half)}" if half and math.isfinite(half) else ""
    lost = f"({one.n} of {one.n + one.diverged} runs)" if one.diverged and one.n else ""
    return Cell(self.show(one.mean), f"{spread} {lost}".strip())


@dataclass(frozen=True)
class Findings:
  """What the databases hold about an experiment."""

  experiment: Experiment
  arms: tuple[Arm, ...]
  links: tuple[Link, ...]
  rows: tuple[Row, ...]
  seeds: tuple[int, ...]  # that both arms of a pair have
  moves: tuple[str, ...] = ()  # runs that were continued elsewhere, or with other versions
  exports: tuple[Export, ...] = ()

  @property
  def runs(self) -> list[Run]:
    return [run for arm in self.arms for run in arm.runs]

  @property
  def claim(self) -> Hypothesis:
    return self.experiment.headline

  @property
  def headline(self) -> Row | None:
    """The row of the first hypothesis' metric."""
    return next((row for row in self.rows if row.key == self.claim.metric), None)

  @property
  def older(self) -> int:
    """How many of the runs had finished before the hypotheses were written."""
    e = self.experiment
    return sum(r.finished and r.origin != e.id and r.updated <= e.created for r in self.runs)

  @property
  def timing(self) -> list[str]:
    """What a reader must know where results came before hypotheses, or verdicts before runs."""
    said = []
    if self.older:
      runs = f"{self.older} of {counted(len(self.runs), 'run')}"
      said.append(f"The hypothesis was written after {runs} had finished.")
    for earlier in self.experiment.conclusion.get("earlier", ()):
      said.append(
        f"Runs were added after a verdict: over {counted(earlier['runs'], 'run')} it was "
        f"{earlier['verdict']}."
      )
    return said

  @property
  def compares(self) -> bool:
    """Whether there are two arms, and differences between them."""
    return any(row.difference for row in self.rows)

  @property
  def verdict(self) -> str:
    return self.experiment.verdict or self.experiment.status

  @property
  def reason(self) -> str:
    return self.experiment.conclusion.get("reason", "There is no conclusion yet.")


def gather(root: Path, name: str) -> Findings:
  """Read an experiment, its newest run of every arm and seed, and what they logged."""
  with closing(Reader(root)) as records:
    experiment = records.find(name)
    newest: dict[str, dict[int, Run]] = {}
    for run in records.runs(experiment.id):
      newest.setdefault(run.arm, {})[run.seed] = run
    arms = []
    for arm, by_seed in newest.items():
      runs = tuple(by_seed[seed] for seed in sorted(by_seed))
      arms.append(Arm(arm, runs, tuple(metrics.read(root, run.id) for run in runs)))
    links = tuple(records.links(experiment.id))
    moves = tuple(move for arm in arms for run in arm.runs for move in _moves(records, run))
    exports = tuple(x for arm in arms for run in arm.runs for x in records.exports(run.id))
  seeds = tuple(sorted(set.intersection(*map(set, newest.values())))) if newest else ()
  asked = (h.metric for h in experiment.hypotheses if measured(h.metric))
  keys = dict.fromkeys([*RESULTS, *asked])
  rows = tuple(row for key in keys if (row := _row(key, arms, seeds)))
  return Findings(experiment, tuple(arms), links, rows, seeds, moves, exports)


def _moves(records: Reader, run: Run) -> list[str]:
  found = pairwise(records.starts(run.id))
  told = ((now.step, now.changes(before)) for before, now in found)
  return [f"{run.id} at step {step} with {changes}" for step, changes in told if changes]


def _row(key: str, arms: Sequence[Arm], seeds: Sequence[int]) -> Row | None:
  """A result over seeds, or None where no run has it."""
  values = [_to_baseline(arm, arms) if key == "to_baseline" else arm.values(key) for arm in arms]
  if not any(math.isfinite(v) for arm in values for v in arm):
    return None
  difference = None
  if len(arms) == 2 and seeds:
    a, b = (
      [dict(zip((r.seed for r in arm.runs), of, strict=True))[seed] for seed in seeds]
      for arm, of in zip(arms, values, strict=True)
    )
    difference = compare(a, b, direction="none", min_effect=0.0)
  return Row(key, measure_of(key).label, tuple(map(describe, values)), difference)


def _to_baseline(arm: Arm, arms: Sequence[Arm]) -> list[float]:
  """Tokens at which each run's held-out loss reaches the mean final one of the first arm."""
  target = describe(arms[0].values("val/loss")).mean
  if len(arms) < 2 or not math.isfinite(target):
    return [math.nan] * len(arm.runs)
  curves = [logged.get("val/loss") for logged in arm.logged]
  return [time_to_loss(c[1], c[2], target) if c and len(c[0]) > 1 else math.nan for c in curves]
