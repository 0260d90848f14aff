"""One arm over its seeds, and the verdict against a constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nmoe.records.reader import Hypothesis
from nmoe.wording import counted
from stages.judge.intervals import Direction, Verdict, floats, interval_of, number, verdict_on
from stages.judge.table import Judgement, Table

REFERENCE = "a unigram model on the same held-out tokens"  # nmoe.data.loader.unigram_bpb


@dataclass(frozen=True)
class Single:
  """One arm over its seeds: n finite values, mean, sample sd, Student interval [low, high].

  With a reference value the verdict is on mean − reference; without one it is "described".
  """

  n: int
  mean: float
  sd: float
  low: float
  high: float
  diverged: int
  reference: float | None = None
  verdict: Verdict = "described"
  reason: str = ""

  def as_dict(self) -> dict[str, Any]:
    return asdict(self)


def judge(hypothesis: Hypothesis, table: Table) -> Judgement:
  """Judge the change of an arm's val/bpb from the unigram model of its data, which the results
  hold; of another metric the outcome is only described.
  """
  (arm,) = table.arms
  unigram = None
  if hypothesis.metric == "val/bpb":
    unigram = next((r.values["unigram_bpb"] for r in table.of(arm) if not r.diverged), math.nan)
  one = describe(
    table.values(arm, hypothesis.metric),
    reference=unigram,
    direction=hypothesis.direction,
    min_effect=hypothesis.min_effect,
  )
  told = f"{hypothesis.metric} is compared with nothing; of val/bpb a unigram model's is known."
  one = replace(one, reason=one.reason or told)
  return Judgement(one.verdict, one.reason, one.as_dict())


def describe(
  values: Sequence[float | None],
  *,
  reference: float | None = None,
  direction: Direction = "none",
  min_effect: float = 0.0,
  confidence: float = 0.95,
) -> Single:
  """One arm over its seeds, judged against the unigram model's result if given.

  Values that are not finite, or None, count as diverged: any of them refutes the hypothesis.
  """
  found = interval_of(floats(values), confidence)
  diverged = len(values) - found.n
  one = Single(found.n, found.mean, found.sd, found.low, found.high, diverged)
  if reference is None:
    return one
  interval = (one.low - reference, one.high - reference)
  subject = f"{number(one.mean)} − {number(reference)} ({REFERENCE})"
  change = one.mean - reference
  verdict, reason = verdict_on(change, interval, one.n, direction, min_effect, subject)
  if one.diverged:
    verdict, reason = "refuted", f"{one.diverged} of {counted(len(values), 'run')} diverged."
  return replace(one, reference=reference, verdict=verdict, reason=reason)
