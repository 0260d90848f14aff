"""`nmoe check resume`: real kills of real processes, and that a difference is seen."""

import io
import shutil
from types import SimpleNamespace

import pytest
import torch
from labs import STEPS, Ended, write_variant
from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.errors import ConfigError, RunError
from nmoe.records import checkpoint
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics, read
from stages.launch.display import Display
from stages.prod.evidence import _same_model
from stages.proofs import check_ep as parity
from stages.proofs import check_resume as check
from stages.proofs import shortened


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


def test_killed_twice_and_resumed_on_other_ranks(lab):
  body = '[model]\nnum_layers = 3\n[moe]\nnum_experts = 8\n[optim]\nmatrices = "muon"\n'
  file, out = write_variant(lab.file, "ranks", body), io.StringIO()
  found = check.resume(file, 12, Console(file=out, width=160), [1, 2])
  rows = {row.what: row for row in found if isinstance(row, check.Row)}
  claims = [claim for claim in found if isinstance(claim, parity.Claim)]
  assert all(row.compared == row.equal > 0 for row in rows.values())
  whole, killed = lab.records.runs(lab.records.list()[0].id)
  assert [configs.loads(run.toml).launch.ranks for run in (whole, killed)] == [1, 2]
  (first, second) = (
    checkpoint.steps(lab.checkpoints(killed.id) / f"loaded_{at:08d}")[0] for at in (6, 9)
  )
  held = {"weights", "moments", "router biases", "optimizer steps"}
  expected = {f"step {first} in both runs: {what}" for what in held | {"logged values"}}
  for where in (
    f"step {first}, saved by 1, loaded by 2",
    f"step {second}, saved by 2, loaded by 2",
  ):
    expected |= {f"{where}: {what}" for what in held | {"data position"}}
  assert rows.keys() == expected
  assert {claim.ranks for claim in claims} == {"2"} and all(claim.holds for claim in claims)
  assert f"train/loss, step {first + 1}" in [claim.what for claim in claims]
  logged = read(lab.root, killed.id)
  assert logged["train/loss"][0].tolist() == list(range(1, 13))
  assert logged["rdep/rounds"][0].tolist() == list(range(first + 1, 13))  # one rank logs none
  assert logged["rdep/rows"][2].min() > 0
  assert lab.records.list()[0].verdict == "confirmed"
  assert "loaded by 2: moments" in out.getvalue() and "against launch.ranks = 1" in out.getvalue()


def test_a_bit_that_changes_at_the_restart_is_seen(lab, tmp_path, monkeypatch):
  """The ranks save what they hold, not what lies on the disk."""
  run_id = lab.record()
  assert lab.attempt(run_id) == 0
  shutil.rmtree(lab.checkpoints(run_id) / "step_00000012")
  fill = checkpoint.fill

  def restart(name: str, spoil) -> dict[str, tuple[int, str]]:
    def spoilt(folder, step, state, first_expert, group):
      fill(folder, step, state, first_expert, group)
      spoil(state)

    monkeypatch.setattr(checkpoint, "fill", spoilt)
    lab.records.update_run(run_id, status="interrupted")
    shutil.rmtree(lab.checkpoints(run_id) / "step_00000012", ignore_errors=True)
    lab.attempt(run_id, first=tmp_path / name)
    saved = lab.checkpoints(run_id) / "step_00000009"
    rows = check.handed_over(check.Restart(1, 1, saved, tmp_path / name))
    assert {row.what: row.compared for row in rows}["data position"] == 1
    return {row.what: (row.compared - row.equal, row.first) for row in rows if not row.holds}

  def spoil(state):
    state["embed.weight.exp_avg"].view(torch.int32)[0, 0] ^= 1
    state["layers.1.moe.router.bias"].neg_()

  assert restart("whole", lambda state: None) == {}
  assert restart("spoilt", spoil) == {
    "moments": (1, "embed.weight.exp_avg"),
    "router biases": (1, "layers.1.moe.router.bias"),
  }


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
  state["layers.1.moe.experts.9.w2"] = torch.zeros(1)
  folder, meta = lab.checkpoints(two_runs[1].id), {"config": two_runs[1].toml}
  checkpoint.save(folder, STEPS, state, 0, meta)
  log = Metrics(lab.root, two_runs[1].id)
  log.add(STEPS, STEPS * 512, {"train/loss": 1.0})
  log.flush()
  assert differing(lab, two_runs) == {
    "weights": (2, "layers.1.moe.experts.3.w2"),
    "moments": (1, "embed.weight.exp_avg"),
    "router biases": (1, "layers.1.moe.router.bias"),
    "logged values": (1, "train/loss"),
  }


EQUAL, DIFFERENT = check.Row("moments", 4, 4, ""), check.Row("moments", 4, 3, "a.exp_avg")
NEAR, FAR = (parity.Claim("2", "update", found, 1e-3, "a.weight") for found in (1e-4, 1e-2))


@pytest.mark.parametrize(
  ("rows", "claims", "said"),
  [([DIFFERENT], [], "a.exp_avg"), ([DIFFERENT], [NEAR], "a.exp_avg"), ([EQUAL], [FAR], "0.01")],
  ids=["the end", "a restart", "the steps after"],
)
def test_a_difference_is_an_error(lab, monkeypatch, rows, claims, said):
  """The tables are printed, the record says refuted, the message where to look."""
  out = io.StringIO()
  runs = [lab.run(lab.record()) for _ in range(2)]
  monkeypatch.setattr(check.Work, "repeat", lambda *_: runs[0])
  monkeypatch.setattr(check.Work, "check", lambda *_: None)
  monkeypatch.setattr(check, "_killed", lambda *_: (runs[1], claims))
  monkeypatch.setattr(check, "compare", lambda *_: rows)
  monkeypatch.setattr(check, "_changed", lambda *_: (rows, claims))
  with pytest.raises(RunError, match="a resumed run is not the uninterrupted one"):
    check.resume(lab.file, 12, Console(file=out, width=120))
  assert said in out.getvalue()
  assert Experiments(lab.root).list()[0].verdict == "refuted"


def test_a_change_too_near_the_end_is_not_a_proof(lab, two_runs):
  saved = lab.checkpoints(two_runs[1].id) / "step_00000012"
  restarts = [check.Restart(1, 1, saved, saved), check.Restart(1, 2, saved, saved)]
  with pytest.raises(RunError, match="changed ranks at step 12 of 12; raise --steps"):
    check._changed(lab.root, *two_runs, restarts, 12)


@pytest.mark.parametrize(
  ("ranks", "said"),
  [([1, 3], "3 ranks.*choose from 1, 2, 4$"), ([1, 2, 1, 2], "4 numbers.*give one to three")],
)
def test_ranks_that_do_not_fit_stop_before_anything_runs(lab, launches, ranks, said):
  with pytest.raises(ConfigError, match=said):
    check.resume(lab.file, 12, Console(file=io.StringIO()), ranks)
  assert [e.id for e in lab.records.list()] == [lab.experiment.id]
  assert launches.ids == []


def test_the_last_number_of_ranks_stays(lab):
  made = {tuple(r): shortened.attempts(lab.config, r) for r in ([], [1, 2], [2, 4, 1], [2])}
  found = {r: [c.launch.ranks for c in configurations] for r, configurations in made.items()}
  assert found == {(): [1, 1, 1], (1, 2): [1, 2, 2], (2, 4, 1): [2, 4, 1], (2,): [2, 2, 2]}
  assert made[()] == [lab.config] * 3


@pytest.mark.parametrize(("per_host", "ranks"), [(2, 2), (0, 4)])
def test_a_check_runs_on_this_host(lab, per_host, ranks):
  """Of a configuration for Slurm: the ranks of one host, not 64 of them where the command is."""
  values = {"launch.engine": "slurm", "launch.ranks": 4, "launch.ranks_per_node": per_host}
  values |= {"rdep.group": 2, "train.micro_batch": 2}
  config = changed(lab.config, values)
  path = lab.file.with_name("slurm.toml")
  path.write_text(configs.to_toml(config))
  made = shortened.resumable(path, 12)
  assert {(c.launch.engine, c.launch.ranks, c.nodes) for c in made} == {("local", ranks, 1)}
  assert {c.schedule.batch_tokens for c in made} == {config.schedule.batch_tokens}
  made = shortened.comparable(path, [1, 2], 12)
  assert {c.launch.engine for c in made.values()} == {"local"}
  run = SimpleNamespace(toml=configs.to_toml(made[2]), id="made")
  assert made[2].data.val_tokens < config.data.val_tokens
  assert _same_model(config, run), "it is evidence for the launch"
  other = changed(config, {"model.dense_dim": 2 * config.model.dense_dim})
  assert not _same_model(other, run)


def test_a_run_that_is_too_fast_is_not_a_proof(lab, monkeypatch):
  """If the kill comes too late there is nothing to compare."""
  bench = check.Workbench.open(str(lab.root), Console(file=io.StringIO()))
  arm = bench.arm("killed", lab.config)
  work = check.Work(bench, bench.experiments.create("check", "check", lab.experiment.hypotheses))

  def completes(launcher, job):
    bench.experiments.update_run(job.run, status="completed")
    return Ended(job, 0)

  monkeypatch.setattr(check.launch, "run", completes)
  with (
    Display(bench.console) as display,
    pytest.raises(RunError, match="was to be killed at step 6 but is completed; raise --steps"),
  ):
    check._killed(work, [arm] * 3, (6, 9), display)


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
  config = shortened.killable(lab.config, 12)
  s = config.schedule
  assert (s.total_tokens, s.warmup_tokens, s.decay_tokens) == (6144, 1536, 1536)
  assert (config.train.checkpoint_every, config.train.keep_checkpoints) == (2, 2)


def test_the_checkpoints_that_a_change_of_ranks_is_judged_by_are_kept(lab):
  """Of steps 24 // 2 and two steps later, wherever the kill falls."""
  assert shortened.killable(lab.config, 24, [2, 2]).train.checkpoint_every == 5
  train = shortened.killable(lab.config, 24, [1, 2]).train
  assert (train.checkpoint_every, train.keep_checkpoints) == (1, 24)
