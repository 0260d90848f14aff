"""`nmoe check resume`: real kills of real processes, and that a difference is seen."""

import io

import pytest
import torch
from labs import STEPS
from rich.console import Console

from nmoe import checkpoint
from nmoe.errors import RunError
from nmoe.experiments import Experiments
from nmoe.metrics import Metrics
from stages import check, parity


def test_killed_twice_and_bit_identical(lab):
  out = io.StringIO()
  rows = {row.what: row for row in check.resume(lab.file, 12, Console(file=out, width=120))}
  assert rows.keys() == {"weights", "moments", "router biases", "optimizer steps", "logged values"}
  assert all(row.compared == row.equal > 0 and row.first == "" for row in rows.values())
  assert rows["moments"].compared == 2 * rows["weights"].compared
  assert "SIGKILL at step 6" in out.getvalue() and "SIGKILL at step 9" in out.getvalue()
  found = Experiments(lab.root).list()[0]
  assert (found.stage, found.verdict) == ("check", "confirmed")
  runs = Experiments(lab.root).runs(found.id)
  assert [run.arm for run in runs] == ["uninterrupted", "killed"]


@pytest.fixture
def two_runs(lab):
  runs = [lab.record(), lab.record()]
  assert [lab.attempt(run) for run in runs] == [0, 0]
  return [lab.run(run) for run in runs]


def differing(lab, two_runs) -> dict[str, tuple[int, str]]:
  rows = check.compare(lab.root, *two_runs, STEPS)
  return {r.what: (r.compared - r.equal, r.first) for r in rows if r.equal < r.compared}


def test_one_bit_is_seen(lab, two_runs):
  assert differing(lab, two_runs) == {}
  state = lab.state(two_runs[1].id)
  state["embed.weight.exp_avg"].view(torch.int32)[0, 0] ^= 1
  state["layers.1.moe.router.bias"].neg_()
  del state["layers.1.moe.experts.3.w2"]
  folder, meta = lab.checkpoints(two_runs[1].id), {"config": two_runs[1].toml}
  checkpoint.save(folder, STEPS, state, 0, meta)
  log = Metrics(lab.root, two_runs[1].id)
  log.add(13, 13 * 512, {"train/loss": 1.0})
  log.flush()
  assert differing(lab, two_runs) == {
    "weights": (1, "layers.1.moe.experts.3.w2"),
    "moments": (1, "embed.weight.exp_avg"),
    "router biases": (1, "layers.1.moe.router.bias"),
    "logged values": (1, "train/loss"),
  }


def test_a_difference_is_an_error(lab, monkeypatch):
  """The table is printed, the record says refuted, the message where to look."""
  out = io.StringIO()
  runs = [lab.run(lab.record()) for _ in range(2)]
  monkeypatch.setattr(check.Workbench, "repeat", lambda *_: runs[0])
  monkeypatch.setattr(check.Workbench, "check", lambda *_: None)
  monkeypatch.setattr(check, "_killed", lambda *_: runs[1])
  row = check.Row("moments", 4, 3, "a.exp_avg")
  monkeypatch.setattr(check, "compare", lambda *_: [row])
  with pytest.raises(RunError, match="a resumed run is not the uninterrupted one"):
    check.resume(lab.file, 12, Console(file=out, width=120))
  assert "a.exp_avg" in out.getvalue()
  assert Experiments(lab.root).list()[0].verdict == "refuted"


def test_a_run_that_is_too_fast_is_not_a_proof(lab, monkeypatch):
  """If the kill comes too late there is nothing to compare."""
  bench = check.Workbench.open(str(lab.root), Console(file=io.StringIO()))
  arm = bench.arm("killed", lab.config)
  experiment = bench.experiment("check", lab.config, [arm])

  def completes(root, run_id, *_, **__):
    bench.experiments.update_run(run_id, status="completed")

  monkeypatch.setattr(check.launch, "run", completes)
  with (
    check.progress_display(bench.console) as progress,
    pytest.raises(RunError, match="was to be killed at step 6 but is completed; raise --steps"),
  ):
    check._killed(bench, experiment, arm, (6, 9), progress)


def interrupt(_):
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  "command",
  [
    lambda file, console: check.resume(file, 12, console),
    lambda file, console: parity.ep(file, [1, 2], 4, console),
  ],
  ids=["resume", "ep"],
)
def test_an_interrupted_check_says_that_it_starts_anew(lab, launches, command):
  launches.before = {0: interrupt, 1: interrupt}
  for _ in range(2):
    with pytest.raises(RunError, match="the same command starts all runs anew: it was told to"):
      command(lab.file, Console(file=io.StringIO()))
  first, second = (lab.records.runs(e.id) for e in lab.records.list()[:2])
  assert len(set(launches.ids)) == len({run.id for run in (*first, *second)}) == 2


def test_the_shortened_schedule_has_all_its_phases(lab):
  config = check.shortened(lab.config, "tiny", 12)
  s = config.schedule
  assert (s.total_tokens, s.warmup_tokens, s.decay_tokens) == (6144, 1536, 1536)
  assert config.train.checkpoint_every == 2
