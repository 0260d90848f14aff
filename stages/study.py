"""A study: hypotheses, the arms and seeds that answer them, and the judge of what comes out.

A Config is one run; a Study is the question above it. A stage builds one and calls `carry_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmoe.records.reader import Experiment, Hypothesis, Run
from nmoe.records.root import Root
from stages.admission import admit_with_data
from stages.comparable import check_held_out, check_one_machine, check_one_suite, check_suites
from stages.judge.table import Judgement, Result, Table
from stages.runs import Work, carrying
from stages.workbench import Arm, Workbench


@dataclass(frozen=True)
class Study:
  """`hypotheses` are on record before the first step; the first of them is the headline.

  Every arm runs at every seed; arms take turns seed by seed, so that a drift of the machine falls
  on all. `further` is asked for more runs, with the results so far, until it has none: a sweep
  extends its grid by it, or repeats its best points at other seeds. divergence: whether a run that
  diverged is an error at the end; in a sweep it is a point like others.
  """

  name: str
  stage: str
  hypotheses: tuple[Hypothesis, ...]
  arms: tuple[Arm, ...]
  seeds: Sequence[int]
  judge: Callable[[Table], Judgement]
  further: Callable[[Table], Sequence[tuple[Arm, int]]] | None = None
  divergence: bool = True


@dataclass(frozen=True)
class Outcome:
  """A study that was carried out: its record, its results, the verdict, the page of its report."""

  experiment: Experiment
  table: Table
  judgement: Judgement
  report: Path


def carry_out(study: Study, workbench: Workbench) -> Outcome:
  """Record the study, run what is not yet run, judge, report.

  A study that asks the same of the same runs goes on where it was. ConfigError, before anything
  runs, if a hypothesis compares arms on different held-out sets or suites, and what nmoe's checks
  of a run raise if one can be seen to fail. RunError if a run fails (then there is no verdict) or
  diverged (then there is one).
  """
  check(study.hypotheses, study.arms, workbench)
  asked = (study.stage, study.name, study.hypotheses, study.arms, study.seeds)
  with carrying(workbench, *asked, grows=study.further is not None) as work:
    table, runs = _results(study, work)
    judgement = study.judge(table)
    blamed = runs if study.divergence else []
    report = work.conclude(judgement, blamed, summary=True)
  return Outcome(work.experiment, table, judgement, report)


def check(hypotheses: Sequence[Hypothesis], arms: Sequence[Arm], bench: Workbench) -> None:
  """Refuse arms whose runs can be seen to fail, or must not be compared."""
  for arm in arms:
    admit_with_data(arm.config, Root(bench.root), arm.data)
  check_held_out(hypotheses, arms)
  check_suites(hypotheses, arms, Root(bench.root).evals)


def _results(study: Study, work: Work) -> tuple[Table, list[Run]]:
  """Round after round of runs, until there are no further ones."""
  pairs = [(arm, seed) for seed in study.seeds for arm in study.arms]
  results: list[Result] = []
  runs: list[Run] = []
  while pairs:
    arms = {arm.name: arm for arm in (*study.arms, *(arm for arm, _ in pairs))}
    check(study.hypotheses, tuple(arms.values()), work.bench)
    work.plan(tuple(arms.values()))
    runs += work.run_all(pairs)
    work.check(runs)
    check_one_machine(study.hypotheses, runs, work.bench.experiments)
    check_one_suite(study.hypotheses, runs)
    new = runs[len(results) :]
    results += [_result(arm, run) for (arm, _), run in zip(pairs, new, strict=True)]
    pairs = study.further(Table(tuple(results))) if study.further else ()
  return Table(tuple(results)), runs


def _result(arm: Arm, run: Run) -> Result:
  return Result(arm.name, run.seed, run.results, run.status == "failed", arm.point)
