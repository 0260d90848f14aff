"""A paired ablation from its two files to its verdict, and every way in which it can stop.

One file: every way begins with the same two files.
"""

import io
import math
import sys

import pytest
from labs import Lab, write_files, write_variant
from rich.console import Console

from nmoe.data.loader import Prefetcher
from nmoe.errors import ConfigError, DataError, RunError
from nmoe.machine import driver
from nmoe.model.decoder import Model
from nmoe.records.experiments import Experiments
from nmoe.records.reader import Hypothesis
from nmoe.train import loop as train
from stages import ablate, runs, show
from stages.launch import local as launch

MUON = """
[experiment]
name = "tiny-muon"
statement = "Muon is better."
direction = "lower"
min_effect = 0.05
[optim]
matrices = "muon"
"""


REPORT = runs.write_report


@pytest.fixture(autouse=True)
def quick(lab, no_page):
  """Runs of four steps, and a report that costs nothing where it is not looked at."""
  text = lab.file.read_text().replace("total_tokens = 6144", "total_tokens = 2048")
  text = text.replace("warmup_tokens = 1024", "warmup_tokens = 512")
  text = text.replace("checkpoint_every = 3", "checkpoint_every = 0")
  lab.file.write_text(text.replace("decay_tokens = 2048", "decay_tokens = 512"))


@pytest.fixture
def variant(lab):
  return write_variant(lab.file, "muon", MUON)


def call(lab: Lab, variant, seeds: int | None = None) -> str:
  """The ablation's output, also where it ends in an error."""
  out = io.StringIO()
  try:
    ablate.run(lab.file, variant, seeds, Console(file=out, width=200))
  finally:
    lab.said = out.getvalue()
  return lab.said


def newest(lab: Lab):
  return lab.records.list()[0]


def members(lab: Lab) -> list[tuple[str, int, str]]:
  return [(r.arm, r.seed, r.status) for r in lab.records.runs(newest(lab).id)]


def test_from_two_files_to_a_verdict(lab, variant, launches, monkeypatch):
  """The hypothesis is on record before the first step; a second call executes nothing."""
  seen = []

  def look(_):
    e = newest(lab)
    seen.append((e.hypotheses, [arm.name for arm in e.arms], e.verdict, e.status))

  launches.before = {0: look}
  monkeypatch.setattr(runs, "write_report", REPORT)
  said = call(lab, variant)
  claim = Hypothesis("Muon is better.", "val/bpb", "lower", 0.05)
  assert seen == [((claim,), ["baseline", "variant"], "", "running")]
  assert "optim.matrices: 'adamw' → 'muon'" in said
  assert "keys differ" not in said
  turns = [("baseline", 0), ("variant", 0), ("baseline", 1), ("variant", 1)]
  assert members(lab) == [(arm, seed, "completed") for arm, seed in turns]

  found = newest(lab)
  done = lab.records.runs(found.id)
  bpb = {(r.arm, r.seed): r.results["val/bpb"] for r in done}
  differences = [bpb["variant", s] - bpb["baseline", s] for s in (0, 1)]
  assert found.conclusion["differences"] == differences
  half = 12.706 * abs(differences[0] - differences[1]) / 2  # t(0.975, 1) · sd / √2
  mean = sum(differences) / 2
  assert found.conclusion["low"] == pytest.approx(mean - half, rel=1e-3)
  assert found.verdict == found.conclusion["verdict"] and found.verdict in said.replace("\n", " ")
  page = lab.root / "reports" / found.id / "index.html"
  assert f"report: {page}" in said and page.is_file()
  assert done[0].fingerprint != done[1].fingerprint

  executed = list(launches.ids)
  again = call(lab, variant)
  assert launches.ids == executed
  assert [r.id for r in done] == [r.id for r in lab.records.runs(found.id)]
  for run in done:
    assert f"{run.arm} seed {run.seed}: completed before as run {run.id}, reused" in again
  assert len(lab.records.list()) == 2  # the lab's own and this one


def test_arms_read_the_same_batches(lab, variant, launches):
  """And begin with the same weights: the first loss before any step is the same."""
  call(lab, variant, seeds=1)
  base, other = (lab.logged(run.id) for run in lab.records.runs(newest(lab).id))
  assert base["train/loss"][0] == other["train/loss"][0]
  assert base["grad_norm/all"][0] == other["grad_norm/all"][0]
  assert base["train/loss"][-1] != other["train/loss"][-1]


def test_more_seeds_add_runs(lab, variant, launches):
  """To the same experiment, whose first seed stays."""
  call(lab, variant, seeds=1)
  first = newest(lab)
  assert first.verdict == "inconclusive" and first.conclusion["n"] == 1
  call(lab, variant, seeds=2)
  assert len(launches.ids) == 4
  assert newest(lab).id == first.id and newest(lab).conclusion["n"] == 2


def test_runs_are_shared_between_experiments(lab, variant, launches):
  """Another hypothesis about the same two arms is another experiment of the same runs."""
  call(lab, variant, seeds=1)
  other = write_variant(
    lab.file, "again", MUON.replace("better", "worse").replace("lower", "higher")
  )
  call(lab, other, seeds=1)
  assert len(launches.ids) == 2
  assert newest(lab).headline.statement == "Muon is worse."
  assert members(lab) == [("baseline", 0, "completed"), ("variant", 0, "completed")]


@pytest.mark.faults
def test_a_later_hypothesis_is_said_to_be_later(lab, variant, launches, monkeypatch):
  """It is another experiment, linked to the first; terminal, page head and list say what it is."""
  monkeypatch.setattr(runs, "write_report", REPORT)
  call(lab, variant, seeds=2)
  first = newest(lab)
  assert "written after" not in lab.said
  text = MUON.replace("Muon is better.", "Muon hardly matters.").replace("0.05", "0.5")
  said = call(lab, write_variant(lab.file, "later", text), seeds=2)
  told = "The hypothesis was written after 4 of 4 runs had finished."
  page = lab.root / "reports" / newest(lab).id / "index.html"
  assert told in " ".join(said.split()) and told in page.read_text(encoding="utf-8")
  assert first.id != newest(lab).id and lab.records.find(first.id).hypotheses == first.hypotheses
  (link,) = lab.records.links(first.id)
  assert (link.from_id, link.to_id, link.relation) == (newest(lab).id, first.id, "refines")
  out = io.StringIO()
  show.experiments(lab.root, Console(file=out, width=200))
  assert "4/4 (4 older)" in out.getvalue()


@pytest.mark.faults
def test_seeds_added_after_a_verdict_are_said(lab, variant, launches, monkeypatch):
  """Adding runs until the interval fits is no experiment of that many seeds."""
  monkeypatch.setattr(runs, "write_report", REPORT)
  for seeds in (1, 2, 2, 3):
    said = call(lab, variant, seeds=seeds)
  assert newest(lab).conclusion["earlier"] == [
    {"verdict": "inconclusive", "runs": 2},
    {"verdict": newest(lab).conclusion["earlier"][1]["verdict"], "runs": 4},
  ]
  page = lab.root / "reports" / newest(lab).id / "index.html"
  told = "Runs were added after a verdict: over 2 runs it was inconclusive."
  assert told in " ".join(said.split()) and told in page.read_text(encoding="utf-8")


def test_no_difference_is_an_error(lab, launches):
  """Nor is a seed, a name or how often it logs."""
  body = "[train]\nlog_every = 5\nseed = 3\n[experiment]\nname = 'other'\n"
  with pytest.raises(ConfigError, match="the variant computes the same as the baseline"):
    call(lab, write_variant(lab.file, "same", body))
  assert launches.ids == []
  assert len(lab.records.list()) == 1


def test_more_than_one_difference_is_said(lab, launches):
  body = MUON + "dense_lr = 5e-3\n[train]\nlog_every = 4\n"
  said = call(lab, write_variant(lab.file, "both", body), seeds=1)
  assert "2 keys differ: the outcome cannot be attributed to one of them" in said
  assert "train.log_every: 1 → 4" in said


TWICE = """
[[source]]
name = "again"
kind = "files"
paths = ["text.jsonl"]
format = "jsonl"
max_documents = 150
"""


def test_another_mixture_is_a_difference(lab, launches):
  """Its path is a free key, its content is not; weights leave the held-out set as it is."""
  text = lab.file.with_name("mixture.toml").read_text()
  one, other = (lab.file.with_name(f"{name}.toml") for name in ("one", "other"))
  one.write_text(text + "weight = 1.0" + TWICE + "weight = 1.0\n")
  other.write_text(text + "weight = 3.0" + TWICE + "weight = 1.0\n")
  lab.file.write_text(lab.file.read_text().replace("mixture.toml", "one.toml"))
  call(lab, write_variant(lab.file, "data", '[data]\nmixture = "other.toml"\n'), seeds=1)
  assert members(lab) == [("baseline", 0, "completed"), ("variant", 0, "completed")]
  copy = lab.file.with_name("copy.toml")
  copy.write_text(one.read_text())
  with pytest.raises(ConfigError, match="computes the same"):
    call(lab, write_variant(lab.file, "same", '[data]\nmixture = "copy.toml"\n'))


EASY = """
[[source]]
name = "easy"
kind = "files"
paths = ["easy.jsonl"]
format = "jsonl"
"""


@pytest.mark.faults
@pytest.mark.parametrize(
  "key, value",
  [("mixture", '"easier.toml"'), ("mixture", '"half.toml"'), ("seq_len", 32), ("val_tokens", 512)],
)
@pytest.mark.parametrize("metric", ["val/bpb", "val/loss"])
def test_arms_with_different_held_out_sets_get_no_verdict(lab, launches, key, value, metric):
  """Before anything runs; both sets and the key are named."""
  text = lab.file.with_name("mixture.toml").read_text()
  lab.file.with_name("half.toml").write_text(text + "max_documents = 100\n")
  lab.file.with_name("easier.toml").write_text(text + EASY)
  lines = "".join(f'{{"text": "{"a" * (i + 30)}"}}\n' for i in range(200))
  lab.file.with_name("easy.jsonl").write_text(lines)
  body = f'[data]\n{key} = {value}\n[experiment]\nmetric = "{metric}"\n'
  with pytest.raises(ConfigError, match="baseline and variant have different held-out") as caught:
    call(lab, write_variant(lab.file, "other", body), seeds=1)
  assert f"data.{key} (" in str(caught.value) and metric in str(caught.value)
  assert launches.ids == [] and len(lab.records.list()) == 1


@pytest.mark.faults
def test_another_length_is_no_fault_of_a_metric_that_is_not_of_the_held_out_set(lab, launches):
  body = '[data]\nseq_len = 32\n[experiment]\nmetric = "memory/peak_bytes"\n'
  call(lab, write_variant(lab.file, "shorter", body), seeds=1)
  assert members(lab) == [("baseline", 0, "completed"), ("variant", 0, "completed")]


SPEED = MUON.replace("min_effect = 0.05", 'metric = "train/tokens_per_s"')


@pytest.mark.faults
def test_speeds_of_two_devices_get_no_verdict(lab, launches, monkeypatch):
  """A baseline that ran on another device of this host stands in the root; both are named."""
  both = {driver.cpu_name(), "NVIDIA H100 80GB"}
  monkeypatch.setattr(driver, "devices", lambda arch: both)
  variant = write_variant(lab.file, "speed", SPEED)
  call(lab, variant, seeds=1)
  run = lab.records.runs(newest(lab).id)[0]
  lab.records.update_run(run.id, results={**run.results, "device": "NVIDIA H100 80GB"})
  again = write_variant(lab.file, "again", SPEED.replace("better", "faster"))
  with pytest.raises(RunError, match="train/tokens_per_s depends on the machine") as caught:
    call(lab, again, seeds=1)
  assert "NVIDIA H100 80GB" in str(caught.value) and run.results["device"] in str(caught.value)
  assert newest(lab).verdict == "" and newest(lab).status == "failed"


@pytest.mark.faults
def test_speeds_of_two_versions_get_no_verdict(lab, launches, monkeypatch):
  """A pip install between two runs."""
  versions = iter([{"torch": "2.1.0"}, {"torch": "2.13.0"}])
  monkeypatch.setattr(runs, "environment", lambda: next(versions))
  with pytest.raises(RunError, match="train/tokens_per_s depends on the machine") as caught:
    call(lab, write_variant(lab.file, "speed", SPEED), seeds=1)
  assert "torch 2.1.0" in str(caught.value) and "torch 2.13.0" in str(caught.value)


def test_an_interrupted_ablation_continues(lab, variant, launches, monkeypatch):
  """Ctrl-C during the second run: the first is reused, the second goes on, the rest is run."""

  def stop(_):
    raise KeyboardInterrupt

  launches.before = {1: stop}
  with pytest.raises(
    RunError, match=r"variant seed 0\) stopped before its end, the same command continues"
  ):
    call(lab, variant)
  assert newest(lab).status == "interrupted"
  assert members(lab) == [("baseline", 0, "completed"), ("variant", 0, "interrupted")]
  said = call(lab, variant)
  assert f"variant seed 0: interrupted before as run {launches.ids[1]}, continued" in said
  assert launches.ids[1] == launches.ids[2] and len(launches.ids) == 5
  assert newest(lab).status == "completed"
  assert len(members(lab)) == 4


def test_a_continued_run_takes_free_keys_from_the_configuration(lab, variant, launches):
  def stop(_):
    raise KeyboardInterrupt

  launches.before = {0: stop}
  with pytest.raises(RunError):
    call(lab, variant, seeds=1)
  lab.file.write_text(lab.file.read_text().replace("log_every = 1", "log_every = 2"))
  call(lab, variant, seeds=1)
  run = lab.records.runs(newest(lab).id)[0]
  assert run.id == launches.ids[0]
  assert "log_every = 2" in run.toml
  assert [step for step, _ in lab.logged(run.id)["train/loss"]] == [2, 4]


LAST_WORDS = "import os; print('the last words', flush=True); os.kill(os.getpid(), 9)"


def test_a_child_that_dies_without_a_word(lab, variant, monkeypatch):
  """Killed from outside: the error has its exit status and the end of its log."""
  monkeypatch.setattr(launch, "child_command", lambda *_: [sys.executable, "-c", LAST_WORDS])
  with pytest.raises(RunError, match="rank 0 of 1 was killed by SIGKILL") as caught:
    call(lab, variant)
  assert "the same command continues it" in str(caught.value)
  assert "the last words" in str(caught.value)
  assert newest(lab).status == "interrupted"


@pytest.fixture
def another(lab, variant, launches, monkeypatch):
  """Another process; the baseline's run is left, and reused once this process completed it."""
  launches.before = {0: lambda _: (_ for _ in ()).throw(KeyboardInterrupt)}
  with pytest.raises(RunError):
    call(lab, variant)
  monkeypatch.setattr(runs, "ELSEWHERE_S", 0.05)
  other = Experiments(lab.root)
  yield other
  other.close()


def check_waited(lab, variant, launches) -> None:
  """The ablation waits for the other process, says so once, and takes its result."""
  said = call(lab, variant, seeds=1)
  assert said.count("baseline seed 0: another process is at it; waiting for its end") == 1
  assert f"baseline seed 0: completed before as run {launches.ids[0]}, reused" in said
  assert members(lab) == [("baseline", 0, "completed"), ("variant", 0, "completed")]


def completes(other: Experiments, run_id: str) -> None:
  other.update_run(run_id, status="completed", results={"val/bpb": 2.0, "val/loss": 1.4})


@pytest.mark.faults
def test_a_run_that_another_process_takes_up_first(lab, variant, launches, another):
  """Both found it interrupted; the other's ranks are the first: its end is waited for."""
  launches.before = {1: another.claim, 2: lambda _: completes(another, launches.ids[0])}
  check_waited(lab, variant, launches)


@pytest.mark.faults
def test_a_run_of_another_process(lab, variant, launches, another):
  """Two ablations share a baseline: the second takes its variant first, then the other's run."""
  another.claim(launches.ids[0])
  launches.before = {1: lambda _: completes(another, launches.ids[0])}
  check_waited(lab, variant, launches)
  assert len(launches.ids) == 2


def spoiled_by_muon(monkeypatch):
  """From its third step on a model under Muon has losses that are not finite."""
  forward, build = Model.forward, train.build
  states = []

  def keep(*args):
    states[:] = [build(*args)]
    return states[0]

  def spoiled(self, x, y):
    out = forward(self, x, y)
    bad = self.config.optim.matrices == "muon" and states[0].step >= 2
    return out._replace(loss_sum=out.loss_sum * math.nan) if bad else out

  monkeypatch.setattr(train, "build", keep)
  monkeypatch.setattr(Model, "forward", spoiled)


def test_a_variant_that_diverges_is_refuted(lab, variant, launches, monkeypatch):
  """An outcome, with a verdict and a report; the command fails all the same, also when reused."""
  spoiled_by_muon(monkeypatch)
  with pytest.raises(RunError, match="2 of 4 runs diverged") as caught:
    call(lab, variant)
  assert "variant seed 0): step 3: the loss or a gradient is not finite" in str(caught.value)
  assert str(lab.root / "logs") in str(caught.value)
  found = newest(lab)
  assert (found.status, found.verdict) == ("completed", "refuted")
  assert "diverged at 2 of 2 seeds" in found.conclusion["reason"]
  assert "report: " in lab.said
  assert [s for *_, s in members(lab)] == ["completed", "failed", "completed", "failed"]
  with pytest.raises(RunError, match="2 of 4 runs diverged"):
    call(lab, variant)
  assert len(launches.ids) == 4
  assert f"variant seed 1: diverged before as run {launches.ids[3]}, reused" in lab.said


def test_other_failures_withhold_the_verdict(lab, variant, launches, monkeypatch):
  """The other runs are finished; the failed one goes on when its cause is gone."""

  class Failing(Prefetcher):
    calls = 0

    def __next__(self):
      Failing.calls += 1
      if Failing.calls == 4 + 3:  # the variant's third step
        raise DataError("shard 7 is gone; restore it")
      return super().__next__()

  monkeypatch.setattr(train, "Prefetcher", Failing)
  with pytest.raises(
    RunError, match="1 of 4 runs failed.*the same command fails alike as long as the cause stands"
  ) as caught:
    call(lab, variant)
  run = launches.ids[1]
  assert f"{run} (variant seed 0): shard 7 is gone; restore it; log: " in str(caught.value)
  assert str(lab.root / "logs" / run) in str(caught.value)
  assert (newest(lab).status, newest(lab).verdict) == ("failed", "")
  assert "report: " not in lab.said
  said = call(lab, variant)
  assert f"variant seed 0: failed before as run {run}, continued" in said
  assert launches.ids[4:] == [run]
  assert newest(lab).status == "completed"
  assert [step for step, _ in lab.logged(run)["train/loss"]] == [1, 2, 3, 4]


def test_a_changed_code_runs_again(lab, variant, launches, monkeypatch):
  call(lab, variant, seeds=1)
  monkeypatch.setattr("stages.workbench.provenance", lambda repo: ("", "", "other"))
  call(lab, variant, seeds=1)
  assert len(launches.ids) == 4
  assert len({r.code_version for r in lab.records.runs(newest(lab).id)}) == 1


@pytest.mark.faults
def test_a_run_that_other_code_left_unfinished_is_named(lab, variant, launches, monkeypatch):
  """The same command does not continue it: it says so, with both versions."""
  launches.before = {0: lambda _: (_ for _ in ()).throw(KeyboardInterrupt)}
  with pytest.raises(RunError):
    call(lab, variant, seeds=1)
  monkeypatch.setattr("stages.workbench.provenance", lambda repo: ("", "", "other"))
  said = call(lab, variant, seeds=1)
  left = f"baseline seed 0: run {launches.ids[0]} was interrupted under code code, this is other"
  assert left in said and launches.ids[0] not in launches.ids[1:]


def test_bad_files(lab, tmp_path_factory, launches):
  with pytest.raises(ConfigError, match="none.toml: the configuration cannot be read"):
    call(lab, lab.file.with_name("none.toml"))
  folder = tmp_path_factory.mktemp("empty")
  base = write_files(folder)
  (folder / "text.jsonl").unlink()
  variant = write_variant(base, "muon", MUON)
  with pytest.raises(DataError, match="text.jsonl"):
    ablate.run(base, variant, 1, Console(file=io.StringIO()))
  assert launches.ids == []
