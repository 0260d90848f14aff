"""The verdict on one arm over its seeds."""

from __future__ import annotations

import math

from nmoe.records.reader import Hypothesis
from stages.judge.statistics import single
from stages.judge.table import Judgement, Table


def judge(hypothesis: Hypothesis, table: Table) -> Judgement:
  """Judge the change of an arm's val/bpb from the unigram model of its data, which the results
  hold; of another metric the outcome is only described.
  """
  (arm,) = table.arms
  unigram = None
  if hypothesis.metric == "val/bpb":
    unigram = next((r.values["unigram_bpb"] for r in table.of(arm) if not r.diverged), math.nan)
  one = single(
    table.values(arm, hypothesis.metric),
    reference=unigram,
    direction=hypothesis.direction,
    min_effect=hypothesis.min_effect,
  )
  return Judgement(one.verdict, one.reason, one.as_dict())
