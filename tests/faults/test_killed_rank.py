"""A killed rank of a production run: trained again in seconds, and the end is the same bits.

One of the two ranks here is the row of the faults that every `pytest` runs.
"""

import os
import signal
import subprocess
import sys

import pytest
from labs import same_bits
from productions import REPO, Production, kinds, state_of, undisturbed, wait_until

from nmoe.records.root import Root

pytestmark = pytest.mark.faults
STEPS = 80
SHORT = f"[schedule]\ntotal_tokens = {STEPS * 1024}\n"


def trains_again(production: Production, said: list[tuple[int, str]]) -> bool:
  """Whether it does; what `nmoe prod status --check` says meanwhile is added to `said`."""
  told = [sys.executable, "-m", "stages.cli", "prod", "status", "--check"]
  told += ["--root", str(production.root)]
  done = subprocess.run(told, capture_output=True, text=True, cwd=REPO)
  said.append((done.returncode, done.stdout + done.stderr))
  return kinds(production.events()) == ["launch", "restart"]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.kills), 1])
def test_a_killed_rank(tmp_path, rank):
  """The agent restarts both from the newest checkpoint, though the other could wait for its
  rdep.deadline_s = 30; no attempt is lost, and the event names the rank.
  """
  production = Production(tmp_path, SHORT)
  production.wait_for(30)
  os.kill(production.rank(rank), signal.SIGKILL)
  said = []
  wait_until(lambda: trains_again(production, said), 15, "trains again")
  assert [code for code, _ in said] == [0] * len(said), said  # no monitor is to alarm
  assert any("restarting, attempt 1, restart 1, since" in told for _, told in said), said
  code, out = production.end()
  assert code == 0, out
  launch, restart = production.events()
  assert launch.step == 0 and restart.step >= 20 and restart.step % 20 == 0
  assert restart.detail["suspect"] == rank, restart.detail
  assert "1 attempt, 1 restart within it" in out
  assert "production: attempt 1 lost ranks, 1 time so far" in out
  logs = Root(production.root).logs(production.run_id()).rglob("stderr.log")
  assert not any("Warning" in log.read_text() for log in logs)  # they would hide its last words
  (tmp_path / "undisturbed").mkdir()
  wanted = undisturbed(tmp_path / "undisturbed", STEPS)
  assert same_bits(state_of(production.root, production.run_id(), STEPS), wanted)
