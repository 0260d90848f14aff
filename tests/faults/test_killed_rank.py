"""A killed rank of a production run: trained again in seconds, and the end is the same bits.

One of the two ranks here is the row of the faults that every `pytest` runs.
"""

import os
import signal

import pytest
from labs import same_bits
from productions import Production, kinds, state_of, undisturbed, wait_until

pytestmark = pytest.mark.faults
STEPS = 80
SHORT = f"[schedule]\ntotal_tokens = {STEPS * 1024}\n"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.kills), 1])
def test_a_killed_rank(tmp_path, rank):
  """The agent restarts both from the newest checkpoint, though the other could wait for its
  rdep.deadline_s = 30; no attempt is lost, and the event names the rank.
  """
  production = Production(tmp_path, SHORT)
  production.wait_for(30)
  os.kill(production.rank(rank), signal.SIGKILL)
  wait_until(lambda: kinds(production.events()) == ["launch", "restart"], 15, "trains again")
  code, out = production.end()
  assert code == 0, out
  launch, restart = production.events()
  assert launch.step == 0 and restart.step >= 20 and restart.step % 20 == 0
  assert restart.detail["suspect"] == rank, restart.detail
  assert "1 attempts, 1 restarts" in out
  (tmp_path / "undisturbed").mkdir()
  wanted = undisturbed(tmp_path / "undisturbed", STEPS)
  assert same_bits(state_of(production.root, production.run_id(), STEPS), wanted)
