"""A study from its arms and seeds to its outcome: order, points, further runs, the one call."""

import io
from functools import partial

import pytest
from labs import Lab
from rich.console import Console

from nmoe.config.file import changed
from nmoe.errors import DataError, RunError
from nmoe.records.reader import Hypothesis
from nmoe.train import loop
from stages.judge.table import Judgement, Table
from stages.runs import Work
from stages.study import Study, carry_out
from stages.workbench import Arm, Workbench

CLAIM = Hypothesis("A larger rate is better.", "val/bpb", "lower", 0.0)


@pytest.fixture(autouse=True)
def quick(lab, no_page):
  """Runs of two steps, and a report that costs nothing."""
  lab.config = changed(
    lab.config,
    {
      "schedule.total_tokens": 1024,
      "schedule.warmup_tokens": 0,
      "schedule.decay_tokens": 0,
      "train.checkpoint_every": 0,
    },
  )


def arm(lab: Lab, rate: float) -> Arm:
  config = changed(lab.config, {"optim.dense_lr": rate})
  return Arm(f"lr {rate:g}", config, lab.data, {"lr": rate})


def workbench(lab: Lab) -> Workbench:
  return Workbench.open(str(lab.root), Console(file=io.StringIO(), width=200))


def best(seen: list[Table], table: Table) -> Judgement:
  seen.append(table)
  means = {a: sum(table.values(a, "val/bpb")) / len(table.seeds(a)) for a in table.arms}
  return Judgement("described", f"The best is {min(means, key=means.get)}.", {"means": means})


def test_arms_take_turns_and_the_judge_sees_points_and_results(lab, launches):
  seen = []
  arms = (arm(lab, 1e-3), arm(lab, 1e-2))
  study = Study("rates", "test", (CLAIM,), arms, (3, 4), partial(best, seen))
  outcome = carry_out(study, workbench(lab))
  done = lab.records.runs(outcome.experiment.id)
  turns = [("lr 0.001", 3), ("lr 0.01", 3), ("lr 0.001", 4), ("lr 0.01", 4)]
  assert [(r.arm, r.seed) for r in done] == turns
  (table,) = seen
  assert table is not None and outcome.table == table
  assert [(r.arm, r.seed, r.point["lr"]) for r in table.results] == [
    (name, seed, float(name.split()[1])) for name, seed in turns
  ]
  by_run = {(r.arm, r.seed): r.results["val/bpb"] for r in done}
  assert table.values("lr 0.01", "val/bpb") == (by_run["lr 0.01", 3], by_run["lr 0.01", 4])
  record = lab.records.find(outcome.experiment.id)
  assert record.verdict == "described" and record.status == "completed"
  assert record.conclusion == {
    "reason": outcome.judgement.reason,
    "means": outcome.judgement.numbers["means"],
    "runs": 4,
  }


def test_further_runs_until_there_are_none(lab, launches):
  """A sweep extends its grid and repeats a point at another seed; nothing runs twice."""
  first, asked, seen = arm(lab, 1e-3), [], []

  def further(table: Table):
    asked.append(len(table.results))
    return {1: [(arm(lab, 1e-2), 0)], 2: [(first, 1)]}.get(len(table.results), [])

  study = Study("grow", "test", (CLAIM,), (first,), (0,), partial(best, seen), further)
  outcome = carry_out(study, workbench(lab))
  assert asked == [1, 2, 3] and len(launches.ids) == 3
  assert [(r.arm, r.seed) for r in outcome.table.results] == [
    ("lr 0.001", 0),
    ("lr 0.01", 0),
    ("lr 0.001", 1),
  ]
  again = carry_out(study, workbench(lab))
  assert len(launches.ids) == 3
  assert again.experiment.id == outcome.experiment.id
  assert again.table == outcome.table


def test_a_list_of_runs_is_executed_by_one_call(lab, launches, monkeypatch):
  """Which a pool of slots can take over: it gets every pair of a round at once."""
  calls, run_all = [], Work.run_all

  def one_call(self, pairs):
    calls.append([(arm.name, seed) for arm, seed in pairs])
    return run_all(self, pairs)

  monkeypatch.setattr(Work, "run_all", one_call)
  carry_out(
    Study("one", "test", (CLAIM,), (arm(lab, 1e-3),), (0, 1), partial(best, [])), workbench(lab)
  )
  assert calls == [[("lr 0.001", 0), ("lr 0.001", 1)]]


def test_a_failed_run_gets_no_judge(lab, launches, monkeypatch):
  def fail(*_, **__):
    raise DataError("shard 7 is gone; restore it")

  monkeypatch.setattr(loop, "open_data", fail)
  seen = []
  study = Study("gone", "test", (CLAIM,), (arm(lab, 1e-3),), (0,), partial(best, seen))
  with pytest.raises(RunError, match="1 of 1 run failed, no verdict"):
    carry_out(study, workbench(lab))
  assert seen == [] and lab.records.list()[0].status == "failed"


@pytest.mark.faults
@pytest.mark.parametrize(
  "error, status", [(KeyboardInterrupt, "interrupted"), (KeyError, "failed"), (RunError, "failed")]
)
def test_whatever_ends_a_study_its_record_says_so(lab, launches, error, status):
  """Not "running" for ever; a conclusion, once written, stays."""

  def broken(table: Table) -> Judgement:
    raise error("x")

  study = Study("broken", "test", (CLAIM,), (arm(lab, 1e-3),), (0,), broken)
  with pytest.raises(error):
    carry_out(study, workbench(lab))
  assert lab.records.list()[0].status == status
