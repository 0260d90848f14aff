"""Before the first step: whose data are hashed, which vocabulary and memory are refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from labs import options

from nmoe.config import file as configs
from nmoe.config.fit import BESIDE
from nmoe.config.plan import plan
from nmoe.distributed.meeting import Meeting
from nmoe.distributed.parallel import Parallel
from nmoe.errors import ConfigError, DataError
from nmoe.machine.target import select
from nmoe.train import loop as train


def test_a_vocabulary_too_small_for_the_data(lab):
  run = lab.record(model__vocab_size=256)
  with pytest.raises(ConfigError, match=r"model\.vocab_size = 256 is less than the 257 ids"):
    lab.attempt(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_hashes_the_data(lab, rank):
  asked = []

  def opened(folder, verify):
    asked.append(verify)
    raise DataError("seen")

  run = lab.record()
  told = options(lab.root, run)
  told.rank = rank
  with pytest.raises(DataError, match="seen"):
    train.execute(told, lab.run(run), None, opened, Meeting())
  assert asked == [rank == 0]


class Begun(Exception):
  """The model would be built now."""


def test_memory_that_the_heap_holds_already_is_not_missed(lab, monkeypatch):
  """The heap is in the plan, and allocated before the model: 80 GB cards were refused for it."""

  def model(*_):
    raise Begun

  config = configs.changed(lab.config, {"launch.ranks": 2, "rdep.group": 2, "train.micro_batch": 4})
  needed, heap = plan(config).peak_bytes, 1 << 20
  target = replace(select(lab.config), device=torch.device("cuda"))
  ranks = Parallel(rdep=SimpleNamespace(nbytes=heap))
  monkeypatch.setattr(train, "Model", model)
  large, small = 2 * (needed + BESIDE), needed + BESIDE
  for free, total in ((needed - heap - 1, large), (needed - heap, small)):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, told=(free, total): told)
    with pytest.raises(ConfigError, match="too much"):
      train.build(config, target, ranks)
  monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (needed - heap, large))
  with pytest.raises(Begun):
    train.build(config, target, ranks)
