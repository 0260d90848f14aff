"""A swarm from its file to a verdict: what runs, what is proposed, what is refused."""

import io

import numpy as np
import pytest
from rich.console import Console

from nmoe.data.prepared import open_data
from nmoe.errors import ConfigError
from stages.judge.table import Result, Table
from stages.proxy import mix

BASE = """
extends = "tiny.toml"
[schedule]
total_tokens = 1024
warmup_tokens = 0
decay_tokens = 0
[data]
mixture = "two.toml"
[train]
checkpoint_every = 0
keep_checkpoints = 0
"""
TWO = """
[mixture]
holdout = 0.3
[[source]]
name = "a"
kind = "files"
paths = ["text.jsonl"]
format = "jsonl"
[[source]]
name = "b"
kind = "files"
paths = ["other.jsonl"]
format = "jsonl"
"""
MIX = """
[mix]
name = "swarm"
statement = "It wins."
base = "base.toml"
objective = [0.5, 0.5]
target_tokens = 1000
mixtures = 8
anchor_seeds = 2
verify_seeds = 3
[budget]
runs = 30
"""


@pytest.fixture
def write(lab):
  folder = lab.file.parent
  (folder / "base.toml").write_text(BASE)
  (folder / "two.toml").write_text(TWO)
  text = (folder / "text.jsonl").read_text()
  (folder / "other.jsonl").write_text(text.upper().replace('"TEXT"', '"text"'))

  def file(old="", new=""):
    (folder / "mix.toml").write_text(MIX.replace(old, new) if old else MIX)
    return folder / "mix.toml"

  return file


def console():
  return Console(file=io.StringIO(), width=200)


def test_from_the_file_to_a_verdict(write, lab, launches):
  """Every run has its weights and each source's loss; a second call answers from the records.
  Another objective is another question: its swarm is found, and the first verdict stands.
  """
  path = write("target_tokens = 1000", "target_tokens = 4096")
  page = mix.run(path, console())
  assert "log-linear" in page.read_text() and "share of a" in page.read_text()
  record = lab.records.find("swarm")
  runs = lab.records.runs(record.id)
  assert record.verdict and len({(r.arm, r.seed) for r in runs}) == len(runs) >= 11
  assert all({"val/bpb/a", "val/bpb/b"} <= r.results.keys() for r in runs)
  lean = {r.arm: r.results for r in runs if r.seed == 0}
  assert lean["mixture 3"]["val/bpb/a"] < lean["mixture 4"]["val/bpb/a"]  # 70 % of a against 30 %
  assert sum("weights = [0.5, 0.5]" in r.toml for r in runs) >= 2
  assert all("fraction = 0.25" in r.toml for r in runs)  # as often as 4096 tokens of all of it
  count = len(launches.ids)
  mix.run(path, console())
  assert len(launches.ids) == count
  path.write_text(path.read_text().replace("[0.5, 0.5]", "[1.0, 0.0]"))
  mix.run(path, console())
  assert lab.records.find("swarm").id == "swarm-2"
  assert lab.records.find("swarm-1").conclusion == record.conclusion
  assert len(lab.records.runs("swarm-2")) - (len(launches.ids) - count) >= 8 + 3  # the swarm


def simulated(write, lab, loss, large=None, objective="[0.5, 0.5]", target=1000):
  """A swarm whose losses are made up, to its verdict; `large`: those of the larger size."""
  path = write("mixtures = 8", "mixtures = 24")
  text = path.read_text().replace("[0.5, 0.5]", objective)
  path.write_text(text.replace("target_tokens = 1000", f"target_tokens = {target}"))
  keys = mix.typed(mix.parsed(path.read_text(), "")["mix"], mix.MixKeys, "", "mix")
  base = mix.configs.load(path.parent / "base.toml")
  budget = mix.BudgetKeys(runs=60)
  with mix.Workbench.open(base.run.root, console()) as bench:
    found = mix.prepared(path, keys, budget, base, bench.arm("base", base).data)
  pairs, results = [(arm, 0) for arm in found.first()], []
  while pairs:
    for arm, seed in pairs:
      law = large if large and arm.point["size"] else loss
      values = dict(zip(("val/bpb/a", "val/bpb/b"), law(arm.point["a"], seed), strict=True))
      diverged = np.isnan(list(values.values())).any()
      results.append(Result(arm.name, seed, values, bool(diverged), arm.point))
    pairs = found.further(Table(tuple(results)))
  return found.judge(Table(tuple(results)))


def test_an_interior_optimum_is_proposed_and_wins(write, lab):
  """exp laws of both sources whose sum is lowest at 70 % of a; natural and uniform are 50 %."""
  rng = np.random.default_rng(0)

  def loss(a, seed):
    b, noise = 1 - a, 0.002 * rng.normal(size=2)
    return np.array([1 + np.exp(1 - 3 * a), 1 + np.exp(-0.2 - 3 * b)]) + 0.01 * seed + noise

  judged = simulated(write, lab, loss)
  share = judged.numbers["proposal"]["shares"][0]
  assert share == pytest.approx(0.7, abs=0.05)  # e^(1-3a) = e^(-3.2+3a)
  assert judged.verdict == "confirmed", judged.reason
  against = judged.numbers["against"]
  assert set(against) == {"natural", "uniform", "natural width2", "uniform width2"}
  assert all(one["n"] == 3 for one in against.values())


def laws(rng, seed_noise=0.002):
  """Each source's loss falls with its own share."""

  def loss(a, seed):
    noise = seed_noise * rng.normal(size=2)
    return np.array([1 + np.exp(1 - 3 * a), 1 + np.exp(-0.2 - 3 * (1 - a))]) + noise

  return loss


def test_one_source_alone_is_taken_to_its_cap(write, lab):
  """4 epochs of a's text are 80 % of the target's tokens."""
  tokens = open_data(lab_data(write, lab)).train_tokens["a"]
  judged = simulated(
    write, lab, laws(np.random.default_rng(0)), objective="[1.0, 0.0]", target=5 * tokens
  )
  assert judged.numbers["proposal"]["shares"][0] == pytest.approx(0.8, abs=0.01)
  assert judged.numbers["epochs"]["a"] == pytest.approx(4, abs=0.05)


def lab_data(write, lab):
  base = mix.configs.load(write().parent / "base.toml")
  with mix.Workbench.open(base.run.root, console()) as bench:
    return bench.arm("base", base).data


def test_what_wins_small_and_loses_large_is_refuted(write, lab):
  rng = np.random.default_rng(0)

  def large(a, seed):  # the mixture in the middle is best
    return np.array([2.0, 2.0]) + (a - 0.5) ** 2 + 1e-4 * rng.normal(size=2)

  judged = simulated(write, lab, laws(rng), large=large)
  assert judged.numbers["against"]["natural"]["verdict"] == "confirmed"
  assert judged.numbers["against"]["natural width2"]["verdict"] == "refuted"
  assert judged.verdict == "refuted"


def test_a_proposal_outside_the_swarm_says_so():
  swarm = np.array([[0.85, 0.15], [0.2, 0.8], [1.0, 0.0]])
  said = mix.extrapolated(("code", "prose"), np.array([0.1, 0.9]), swarm)
  assert said == (
    "It extrapolates: code 0.10, in the swarm 0.20 to 1.00; prose 0.90, in the swarm 0.00 to 0.80."
  )
  assert mix.extrapolated(("code", "prose"), np.array([0.195, 0.805]), swarm) == ""


def test_shuffled_labels_have_no_proposal(write, lab):
  """The losses of another mixture than the one that was run."""
  rng = np.random.default_rng(3)
  right = laws(rng)
  judged = simulated(write, lab, lambda a, seed: right(rng.uniform(), seed))
  assert judged.numbers["proposal"]["shares"] is None and judged.verdict == "inconclusive"


def test_noise_has_no_proposal(write, lab):
  rng = np.random.default_rng(1)
  judged = simulated(write, lab, lambda a, seed: 2 + 0.01 * rng.normal(size=2))
  assert judged.verdict == "inconclusive" and "No mixture is proposed" in judged.reason


def test_runs_that_all_diverge_are_an_outcome(write, lab):
  judged = simulated(write, lab, lambda a, seed: np.array([np.nan, np.nan]))
  assert judged.verdict == "inconclusive"
  assert "24 of 24 runs diverged: too few are left for a fit" in judged.reason
  assert len(judged.numbers["mixtures"]) == 27  # the swarm, and the anchors at another seed


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("[0.5, 0.5]", "[1.0]", r"mix.objective = \[1.0\] must have a weight"),
    ("[0.5, 0.5]", "[0, 0]", r"mix.objective = \[0.0, 0.0\] must have a weight.* not 0 for all"),
    ("target_tokens = 1000", "target_tokens = 1000000000", "lower target_tokens or add text"),
    (
      "target_tokens = 1000",
      "target_tokens = 1000000\nepochs = 100.0",
      "trains 1,024 tokens of the 1,000,000 of mix.target_tokens.* less than a sample of 65",
    ),
    ("runs = 30", "runs = 3", "budget.runs = 3, but 25 are needed"),
    ("mixtures = 8", "mixtures = 3", "mix.mixtures = 3 is less than 4, which a fit over 2 sources"),
    (
      "mixtures = 8",
      f"mixtures = {1 << 62}",
      "budget.runs = 30, but 4611686018427387921 are needed",
    ),
  ],
)
def test_what_is_refused(write, launches, old, new, message):
  with pytest.raises(ConfigError, match=message):
    mix.run(write(old, new), console())
  assert not launches.ids
