"""Goodput over a real run with five faults: `pytest -m kills`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from productions import Production, ranks_of

from nmoe.records import metrics
from nmoe.records.goodput import production

pytestmark = [pytest.mark.faults, pytest.mark.kills]
REPO = Path(__file__).parents[2]
COMPUTE = ("load", "forward", "backward", "clip", "step", "gather", "log")


def test_the_buckets_of_a_run_with_five_faults(tmp_path):
  """Killed ranks 1 and 0, a hang, a stop, a killed launch; the wall by another clock."""
  run = Production(tmp_path, "[launch]\nhang_s = 8.0\n[prod]\nmax_restarts = 9\n")
  run.wait_for(1)
  begun = production(run.root, run.run_id()).spans[0].begin
  for step, fault in ((30, 1), (70, 0)):
    run.wait_for(step)
    os.kill(run.rank(fault), signal.SIGKILL)
    time.sleep(1.0)
  run.wait_for(110)
  os.kill(run.rank(1), signal.SIGUSR1)
  run.wait_for(150)
  stop = [sys.executable, "-m", "stages.cli", "prod", "stop", run.run_id()]
  subprocess.run([*stop, "--root", str(run.root)], check=True, cwd=REPO)
  assert run.end()[0] == 0
  run.process = run.start()
  run.wait_for(200)
  run.process.kill()
  run.process.wait()
  while ranks_of(run.run_id()):  # they end with it
    time.sleep(0.1)
  run.process = run.start()
  while len(run.attempts()) < 3 or not run.attempts()[-1].outcome:
    time.sleep(0.1)
  wall = time.time() - begun
  assert run.end()[0] == 0  # it writes the report meanwhile
  found = production(run.root, run.run_id())
  kinds = [event.kind for event in found.events if event.kind in ("launch", "restart")]
  assert kinds == ["launch", "restart", "restart", "restart", "launch", "launch"]
  total = sum(found.seconds.values())
  assert total == pytest.approx(found.wall_s) and total == pytest.approx(wall, rel=0.01)
  for bucket in ("stepping", "lost steps", "hang wait", "starting", "loading", "stopped"):
    assert found.seconds[bucket] > 0, bucket
  assert found.seconds["hang wait"] > 8.0
  series = metrics.read(run.root, run.run_id(), [f"time/{name}_s" for name in COMPUTE])
  clock = sum(float(values.sum()) for _, _, values in series.values())
  assert found.seconds["stepping"] == pytest.approx(clock, rel=0.1)  # the steps' own clock
