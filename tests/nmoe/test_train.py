"""The step loop: exact resume, stopping, failing, and what arms share."""

import hashlib
import os
import signal
import sys
from typing import Any, NamedTuple

import labs
import pytest
import torch
from labs import STEPS, Lab, open_lab, same_bits
from torch import Tensor

from nmoe.config import file as configs
from nmoe.data.loader import Loader, Prefetcher
from nmoe.data.mixture import phases
from nmoe.data.prepared import open_data
from nmoe.errors import CheckpointError, DataError, DivergedError
from nmoe.machine.target import select
from nmoe.model.decoder import Model
from nmoe.records import checkpoint
from nmoe.records.experiments import Experiments
from nmoe.train import loop as train
from nmoe.train.guard import Guard
from nmoe.train.progress import Progress

SHORT = {
  "schedule__total_tokens": 1024,
  "schedule__warmup_tokens": 0,
  "schedule__decay_tokens": 0,
}


class Killed(BaseException):
  """What SIGKILL would do, as far as one process can."""


class Feed:
  """The batches of every attempt: their hashes by step, and something done before a step."""

  def __init__(self, monkeypatch):
    self.hashes: dict[int, list[str]] = {}
    self.before: dict[int, object] = {}  # step, from 1 -> a function called once
    feed = self

    class Recording(Prefetcher):
      def __init__(self, *args, start, **kwargs):
        super().__init__(*args, start=start, **kwargs)
        self.step = start

      def __next__(self):
        tokens, targets = super().__next__()
        self.step += 1
        feed.before.pop(self.step, lambda: None)()
        digest = hashlib.sha256(tokens.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()
        feed.hashes.setdefault(self.step, []).append(digest)
        return tokens, targets

    monkeypatch.setattr(train, "Prefetcher", Recording)


@pytest.fixture
def feed(monkeypatch):
  return Feed(monkeypatch)


def kill():
  raise Killed


def killed_at(lab: Lab, feed: Feed, run_id: str, step: int) -> None:
  feed.before[step] = kill
  with pytest.raises(Killed):
    lab.attempt(run_id)


RECIPES = {
  "adamw": {},
  "muon": {"optim__matrices": "muon", "optim__experts": "muon", "train__micro_batch": 2},
  "bf16": {"target__dtype": "bf16", "train__micro_batch": 4, "optim__moments": "bf16"},
  "nvfp4": {
    "target__dtype": "nvfp4",
    "target__emulate_blockscale": True,
    "precision__finish_tokens": 3584,
  },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_is_exact(lab, feed, recipe):
  """Killed in step 5 and again in step 8, with checkpoints at 3, 6, 9 and 12."""
  whole, killed = (lab.record(**RECIPES[recipe]) for _ in range(2))
  assert lab.attempt(whole) == 0
  once, feed.hashes = feed.hashes, {}
  killed_at(lab, feed, killed, 5)
  killed_at(lab, feed, killed, 8)
  assert lab.attempt(killed) == 0

  assert checkpoint.steps(lab.checkpoints(killed)) == [9, 12]
  state = lab.state(killed)
  assert same_bits(lab.state(whole), state)
  assert int(state["optimizer.steps"]) == STEPS
  assert any(name.endswith("router.bias") and bool(x.any()) for name, x in state.items())
  assert lab.logged(killed) == lab.logged(whole)
  assert [step for step, _ in lab.logged(killed)["train/loss"]] == list(range(1, STEPS + 1))
  assert len({h for seen in once.values() for h in seen}) == STEPS  # no batch twice
  assert all(set(feed.hashes[step]) == set(once[step]) for step in range(1, STEPS + 1))
  assert len(feed.hashes[4]) == 2  # step 4 ran before and after the first kill
  losses = ("val/loss", "val/bpb", "train/loss", "load/max_over_mean", "steps", "tokens")
  a, b = lab.run(whole).results, lab.run(killed).results
  assert {k: a[k] for k in losses} == {k: b[k] for k in losses}


TWO_SOURCES = (
  labs.MIXTURE.replace("text.jsonl", "*.jsonl")
  + """
[[source]]
name = "more"
kind = "files"
paths = ["text.jsonl"]
format = "jsonl"
max_documents = 50
"""
)


def test_weights_that_change_by_tokens_resume_to_the_same_bits(tmp_path, monkeypatch, feed):
  """Killed on either side of the change, which lies within a batch; batches as the loader says."""
  monkeypatch.setattr(labs, "MIXTURE", TWO_SOURCES)
  rows = ((2100.0, 0.2, 0.8), (4096.0, 1.0, 0.0))
  with open_lab(tmp_path) as lab:
    values = {"data__weights": (0.9, 0.1), "data__weights_from": rows, "data__fraction": 0.5}
    whole, killed = (lab.record(**values) for _ in range(2))
    assert lab.attempt(whole) == 0
    once, feed.hashes = feed.hashes, {}
    killed_at(lab, feed, killed, 4)
    killed_at(lab, feed, killed, 8)
    assert lab.attempt(killed) == 0
    assert same_bits(lab.state(whole), lab.state(killed))
    assert all(set(feed.hashes[step]) == set(once[step]) for step in range(1, STEPS + 1))
    of = phases(("text", "more"), values["data__weights"], rows)
    loader = Loader(open_data(lab.data), seq_len=64, seed=0, weights=of, fraction=0.5)
    for step in range(STEPS):
      tokens, targets = loader.batch(step, 8)
      found = hashlib.sha256(tokens.tobytes() + targets.tobytes()).hexdigest()
      assert once[step + 1] == [found]


def test_dtypes_of_a_bf16_state(lab):
  run = lab.record(target__dtype="bf16", optim__moments="bf16", **SHORT)
  assert lab.attempt(run) == 0
  dtypes = {name: x.dtype for name, x in lab.state(run, 2).items()}
  assert dtypes["embed.weight"] == torch.bfloat16
  assert dtypes["embed.weight.master"] == torch.float32
  assert dtypes["embed.weight.exp_avg"] == torch.bfloat16
  assert dtypes["layers.1.moe.experts.3.w13"] == torch.bfloat16
  assert dtypes["layers.1.moe.router.bias"] == torch.float32


def retoml(lab: Lab, run_id: str, **values) -> str:
  return configs.to_toml(configs.changed(configs.loads(lab.run(run_id).toml), values))


class Whole(NamedTuple):
  """An uninterrupted run of the lab's configuration."""

  state: dict[str, Tensor]
  logged: dict[str, list[tuple[int, float]]]
  results: dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  with open_lab(tmp_path_factory.mktemp("whole")) as lab:
    run = lab.record()
    assert lab.attempt(run) == 0
    yield Whole(lab.state(run), lab.logged(run), lab.run(run).results)


def test_killed_between_the_last_checkpoint_and_the_record(lab, whole, monkeypatch):
  killed = lab.record()
  with monkeypatch.context() as patch:
    patch.setattr(train, "unigram_bpb", lambda *_: kill())
    with pytest.raises(Killed):
      lab.attempt(killed)
  assert lab.attempt(killed) == 0
  a, b = whole.results, lab.run(killed).results
  assert a.keys() == b.keys()
  assert all(a[k] == b[k] for k in ("val/bpb", "train/loss", "train/bpb", "load/dead"))
  assert lab.logged(killed) == whole.logged


def interrupt(run: str, lab: Lab) -> None:
  assert lab.attempt(run) == train.INTERRUPTED
  assert lab.run(run).status == "interrupted"
  assert checkpoint.steps(lab.checkpoints(run)) == [3, 5]


def finish(run: str, lab: Lab, whole: Whole) -> None:
  assert lab.attempt(run) == 0
  assert same_bits(lab.state(run), whole.state)
  assert lab.run(run).status == "completed"


def test_sigterm_saves_and_leaves(lab, feed, whole):
  run = lab.record()
  feed.before[5] = lab.terminate
  interrupt(run, lab)
  finish(run, lab, whole)


def test_a_run_in_the_process_of_the_tests_takes_no_signal_of_theirs(lab, feed):
  """One that is meant to end them, such as of a time limit, would end the run and fail its test."""
  run, theirs, seen = lab.record(**SHORT), signal.getsignal(signal.SIGTERM), []
  feed.before[2] = lambda: seen.append(signal.getsignal(signal.SIGTERM))
  assert lab.attempt(run) == 0
  assert seen == [theirs]


def test_a_vanished_parent_is_a_reason_to_save_and_leave(lab, feed, whole, monkeypatch):
  run = lab.record()
  reader, writer = os.pipe()
  with monkeypatch.context() as patch:
    patch.setattr(train, "Progress", lambda *_: Progress(writer))
    feed.before[5] = lambda: os.close(reader)
    interrupt(run, lab)
  os.close(writer)
  finish(run, lab, whole)


def bad_loss(out):
  return out._replace(loss_sum=out.loss_sum * torch.nan)


def bad_gradient(out):
  out.loss_sum.register_hook(lambda grad: grad * torch.inf)
  return out


@pytest.mark.parametrize("spoil", [bad_loss, bad_gradient])
def test_divergence_stops_before_the_optimizer(lab, monkeypatch, spoil):
  """In step 6, of which no checkpoint exists; the state stays that of step 5."""
  states, forward = [], Model.forward
  build = train.build

  def spoiled(self, x, y):
    out = forward(self, x, y)
    return spoil(out) if states[0].step == 5 and torch.is_grad_enabled() else out

  monkeypatch.setattr(train, "build", lambda *args: states.append(build(*args)) or states[0])
  monkeypatch.setattr(Model, "forward", spoiled)
  run = lab.record(train__checkpoint_every=5)
  with pytest.raises(DivergedError, match="step 6: the loss or a gradient is not finite"):
    lab.attempt(run)
  found = lab.run(run)
  assert (found.status, found.results) == ("failed", {"diverged": 1})
  assert "step 6" in found.error
  assert checkpoint.steps(lab.checkpoints(run)) == [5]
  live = checkpoint.split_experts(states[0].tensors(), 0)
  assert same_bits(lab.state(run, 5), live)
  assert [step for step, _ in lab.logged(run)["train/loss"]] == [1, 2, 3, 4, 5]


def test_a_run_that_is_not_finite_is_never_saved(lab, monkeypatch):
  """Where the host does not look at every step, saving looks."""
  run = lab.record()
  monkeypatch.setattr(Guard, "factor", blind_factor)
  with pytest.raises(DivergedError, match="step 3"):
    lab.attempt(run)
  assert checkpoint.steps(lab.checkpoints(run)) == []


def blind_factor(self, step: int, loss: Tensor, *more: object) -> Tensor:
  if step == 2:
    self.bad_step = torch.tensor(step)
  return torch.ones(())


def test_other_failures_have_no_outcome_and_can_go_on(lab, feed, whole, capsys, monkeypatch):
  run = lab.record()

  def unreadable():
    raise DataError("shard 7 is gone; restore it")

  feed.before[5] = unreadable
  words = ["train", "--root", str(lab.root), "--run", run]
  monkeypatch.setattr(sys, "argv", words)
  assert train.main() == train.FAILED_FOR_GOOD
  assert "error: shard 7 is gone; restore it" in capsys.readouterr().err
  found = lab.run(run)
  assert (found.status, found.results, found.error) == ("failed", {}, "shard 7 is gone; restore it")
  assert not found.finished

  feed.before[8] = lambda: 1 / 0
  with pytest.raises(ZeroDivisionError):
    train.main()
  assert lab.run(run).error == "ZeroDivisionError: division by zero"
  assert train.main() == 0
  assert same_bits(lab.state(run), whole.state)
  assert lab.run(run).error == ""


def test_two_processes_on_one_run(lab, monkeypatch, capsys):
  """The second says who owns the run, and leaves its record alone."""
  run, other = lab.record(), Experiments(lab.root)
  other.claim(run)
  monkeypatch.setattr(sys, "argv", ["train", "--root", str(lab.root), "--run", run])
  assert train.main() == 1
  said = capsys.readouterr().err
  assert said.startswith(f"error: run {run} belongs to process {os.getpid()} on host")
  assert (lab.run(run).status, lab.run(run).error) == ("running", "")
  other.update_run(run, status="interrupted")
  other.close()
  assert lab.attempt(run) == 0


def test_a_checkpoint_of_another_identity_is_refused(lab, feed):
  run = lab.record()
  killed_at(lab, feed, run, 5)
  lab.records.update_run(run, toml=retoml(lab, run, **{"optim.beta1": 0.8, "moe.top_k": 3}))
  with pytest.raises(CheckpointError) as caught:
    lab.attempt(run)
  message = str(caught.value)
  assert "optim.beta1: checkpoint 0.9, now 0.8" in message
  assert "moe.top_k: checkpoint 2, now 3" in message
  assert "restore these keys or start a new run" in message


def test_another_schedule_is_taken_up_and_said(lab, feed, capsys):
  run = lab.record()
  killed_at(lab, feed, run, 5)
  lab.records.update_run(run, toml=retoml(lab, run, **{"optim.dense_lr": 5e-3}))
  assert lab.attempt(run) == 0
  assert "resumed under optim.dense_lr: checkpoint 0.01, now 0.005" in capsys.readouterr().err
  rates = dict(lab.logged(run)["lr/dense"])
  assert (rates[3], rates[4]) == (pytest.approx(1e-2), pytest.approx(5e-3))


def test_a_corrupt_newest_checkpoint_says_what_to_delete(lab, feed, whole):
  run = lab.record()
  killed_at(lab, feed, run, 8)
  newest = lab.checkpoints(run) / "step_00000006"
  shard = next(newest.glob("*.distcp"))
  shard.write_bytes(shard.read_bytes()[:-1] + b"?")
  with pytest.raises(CheckpointError) as caught:
    lab.attempt(run)
  assert str(shard) in str(caught.value)
  assert f"delete {newest} to resume from an earlier step" in str(caught.value)
  for file in newest.iterdir():
    file.unlink()
  newest.rmdir()
  assert lab.attempt(run) == 0
  assert same_bits(lab.state(run), whole.state)
  assert lab.logged(run) == whole.logged


def test_without_checkpoints_a_stopped_run_starts_anew(lab, feed, whole):
  run = lab.record(train__keep_checkpoints=0)
  killed_at(lab, feed, run, 8)
  assert lab.attempt(run) == 0
  assert not lab.checkpoints(run).exists()
  assert lab.logged(run) == whole.logged


def test_arms_share_initial_weights_and_batches(lab, feed):
  """Where shapes agree: a variant with another expert width and another optimizer."""
  base = train.build(*machine(lab))
  other = train.build(*machine(lab, **{"moe.expert_dim": 64, "optim.matrices": "muon"}))
  a, b = base.model.state_dict(), other.model.state_dict()
  assert a.keys() == b.keys()
  shared = [name for name in a if a[name].shape == b[name].shape]
  apart = {name.rpartition(".")[0] for name in a.keys() - set(shared)}
  assert apart == {"layers.1.moe.experts", "layers.1.moe.shared"}
  assert all(torch.equal(a[name], b[name]) for name in shared)

  runs = [lab.record(), lab.record(optim__matrices="muon"), lab.record(train__seed=1)]
  seen = []
  for run in runs:
    feed.hashes = {}
    assert lab.attempt(run) == 0
    seen.append(feed.hashes)
  assert seen[0] == seen[1]
  assert not {h for hs in seen[0].values() for h in hs} & {h for hs in seen[2].values() for h in hs}


def machine(lab: Lab, **values):
  config = configs.changed(lab.config, values)
  return config, select(config), train.Parallel()
