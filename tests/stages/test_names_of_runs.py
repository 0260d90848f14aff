"""A name where a run's id belongs, as people type it: what is said leads to a run."""

import pytest
from roots import start_run
from typer.testing import CliRunner

from nmoe.errors import RecordError
from nmoe.records.reader import Hypothesis
from stages.cli import app

pytestmark = pytest.mark.faults
ALL = "; `nmoe experiments list` and `nmoe experiments show NAME` list all"
OF_A_RUN = [
  ("eval", "RUN"),
  ("export", "RUN", "out"),
  ("watch", "RUN"),
  ("rerun", "RUN"),
  ("research", "run", "FILE", "--from", "RUN"),
  ("prod", "status", "RUN"),
  ("prod", "amend", "RUN", "FILE"),
  ("prod", "stop", "RUN"),
]


@pytest.mark.parametrize("words", OF_A_RUN, ids=" ".join)
def test_a_name_that_is_no_run_leads_to_its_runs(lab, words):
  """The name or id of an experiment, an arm or its file; what is none of them to the newest."""

  def asked(name: str) -> str:
    here = {"RUN": name, "FILE": str(lab.file), "out": str(lab.root.parent / "out")}
    root = ["--root", str(lab.root)] * (words[0] != "research")
    done = CliRunner().invoke(app, [*(here.get(word, word) for word in words), *root])
    assert type(done.exception) is RecordError, done.output
    return str(done.exception).removeprefix(f"{records.path}: ")

  records, claim = lab.records, [Hypothesis("It learns.", "val/bpb", "lower", 0.0)]
  none = "no run 'tiny'; there is none yet: `nmoe research run CONFIG` makes one"
  assert asked("tiny") == none
  old = [f"{lab.record(train__seed=seed)} (tiny-1: arm seed {seed})" for seed in range(5)]
  experiment = records.create("tiny", "test", claim).id
  again = [
    f"{start_run(records, experiment, arm, 0).id} (tiny-2: {arm} seed 0)" for arm in ("a", "b")
  ]
  experiment = records.create("Other text", "test", claim).id
  last = f"{start_run(records, experiment, 'base', 3).id} (other-text-1: base seed 3)"
  for name, found in {
    "tiny": (*again[::-1], *old[:1:-1]),
    "tiny-1": old[::-1],
    "tiny-2": again[::-1],
    "Other text": (last,),
    "other-text-1": (last,),
    "base": (last,),
    "configs/base.toml": (last,),
  }.items():
    first = f"no run {name!r}; the newest of that experiment or arm are: "
    assert asked(name) == first + ", ".join(found) + ALL
  assert asked("nothing") == (
    "no run 'nothing'; the newest are: " + ", ".join((last, *again[::-1], *old[:2:-1])) + ALL
  )


@pytest.mark.parametrize("words", [("experiments", "show"), ("report",)], ids=" ".join)
def test_a_run_s_id_leads_to_its_experiment(lab, words):
  run = lab.record()
  done = CliRunner().invoke(app, [*words, run, "--root", str(lab.root)])
  said = f"{lab.records.path}: {run!r} is a run; its experiment is tiny-1"
  assert type(done.exception) is RecordError and str(done.exception) == said
