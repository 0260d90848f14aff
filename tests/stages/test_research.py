"""Stage 1: one configuration over its seeds against the unigram model; a run once more."""

import io
import math

import numpy as np
import pytest
from labs import Lab
from rich.console import Console

from nmoe.data.loader import Validation
from nmoe.data.prepared import open_data
from nmoe.data.shards import read_manifest
from nmoe.errors import ConfigError, DataError, RecordError, RunError
from nmoe.model.decoder import Model
from nmoe.records.root import Root
from nmoe.train import loop as train
from stages import research, runs, workbench

pytestmark = pytest.mark.usefixtures("no_page")


def call(lab: Lab, seeds: int | None = None) -> str:
  out = io.StringIO()
  research.run(lab.file, seeds, Console(file=out, width=200))
  return out.getvalue()


def again(lab: Lab, run_id: str) -> str:
  out = io.StringIO()
  research.rerun(run_id, lab.root, Console(file=out, width=200))
  return out.getvalue()


def newest(lab: Lab):
  return lab.records.list()[0]


def test_a_model_is_judged_against_the_unigram(lab, launches):
  """The baseline is the frequency of bytes alone, computed here from the shards."""
  text = lab.file.read_text().replace("checkpoint_every = 3", "checkpoint_every = 0")
  lab.file.write_text(text.replace("total_tokens = 6144", "total_tokens = 20480"))
  call(lab, seeds=3)
  found, data = newest(lab), open_data(lab.data)
  done = lab.records.runs(found.id)
  assert [(r.arm, r.seed, r.status) for r in done] == [("tiny", s, "completed") for s in range(3)]
  validation = Validation(data, seq_len=64, tokens=2048)
  targets = np.concatenate([y.flatten() for _, y, _ in validation.batches(1)])
  assert len(targets) == 2048 < data.sources[0].heldout.length
  seen, held = data.sources[0].train_counts() + 1.0, np.bincount(targets, minlength=257)[:256]
  p = seen[:256] / seen.sum()
  assert done[0].results["unigram_bpb"] == pytest.approx(-(held * np.log2(p)).sum() / held.sum())
  bpb = [r.results["val/bpb"] for r in done]
  assert found.conclusion["reference"] == done[0].results["unigram_bpb"]
  assert found.conclusion["mean"] == pytest.approx(sum(bpb) / 3)
  assert max(bpb) < found.conclusion["reference"] - 0.1
  assert "(a unigram model on the same held-out tokens) = −" in found.conclusion["reason"]
  assert found.verdict == "confirmed"
  call(lab, seeds=3)
  assert len(launches.ids) == 3


def test_seeds_count_up_from_the_configured_one(lab, launches):
  lab.file.write_text(lab.file.read_text().replace("[train]", "[train]\nseed = 5"))
  call(lab, seeds=3)
  assert [r.seed for r in lab.records.runs(newest(lab).id)] == [5, 6, 7]
  assert [r.results["val/bpb"] for r in lab.records.runs(newest(lab).id)].count(0) == 0


def test_another_metric_is_described(lab, launches):
  lab.file.write_text(lab.file.read_text().replace('"lower"', '"lower"\nmetric = "val/loss"'))
  said = " ".join(call(lab, seeds=1).split())
  assert (newest(lab).verdict, newest(lab).conclusion["reference"]) == ("described", None)
  assert "described: val/loss is compared with nothing; of val/bpb a unigram model's" in said


@pytest.mark.parametrize("bad_seeds", [{0}, {0, 1}])
def test_a_run_that_diverges_refutes(lab, launches, monkeypatch, bad_seeds):
  """Whichever it is: the baseline comes from one that completed, if any did."""
  forward = Model.forward

  def spoiled(self, x, y):
    out = forward(self, x, y)
    bad = self.config.train.seed in bad_seeds
    return out._replace(loss_sum=out.loss_sum * math.nan) if bad else out

  monkeypatch.setattr(Model, "forward", spoiled)
  with pytest.raises(RunError, match=f"{len(bad_seeds)} of 2 runs diverged"):
    call(lab)
  assert (newest(lab).verdict, newest(lab).status) == ("refuted", "completed")
  assert newest(lab).conclusion["diverged"] == len(bad_seeds)


def test_rerun_repeats_bit_for_bit(lab, launches):
  call(lab, seeds=1)
  first = lab.records.runs(newest(lab).id)[0]
  assert "12 logged losses, bit-identical" in " ".join(again(lab, first.id).split())
  found = newest(lab)
  assert (found.name, found.verdict) == ("rerun-tiny", "confirmed")
  second = lab.records.runs(found.id)[0]
  assert second.id != first.id
  assert (second.toml, second.seed, second.arm) == (first.toml, first.seed, first.arm)
  assert lab.logged(second.id) == lab.logged(first.id)
  link = lab.records.links(found.id)[0]
  assert (link.from_id, link.relation, link.to_id) == (found.id, "repeats", first.experiment_id)


def test_rerun_sees_a_difference(lab, launches, monkeypatch):
  """A machine that computes something else."""
  call(lab, seeds=1)
  run = launches.ids[0]
  monkeypatch.setattr(train, "lr_factor", lambda *_: 0.123)
  assert "12 logged losses, not identical" in " ".join(again(lab, run).split())
  assert newest(lab).verdict == "refuted"


def test_a_rerun_that_fails_says_that_it_starts_anew(lab, launches, monkeypatch):
  call(lab, seeds=1)

  def fail(*_, **__):
    raise DataError("shard 7 is gone; restore it")

  monkeypatch.setattr(train, "open_data", fail)
  for launched in (2, 3):
    with pytest.raises(
      RunError, match="1 of 1 run failed, no verdict; the same command fails alike as long as"
    ):
      again(lab, launches.ids[0])
    assert len(set(launches.ids)) == launched


def test_rerun_needs_the_code_and_a_completed_run(lab, launches, monkeypatch):
  call(lab, seeds=1)
  run = launches.ids[0]
  monkeypatch.setattr(workbench, "provenance", lambda repo: ("fedcba", "", "other"))
  with pytest.raises(RunError, match="made by code code .commit 0123456789., this is other"):
    again(lab, run)
  with pytest.raises(RunError, match="is interrupted; only a completed run can be repeated"):
    again(lab, lab.record())
  with pytest.raises(RecordError, match="no run 'nothing'"):
    again(lab, "nothing")


def test_data_that_changed_on_the_disk(lab, launches):
  """A corrupt shard fails the run before its first step; the message names the file."""
  source = lab.root / "data" / "sources" / read_manifest(lab.data)["sources"][0]["source"]
  shard = max(source.glob("train-*.npy"), key=lambda file: file.stat().st_size)
  data = bytearray(shard.read_bytes())
  data[-1] ^= 1
  shard.write_bytes(data)
  with pytest.raises(RunError, match="1 of 1 run failed, no verdict") as caught:
    call(lab, seeds=1)
  assert shard.name in str(caught.value)
  assert newest(lab).status == "failed"


def test_data_that_cannot_be_prepared(lab, launches):
  for text, error in (("", DataError), ("[[source]", ConfigError)):
    (lab.file.with_name("mixture.toml")).write_text(text)
    with pytest.raises((error, ConfigError)):
      call(lab, seeds=1)
  assert launches.ids == []


@pytest.mark.faults
def test_a_rerun_under_other_versions_refutes_nothing(lab, launches, monkeypatch):
  """What is another is named: the claim was of the same code, not of another torch."""
  call(lab, 1)
  run = lab.records.runs(newest(lab).id)[0]
  now, factor = runs.environment(), train.lr_factor
  monkeypatch.setattr(runs, "environment", lambda: now | {"torch": "9.9"})
  monkeypatch.setattr(train, "lr_factor", lambda *of: 0.5 * factor(*of))
  said = again(lab, run.id)
  assert newest(lab).verdict == "inconclusive"
  assert f"not identical, under other versions or on another host: torch {now['torch']}" in said


@pytest.mark.faults
def test_a_rerun_of_a_run_whose_metrics_are_gone(lab, launches):
  call(lab, 1)
  run = lab.records.runs(newest(lab).id)[0]
  Root(lab.root).metrics(run.id, 0).unlink()
  count = len(launches.ids)
  with pytest.raises(RunError, match=f"run {run.id} has no logged train/loss .*rank_0.duckdb"):
    again(lab, run.id)
  assert len(launches.ids) == count
