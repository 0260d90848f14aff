"""Evaluation against the definition in float64: every held-out window once, however it is cut."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from nmoe.data.loader import Validation
from nmoe.data.prepared import open_data
from nmoe.distributed.parallel import Parallel
from nmoe.evals.heldout import evaluate
from nmoe.machine.target import select
from nmoe.train import loop as train
from nmoe.train import watchdog


@pytest.fixture
def trained(lab):
  """A model and its data."""
  state = train.build(lab.config, select(lab.config), Parallel())
  return state.model, open_data(lab.data)


@dataclass
class OneOf(Parallel):
  """One of several ranks, whose sums are collected and added up by the test."""

  sums: list = field(default_factory=list)

  def sum(self, x):
    self.sums.append(x)
    return x


def measure(trained, micro_batch: int, ranks: int = 1) -> dict[str, float]:
  model, data = trained
  validation = Validation(data, seq_len=64, tokens=2048)
  sums: list = []
  for rank in range(ranks):
    found = evaluate(model, validation, micro_batch, OneOf(rank, ranks, sums=sums))
  nats, targets, counted, num_bytes = sum(sums).tolist()
  whole = {"val/loss": nats / targets, "val/bpb": counted / (math.log(2) * num_bytes)}
  assert ranks > 1 or found == whole
  return whole


def oracle(trained) -> dict[str, float]:
  """From the whole logits in float64, window by window, in plain Python."""
  model, data = trained
  separator = data.tokenizer.eot
  losses, counted = [], []
  for tokens, targets, _ in Validation(data, seq_len=64, tokens=2048).batches(1):
    with torch.no_grad():
      logits = model.logits(tokens)[0].double()
    chosen = logits.log_softmax(-1).gather(1, targets[0][:, None])[:, 0]
    losses += (-chosen).tolist()
    counted += [
      -x for x, t in zip(chosen.tolist(), targets[0].tolist(), strict=True) if t != separator
    ]
  assert 0 < len(losses) - len(counted) < len(losses)  # separators are there
  return {
    "val/loss": float(np.mean(losses)),
    "val/bpb": sum(counted) / math.log(2) / len(counted),  # a byte a token
  }


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (5, 1), (8, 1), (3, 2), (1, 4)])
def test_evaluation_is_the_mean_over_all_windows(trained, micro_batch, ranks):
  """Also where the last batches are padding."""
  assert measure(trained, micro_batch, ranks) == pytest.approx(oracle(trained), rel=1e-5)


def test_an_untrained_model_knows_the_number_of_ids(trained):
  found = measure(trained, 8)
  assert found["val/loss"] == pytest.approx(math.log(257), rel=0.02)


def test_evaluation_leaves_no_trace(trained):
  """No gradient, no change of a router's bias."""
  model = trained[0]
  before = {name: x.clone() for name, x in model.state_dict().items()}
  assert measure(trained, 8) == measure(trained, 8)
  assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
  assert all(p.grad is None for p in model.parameters())


@pytest.mark.faults
def test_an_evaluation_of_many_batches_is_no_hang(lab, monkeypatch):
  """Each batch has launch.hang_s, not all of them together: a run whose last evaluation took longer
  was ended and restarted there, again and again.
  """
  states = []
  monkeypatch.setattr(watchdog.Watchdog, "enter", lambda self, state: states.append(state))
  run = lab.record(data__val_tokens=2048, data__seq_len=64, train__micro_batch=2)
  assert lab.attempt(run) == 0
  assert states.count("evaluating") == 1 + 2048 // 64 // 2
