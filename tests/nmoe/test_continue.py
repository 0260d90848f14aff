"""Going on under another batch or another length: by tokens and samples, never by steps."""

import numpy as np
import pytest
import torch
from labs import Lab

from nmoe.config import file as configs
from nmoe.data.loader import Loader, Prefetcher, Validation
from nmoe.data.prepared import open_data
from nmoe.distributed.parallel import Parallel
from nmoe.evals.heldout import evaluate
from nmoe.machine.target import select
from nmoe.records import checkpoint, metrics
from nmoe.records.metrics import Metrics
from nmoe.train import loop as train
from nmoe.train.evaluate import load_model
from nmoe.train.routing import RoutingRecorder

TRUNK = {
  "schedule__total_tokens": 10_240,
  "schedule__warmup_tokens": 8_192,
  "schedule__decay_tokens": 0,
  "train__checkpoint_every": 5,
}
STOPPED, SEEN = 10, 5_120  # the checkpoint that is gone on from


class Killed(BaseException):
  """What SIGKILL would do, as far as one process can."""


@pytest.fixture
def fed(monkeypatch):
  """step -> the tokens that it trained on, int64 [sequences, S]; step "kill" dies before it."""
  seen = {}

  class Recording(Prefetcher):
    def __init__(self, *args, start, **kwargs):
      super().__init__(*args, start=start, **kwargs)
      self.step = start

    def __next__(self):
      tokens, targets = super().__next__()
      self.step += 1
      if self.step == seen.get("kill"):
        del seen["kill"]
        raise Killed
      seen[self.step] = tokens
      return tokens, targets

  monkeypatch.setattr(train, "Prefetcher", Recording)
  return seen


def stopped(lab: Lab, fed: dict, **values) -> str:
  """A run that was killed in step 14."""
  run = lab.record(**TRUNK, **values)
  fed["kill"] = 14
  with pytest.raises(Killed):
    lab.attempt(run)
  assert checkpoint.steps(lab.checkpoints(run))[-1] == STOPPED
  return run


def changed(lab: Lab, run: str, values: dict) -> None:
  config = configs.changed(configs.loads(lab.run(run).toml), values)
  lab.records.update_run(run, toml=configs.to_toml(config))


def samples(lab: Lab, first: int, number: int) -> torch.Tensor:
  """Their inputs, by the loader itself."""
  loader = Loader(open_data(lab.data), seq_len=64, seed=0)
  return torch.from_numpy(loader.samples(np.arange(first, first + number))[:, :-1])


BATCHES = {  # batch_tokens, total_tokens, micro_batch: the last step
  "larger": (1_024, 20_480, 8, 25),
  "smaller": (256, 10_240, 4, 30),
  "another multiple": (1_536, 12_000, 8, 14),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", BATCHES)
def test_resuming_with_another_batch_goes_on_where_it_was(lab, fed, case):
  """No sample twice, none left out; tokens, rates and the results count what was trained."""
  batch, total, micro, last = BATCHES[case]
  run = stopped(lab, fed)
  keys = {"schedule.batch_tokens": batch, "schedule.total_tokens": total}
  changed(lab, run, keys | {"train.micro_batch": micro})
  assert lab.attempt(run) == 0

  steps, tokens, rate = metrics.read(lab.root, run)["lr/dense"]
  expected = {s: 512 * s for s in range(1, STOPPED + 1)}
  expected |= {s: SEEN + batch * (s - STOPPED) for s in range(STOPPED + 1, last + 1)}
  assert dict(zip(steps.tolist(), tokens.tolist(), strict=True)) == expected
  rates = dict(zip(steps.tolist(), rate.tolist(), strict=True))
  assert rates[STOPPED + 1] == pytest.approx(1e-2 * min(1, (SEEN + batch / 2) / 8_192))
  number = batch // 64
  for step in (STOPPED + 1, STOPPED + 2, last):
    first = SEEN // 64 + (step - STOPPED - 1) * number
    assert torch.equal(fed[step], samples(lab, first, number)), step
  results = lab.run(run).results
  assert (results["steps"], results["tokens"]) == (last, expected[last])
  written = checkpoint.manifest(lab.checkpoints(run) / f"step_{last:08d}")
  assert (written["tokens"], written["samples"]) == (expected[last], expected[last] // 64)


@pytest.mark.faults
def test_the_decay_ends_with_the_last_token_trained(lab, fed):
  """4 steps of 1,536 after 5,120 tokens end at 11,264, not at a multiple of 1,536."""
  run = stopped(lab, fed)
  keys = {"batch_tokens": 1_536, "total_tokens": 12_000, "warmup_tokens": 0, "decay_tokens": 3_072}
  changed(lab, run, {f"schedule.{k}": v for k, v in keys.items()} | {"schedule.decay": "linear"})
  assert lab.attempt(run) == 0
  rate = metrics.read(lab.root, run)["lr/dense"][2]
  assert rate[-4:].tolist() == pytest.approx([1e-2, 1e-2, 7.5e-3, 2.5e-3])


@pytest.mark.faults
def test_the_forward_bf16_finish_begins_at_its_token(lab, fed, monkeypatch):
  run = stopped(lab, fed)
  keys = {"schedule.batch_tokens": 1_024, "schedule.total_tokens": 10_240}
  changed(lab, run, keys | {"precision.finish_tokens": 8_192})
  told = []
  monkeypatch.setattr(train.Model, "set_forward_bf16", lambda self, on: told.append(on))
  assert lab.attempt(run) == 0
  assert told == [False] * 3 + [True] * 2 + [True], "the steps, and the evaluation at the end"


def test_a_checkpoint_is_evaluated_in_the_arithmetic_of_its_tokens(lab):
  """The loss that a run measures on its way and that of the checkpoint, before the finish and in
  it: the same bits.
  """
  keys = {"target__dtype": "nvfp4", "target__emulate_blockscale": True}
  keys |= {"train__eval_every": 1, "train__checkpoint_every": 1, "train__keep_checkpoints": 99}
  run = lab.record(**keys, precision__finish_tokens=3_584, schedule__total_tokens=5_120)
  assert lab.attempt(run) == 0
  config, data = configs.loads(lab.run(run).toml), open_data(lab.data)
  validation = Validation(data, seq_len=config.data.seq_len, tokens=config.data.val_tokens)
  found = []
  for step in range(1, 11):
    ranks = Parallel()
    model = load_model(config, select(config), ranks, lab.checkpoints(run), step)
    found.append(evaluate(model, validation, config.train.micro_batch, ranks)["val/loss"])
  assert found == metrics.read(lab.root, run)["val/loss"][2].tolist()


@pytest.mark.faults
def test_what_is_seen_of_sources_is_of_the_samples_trained(lab, fed, monkeypatch):
  run = stopped(lab, fed)
  changed(lab, run, {"schedule.batch_tokens": 1_024, "schedule.total_tokens": 10_240})
  told = []
  monkeypatch.setattr(RoutingRecorder, "start", lambda self, *place: told.append(place))
  assert lab.attempt(run) == 0
  assert told == [(step, 80 + 16 * (step - 11)) for step in range(11, 16)]


@pytest.mark.faults
@pytest.mark.parametrize("total", [5_120, 4_096, 6_000])
def test_a_run_at_or_behind_its_end_evaluates_and_completes(lab, fed, total):
  run = stopped(lab, fed)
  keys = {"batch_tokens": 1_024, "total_tokens": total, "warmup_tokens": 0}
  changed(lab, run, {f"schedule.{k}": v for k, v in keys.items()})
  assert lab.attempt(run) == 0
  results = lab.run(run).results
  assert (results["steps"], results["tokens"]) == (STOPPED, SEEN)
  steps, tokens, loss = metrics.read(lab.root, run)["val/loss"]
  assert (steps.tolist(), tokens.tolist()) == ([STOPPED], [SEEN])
  assert results["val/loss"] == loss[0]


@pytest.mark.faults
def test_a_run_behind_its_end_that_logged_nothing(lab, fed):
  run = stopped(lab, fed, train__log_every=100)
  changed(lab, run, {"schedule.total_tokens": 4_096, "schedule.warmup_tokens": 0})
  assert lab.attempt(run) == 0
  assert lab.run(run).results["val/bpb"] > 0


@pytest.mark.faults
def test_a_checkpoint_of_before_tokens_stood_in_it(lab, fed, monkeypatch):
  """All its steps were of its own configuration's batch."""
  start = checkpoint.Writer.start

  def without(writer, step, meta):
    start(writer, step, {k: v for k, v in meta.items() if k not in ("tokens", "samples")})

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Writer, "start", without)
    run = stopped(lab, fed)
  changed(lab, run, {"schedule.batch_tokens": 1_024, "schedule.total_tokens": 10_240})
  assert lab.attempt(run) == 0
  assert Metrics(lab.root, run).read()["lr/dense"][1].tolist()[-5:] == list(
    range(6144, 10241, 1024)
  )
