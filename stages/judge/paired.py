"""The verdict on two arms over shared seeds."""

from __future__ import annotations

from nmoe.records.reader import Hypothesis
from stages.judge.statistics import paired
from stages.judge.table import Judgement, Table


def judge(hypothesis: Hypothesis, table: Table) -> Judgement:
  """Compare the second arm of a table with its first, seed by seed."""
  baseline, variant = table.arms
  metric = hypothesis.metric
  one = paired(
    table.values(baseline, metric),
    table.values(variant, metric),
    direction=hypothesis.direction,
    min_effect=hypothesis.min_effect,
  )
  return Judgement(one.verdict, one.reason, one.as_dict())
