"""Differences on items: errors against their definition and simulation, Holm by hand, the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from labs import write_variant
from rich.console import Console

from nmoe.errors import ConfigError, DataError, RecordError, RunError
from nmoe.evals.measure import Items, per_document, read_items, write_items
from nmoe.evals.sources import prepare
from nmoe.evals.suites import ITEMS
from nmoe.records.reader import Hypothesis
from nmoe.records.root import Root
from stages import ablate
from stages.comparable import check_one_suite
from stages.judge.intervals import rejected, student_t, two_sided_p
from stages.judge.items import clustered_error, task_differences
from stages.report.evaluations import answers
from stages.report.findings import Arm, gather


def items(nats, size=10):
  n = len(nats)
  one = np.ones(n, dtype=np.int64)
  hit = np.zeros(n, dtype=bool)
  return Items(np.arange(n), 0 * one, one > 0, np.array(nats), one, size * one, size * one, hit)


def test_p_is_the_inverse_of_the_quantile():
  for df in (1, 2, 7, 300):
    for p in (0.6, 0.9, 0.999):
      assert two_sided_p(-student_t(p, df), df) == pytest.approx(2 * (1 - p), rel=1e-6)


def test_the_error_of_one_seed_is_that_of_the_mean():
  d = np.random.default_rng(0).normal(size=(50, 1))
  error, freedom = clustered_error(d)
  assert error == pytest.approx(d.std(ddof=1) / math.sqrt(50)) and freedom == 49


def test_the_error_covers_seeds_and_documents():
  """Means of simulated tables scatter as the error says, whichever source is the larger."""
  chance = np.random.default_rng(1)
  for of_seed, of_document in ((1.0, 0.1), (0.1, 1.0), (0.5, 0.5)):
    means, errors = [], []
    for _ in range(400):
      d = of_seed * chance.normal(size=(1, 12)) + of_document * chance.normal(size=(12, 1))
      d = d + 0.2 * chance.normal(size=(12, 12))
      means.append(d.mean())
      errors.append(clustered_error(d)[0])
    assert np.mean(np.square(errors)) == pytest.approx(np.var(means), rel=0.25)


def test_holm_by_hand():
  assert rejected([0.03, 0.001, 0.02], 0.05) == [True, True, True]
  assert rejected([0.01, 0.04, 0.03], 0.05) == [True, False, False]  # 0.03 > 0.05 / 2
  assert rejected([0.01, 0.02, 0.04], 0.05) == [True, True, True]
  assert rejected([0.02, 0.5], 0.05) == [True, False]


def test_differences_of_tasks():
  base, variant = {"a": items([10.0, 20.0, 30.0])}, {"a": items([11.0, 21.0, 31.0])}
  (found,) = task_differences([(base, variant)] * 2, "bpb")
  assert found.mean == pytest.approx(1 / 10 / math.log(2))
  assert (found.documents, found.seeds) == (3, 2) and found.error == pytest.approx(0, abs=1e-12)
  assert found.told_apart
  (none,) = task_differences([(base, base)], "acc")
  assert (none.mean, none.p, none.told_apart) == (0, 1, False)
  with pytest.raises(RecordError, match="task a: the two arms were asked other items"):
    task_differences([(base, {"a": items([1.0, 2.0, 3.0], size=9)})], "bpb")
  with pytest.raises(RecordError, match="other items"):
    task_differences([(base, {})], "bpb")


def test_an_ablation_shows_its_tasks(lab, launches, tmp_path):
  source = tmp_path / "items.jsonl"
  texts = (
    {"task": "pairs", "context": f"n {i}", "choices": [" etain", " zzqqx"], "gold": i % 2}
    for i in range(10)
  )
  source.write_text("".join(json.dumps(t) + "\n" for t in texts))
  prepare(source, lab.root)
  (tmp_path / "mine.toml").write_text('tasks = ["pairs"]\n')
  base = write_variant(lab.file, "base", f'[eval]\nsuite = "{tmp_path}/mine.toml"\n')
  variant = write_variant(base, "wide", "[optim]\ndense_lr = 1e-3\n")
  console = Console(record=True, width=160)
  report = ablate.run(base, variant, 2, console)
  said = console.export_text()
  rows = [line.split()[:2] for line in said.splitlines() if line.strip().startswith("pairs")]
  assert rows == [["pairs", "bpb"], ["pairs", "acc"]]
  assert "mine: 2 seeds; ± is a standard error clustered by document and by seed" in said
  page = report.read_text()
  assert "<h2>Evaluations</h2>" in page and 'id="evaluations-mine"' in page
  found = gather(lab.root, report.parent.name)
  (suite,) = answers(lab.root, found.arms)
  assert (suite.suite, suite.seeds) == ("mine", 2)
  read = [
    [per_document(read_items(Root(lab.root).evaluated(r.id)["mine"])["pairs"]) for r in arm.runs]
    for arm in found.arms
  ]
  for row in suite.rows:
    by_hand = np.array([[one[row.measure] for one in of_arm] for of_arm in read])  # arm, seed, item
    assert row.documents == 10
    assert [mean for mean, _ in row.arms] == pytest.approx(by_hand.mean(axis=(1, 2)))
    assert row.difference.mean == pytest.approx((by_hand[1] - by_hand[0]).mean())
    for cell in [row.task, *row.cells()]:
      assert f">{cell}</td>" in page
  logged = [run.results["eval/mine/bpb"] for run in found.arms[0].runs if run.results]
  assert suite.rows[0].arms[0][0] == pytest.approx(np.mean(logged))


OWN = """
[experiment]
name = "own"
statement = "Another rate answers better."
metric = "eval/mine/bpb"
direction = "lower"
[eval]
suite = "mine.toml"
"""


def own_suite(lab, count=10):
  """Items of a task, a suite of one's own beside the configuration, which does not measure it."""
  texts = (
    {"task": "pairs", "context": f"n {i}", "choices": [" etain", " zzqqx"], "gold": i % 2}
    for i in range(count)
  )
  source = lab.file.with_name("items.jsonl")
  source.write_text("".join(json.dumps(t) + "\n" for t in texts))
  prepare(source, lab.root)
  lab.file.with_name("mine.toml").write_text('tasks = ["pairs"]\n')


def test_a_suite_of_one_s_own_judges_an_ablation(lab, launches):
  own_suite(lab)
  base = write_variant(lab.file, "base", '[eval]\nsuite = "mine.toml"\n')
  variant = write_variant(base, "rate", OWN + "[optim]\ndense_lr = 1e-3\n")
  console = Console(record=True, width=160)
  report = ablate.run(base, variant, 2, console)
  found = gather(lab.root, report.parent.name)
  means = [[run.results["eval/mine/bpb"] for run in arm.runs] for arm in found.arms]
  assert found.claim.metric == "eval/mine/bpb" and found.headline.key == "eval/mine/bpb"
  by_hand = np.mean(np.subtract(means[1], means[0]))
  assert found.headline.difference.mean_difference == pytest.approx(by_hand)
  assert f"{by_hand:.4f}".replace("-", "−") in console.export_text(clear=False).replace("+", "")
  assert "answers of suite mine, bits per byte" in report.read_text()
  assert len(launches.ids) == 4
  ablate.run(base, variant, 2, console)
  assert len(launches.ids) == 4  # the same items: reused


def test_runs_that_answered_nothing_or_other_items_are_not_reused(lab, launches):
  """[eval] changes no fingerprint, but a hypothesis about a suite needs its answers."""
  own_suite(lab)
  base = write_variant(lab.file, "base", "")
  rate = write_variant(base, "plain", "[optim]\ndense_lr = 1e-3\n")
  ablate.run(base, rate, 2, Console(quiet=True))
  asked = write_variant(lab.file, "base", '[eval]\nsuite = "mine.toml"\n')
  variant = write_variant(asked, "rate", OWN + "[optim]\ndense_lr = 1e-3\n")
  ablate.run(asked, variant, 2, Console(quiet=True))
  assert len(launches.ids) == 8
  for limit in (asked, variant):
    limit.write_text(limit.read_text().replace("[eval]\n", "[eval]\nlimit = 4\n"))
  report = ablate.run(asked, variant, 2, Console(quiet=True))
  assert len(launches.ids) == 12
  rows = answers(lab.root, gather(lab.root, report.parent.name).arms)[0].rows
  assert {row.documents for row in rows} == {4}


UNFIT = {  # what is in the baseline's [eval]: what is said
  "": 'is not measured in arm baseline, whose .eval. suite is "none"; give all arms the same',
  'suite = "other.toml"': "is not measured in arm baseline, whose .eval. suite is .*other.toml",
  'suite = "mine.toml"\nlimit = 3': "asked all documents of pairs, baseline the first 3 doc",
  'suite = "gone.toml"': "gone.toml: the suite cannot be read",
}


@pytest.mark.faults
@pytest.mark.parametrize("body", UNFIT)
def test_arms_of_other_suites_are_refused_before_they_train(lab, launches, body):
  own_suite(lab)
  lab.file.with_name("other.toml").write_text('tasks = ["pairs"]\n')
  base = write_variant(lab.file, "base", f"[eval]\n{body}\n")
  variant = write_variant(lab.file, "rate", OWN + "[optim]\ndense_lr = 1e-3\n")
  with pytest.raises(ConfigError, match=UNFIT[body]):
    ablate.run(base, variant, 2, Console(quiet=True))
  assert launches.ids == []


@pytest.mark.faults
def test_an_accuracy_of_a_suite_that_has_none_is_refused_before_it_trains(lab, launches):
  """The metric would be missing from every result, at the end of the last run."""
  one = {"task": "tale", "context": "once", "choices": [" upon a time"], "gold": 0}
  lab.file.with_name("items.jsonl").write_text(json.dumps(one))
  prepare(lab.file.with_name("items.jsonl"), lab.root)
  lab.file.with_name("mine.toml").write_text('tasks = ["tale"]\n')
  base = write_variant(lab.file, "base", '[eval]\nsuite = "mine.toml"\n')
  own = OWN.replace("mine/bpb", "mine/acc").replace("lower", "higher")
  variant = write_variant(lab.file, "rate", own + "[optim]\ndense_lr = 1e-3\n")
  with pytest.raises(ConfigError, match="eval/mine/acc: no task of .*mine.toml.* eval/mine/bpb"):
    ablate.run(base, variant, 2, Console(quiet=True))
  assert launches.ids == []


@pytest.mark.parametrize("metric", ["val/bpb", "eval/mine/bpb", "eval/mine/acc"])
def test_a_file_of_items_that_no_manifest_names_is_refused_before_it_trains(lab, launches, metric):
  """Put there by hand, whatever is asked of it: a rank would say so after it was started."""
  own_suite(lab)
  (there,) = Root(lab.root).evals.glob("*/pairs.jsonl")
  there.with_name("stray.jsonl").write_text(there.read_text())
  lab.file.with_name("mine.toml").write_text('tasks = ["stray"]\n')
  base = write_variant(lab.file, "base", '[eval]\nsuite = "mine.toml"\n')
  own = OWN.replace("eval/mine/bpb", metric)
  own = own.replace("lower", "higher") if metric.endswith("acc") else own
  variant = write_variant(lab.file, "rate", own + "[optim]\ndense_lr = 1e-3\n")
  with pytest.raises(DataError, match="manifest.json has no task stray; delete .*stray.jsonl"):
    ablate.run(base, variant, 2, Console(quiet=True))
  assert launches.ids == []


@pytest.mark.faults
def test_items_that_change_under_a_study_end_it_without_a_verdict():
  claim = Hypothesis("It answers better.", "eval/mine/bpb", "lower", 0.0)
  runs = [SimpleNamespace(id=i, status="completed", results={ITEMS: i}) for i in "ab"]
  with pytest.raises(RunError, match="the runs were asked other items .run a a, run b b., no verd"):
    check_one_suite((claim,), runs)
  check_one_suite((claim,), runs[:1])
  check_one_suite((replace(claim, metric="val/bpb"),), runs)


def test_runs_that_were_asked_other_items_are_said_to_be(lab, tmp_path):
  """And what is missing in one arm is left out."""
  runs = [lab.record(**{"train__seed": seed}) for seed in (0, 1)]
  for run, size in zip(runs, (10, 9), strict=True):
    path = Root(lab.root).eval_items(run, 12, "mine")
    write_items(path, {"a": items([1.0, 2.0, 3.0], size=size)})
    write_items(path.with_name("step_00000003_mine.parquet"), {"a": items([9.0])})
    lab.records.update_run(run, status="completed", results={})
  alone = gather(lab.root, lab.experiment.id).arms
  (suite,) = answers(lab.root, alone)
  assert suite.seeds == 2 and suite.rows[0].difference is None  # the newest step: 3 documents
  assert suite.rows[0].documents == 3
  pair = [Arm(str(i), (alone[0].runs[i],), (alone[0].logged[i],)) for i in range(2)]
  assert answers(lab.root, pair) == ()  # of two seeds
  same = [Arm(a.name, (replace(a.runs[0], seed=0),), a.logged) for a in pair]
  with pytest.raises(RecordError, match="task a: the two arms were asked other items"):
    answers(lab.root, same)
