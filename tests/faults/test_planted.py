"""Steps that are not finite on two real ranks, of the run or of one rank: `pytest -m kills`."""

import pytest
from labs import same_bits
from productions import STEPS, Production

from nmoe.config import file as configs
from nmoe.records import checkpoint
from nmoe.records.root import Root
from stages.launch import local
from stages.launch.local import Job, Launcher

pytestmark = [pytest.mark.faults, pytest.mark.kills]


def test_a_loss_that_is_not_finite(tmp_path):
  """Computed again, the same: 76, and nothing of after it is kept."""
  production = Production(tmp_path, FAULT="nan")
  code, out = production.end()
  assert code == 76 and "diverged: step 41" in out
  kinds = [event.kind for event in production.events()]
  assert kinds == ["launch", "bad step", "restart", "bad step", "diverged"]
  assert checkpoint.steps(Root(production.root).checkpoints(production.run_id())) == [20, 40]


def calm(lab):
  """The final state of the same run without agents and faults."""
  keys = {"launch__ranks": 2, "schedule__batch_tokens": 1024, "train__checkpoint_every": 20}
  run = lab.record(**keys, schedule__total_tokens=STEPS * 1024)
  config = configs.loads(lab.run(run).toml, "calm", env={})
  assert local.run(Launcher(lab.root), Job(run, config)).poll() == 0
  return lab.state(run, STEPS)


def test_a_gradient_that_flipped_once(tmp_path):
  """Computed again it is another: the hardware's; the rank is named, the end has the same bits."""
  production = Production(tmp_path, FAULT=f"flip: {tmp_path / 'flipped'}")
  code, out = production.end()
  assert code == 0, out
  kinds = [event.kind for event in production.events()]
  assert kinds == ["launch", "bad step", "restart", "hardware"]
  hardware = production.events()[-1]
  assert hardware.rank == 1 and hardware.step == 41
  assert same_bits(production.state(), calm(production.lab))
