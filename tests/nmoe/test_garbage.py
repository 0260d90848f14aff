"""The collector of cycles in a run: it comes at logs, over what came since, and never by itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from model_configs import tiny

from kernels import reference
from nmoe.model.decoder import Model
from nmoe.train import garbage
from nmoe.train.watch import Watch


class Cycle:
  """Freed by the collector alone."""

  living = 0

  def __init__(self) -> None:
    self.itself = self
    Cycle.living += 1

  def __del__(self) -> None:
    Cycle.living -= 1


@pytest.fixture
def collections(monkeypatch) -> Iterator[list[int]]:
  """The generations collected from `settle` on, until the run's loop ends."""
  seen: list[int] = []
  settle = garbage.settle

  def note(phase: str, info: dict) -> None:
    if phase == "start":
      seen.append(info["generation"])

  def settled() -> None:
    settle()
    gc.callbacks.append(note)

  monkeypatch.setattr(garbage, "settle", settled)
  yield seen
  gc.callbacks.remove(note)


def test_a_run_collects_at_its_logs_what_came_since(lab, monkeypatch, collections):
  add_experts, living, frozen = Watch.add_experts, [], []

  def leaving(self, step, values):
    Cycle()
    living.append(Cycle.living)
    frozen.append(gc.get_freeze_count())
    add_experts(self, step, values)

  monkeypatch.setattr(Watch, "add_experts", leaving)
  lab.attempt(lab.record(train__log_every=4, train__eval_every=0, train__checkpoint_every=12))
  logs = lab.config.steps // 4
  assert min(frozen) > 100_000, "what training imports"
  assert living == [1, 2, 3, 4, 5] * logs  # four steps, and the log itself
  assert collections[:logs] == [2] * logs
  assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_run_that_fails_leaves_the_collector_as_it_was(lab, monkeypatch, collections):
  def full(self, state, values):
    assert not gc.isenabled()
    raise MemoryError

  monkeypatch.setattr(Watch, "log", full)
  with pytest.raises(MemoryError):
    lab.attempt(lab.record(train__log_every=2))
  assert gc.isenabled() and gc.get_freeze_count() == 0


def test_it_stays_off_where_it_was_off():
  gc.disable()
  try:
    with garbage.by_hand():
      garbage.settle()
    assert not gc.isenabled()
  finally:
    gc.enable()


@pytest.mark.parametrize("parts", [[], ["norm", "qkv", "swiglu"]])
def test_passes_leave_no_cycles(parts):
  """So nothing large waits for a log."""
  model = Model(tiny(train__recompute=parts), reference)
  model.init_weights(0)
  tokens = torch.randint(97, (2, 24))
  with garbage.by_hand():
    for step in range(4):
      out = model(tokens, tokens)
      (out.loss_sum + out.balance_loss).backward()
      del out
      model.zero_grad()
      if step == 0:
        garbage.settle()
    assert gc.collect() == 0
