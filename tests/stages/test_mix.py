"""A swarm from its file to a verdict: what runs, what is proposed, what is refused."""

import io

import numpy as np
import pytest
from rich.console import Console

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
  """Every run has its weights and each source's loss; a second call answers from the records."""
  page = mix.run(write(), console())
  assert "log-linear" in page.read_text()
  record = lab.records.find("swarm")
  runs = lab.records.runs(record.id)
  assert record.verdict and len({(r.arm, r.seed) for r in runs}) == len(runs) >= 11
  assert all({"val/bpb/a", "val/bpb/b"} <= r.results.keys() for r in runs)
  lean = {r.arm: r.results for r in runs if r.seed == 0}
  assert lean["mixture 3"]["val/bpb/a"] < lean["mixture 4"]["val/bpb/a"]  # 70 % of a against 30 %
  assert sum("weights = [0.5, 0.5]" in r.toml for r in runs) >= 2
  count = len(launches.ids)
  mix.run(write(), console())
  assert len(launches.ids) == count


def simulated(write, lab, loss):
  """A swarm whose losses are made up, to its verdict."""
  path = write("mixtures = 8", "mixtures = 24")
  keys = mix.typed(mix.parsed(path.read_text(), "")["mix"], mix.MixKeys, "", "mix")
  base = mix.configs.load(path.parent / "base.toml")
  budget = mix.BudgetKeys(runs=60)
  with mix.Workbench.open(base.run.root, console()) as bench:
    found = mix.prepared(path, keys, budget, base, bench.arm("base", base).data)
  pairs, results = [(arm, 0) for arm in found.first()], []
  while pairs:
    for arm, seed in pairs:
      values = dict(zip(("val/bpb/a", "val/bpb/b"), loss(arm.point["a"], seed), strict=True))
      results.append(Result(arm.name, seed, values, False, arm.point))
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


def test_noise_has_no_proposal(write, lab):
  rng = np.random.default_rng(1)
  judged = simulated(write, lab, lambda a, seed: 2 + 0.01 * rng.normal(size=2))
  assert judged.verdict == "inconclusive" and "No mixture is proposed" in judged.reason


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("[0.5, 0.5]", "[1.0]", r"mix.objective = \[1.0\] must have a weight"),
    ("target_tokens = 1000", "target_tokens = 1000000000", "lower target_tokens or add text"),
    ("runs = 30", "runs = 3", "budget.runs = 3, but 16 are needed"),
  ],
)
def test_what_is_refused(write, launches, old, new, message):
  with pytest.raises(ConfigError, match=message):
    mix.run(write(old, new), console())
  assert not launches.ids
