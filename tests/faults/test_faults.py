"""Faults of a production run on one host, with real agents and ranks: the end is the same bits.

`pytest -m kills`. Limits are those of two quiet cores, doubled; SLACK=6 in the environment says six
times.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from labs import same_bits
from productions import REPO, SLACK, Production, kinds, ranks_of, wait_until

from nmoe.records.root import Root

pytestmark = [pytest.mark.faults, pytest.mark.kills]


def check_equal(production: Production, undisturbed) -> None:
  assert same_bits(production.state(), undisturbed)


def test_a_rank_that_hangs(tmp_path, undisturbed):
  """Its own deadline ends it, with the stacks of its threads in its log."""
  production = Production(tmp_path, "[launch]\nhang_s = 8.0\n")
  production.wait_for(30)
  os.kill(production.rank(1), signal.SIGUSR1)
  code, out = production.end()
  assert code == 0, out
  assert kinds(production.events()) == ["launch", "restart"]
  logs = Root(production.root).logs(production.run_id()).rglob("stderr.log")
  hung = [log.read_text() for log in logs if "Timeout (0:00:08)!" in log.read_text()]
  assert any("sitecustomize.py" in text for text in hung)  # the line that sleeps
  detail = production.events()[-1].detail
  assert detail["suspect"] == 1 and "sitecustomize.py" in detail["why"]
  check_equal(production, undisturbed)


def test_a_stopped_rank(tmp_path, undisturbed):
  """SIGSTOP: its peer misses it at the deadline; the agent replaces both."""
  production = Production(tmp_path, "[rdep]\ndeadline_s = 6.0\n")
  production.wait_for(30)
  os.kill(production.rank(1), signal.SIGSTOP)
  code, out = production.end()
  assert code == 0, out
  assert "restart" in kinds(production.events())
  check_equal(production, undisturbed)


def test_crash_after_crash_without_progress(tmp_path):
  """Three attempts, then it is given up, never to be queued again."""
  production = Production(tmp_path, "[prod]\nmax_restarts = 0\n", FAULT="crash")
  code, out = production.end()
  assert code == 76
  assert "no progress: 3 attempts in a row ended without a newer checkpoint" in out
  assert "planted" in out
  outcomes = [attempt.outcome for attempt in production.attempts()]
  assert outcomes == ["crashed", "crashed", "no progress"]


def test_divergence_is_final(tmp_path):
  production = Production(tmp_path, "[optim]\ndense_lr = 1e30\nexpert_lr = 1e30\n")
  code, out = production.end()
  assert code == 76 and "diverged: step" in out
  wanted = ["launch", "bad step", "restart", "bad step", "diverged"]
  assert kinds(production.events()) == wanted


def test_preemption(tmp_path, undisturbed):
  """SIGTERM to the launch: ranks save at the next step; the same command goes on."""
  production = Production(tmp_path)
  production.wait_for(30)
  production.process.terminate()
  code, out = production.end()
  assert code == 75 and "preempted" in out
  stop = production.events()[1]
  assert stop.kind == "stop" and stop.step >= 30
  production.process = production.start()
  code, out = production.end()
  assert code == 0 and f"goes on from step {stop.step}" in out
  check_equal(production, undisturbed)


def test_preemption_while_ranks_start(tmp_path, undisturbed):
  """By two signals, more often than prod.no_progress: 75 each time; the same command goes on."""
  production = Production(tmp_path)
  for count, number in enumerate((signal.SIGTERM, signal.SIGINT) * 2, start=1):
    wait_until(lambda n=count: len(attempts_so_far(production)) == n, 20, "an attempt begins")
    time.sleep(0.7 * count)
    production.process.send_signal(number)
    code, out = production.end()
    assert code == 75 and "preempted: it was told to leave before its ranks could save" in out
    production.process = production.start()
  assert production.end()[0] == 0
  assert [one.outcome for one in production.attempts()] == ["preempted"] * 4 + ["completed"]
  check_equal(production, undisturbed)


def attempts_so_far(production: Production) -> list:
  return production.attempts() if production.run_id() else []


def test_stop_and_go(tmp_path, undisturbed):
  """`nmoe prod stop`: exit 0, not queued again; launched again it goes on."""
  production = Production(tmp_path)
  production.wait_for(30)
  told = [sys.executable, "-m", "stages.cli", "prod", "stop", production.run_id()]
  subprocess.run([*told, "--root", str(production.root)], check=True, cwd=REPO)
  code, out = production.end()
  assert code == 0 and "stopped: it was told to leave" in out
  production.process = production.start()
  assert production.end()[0] == 0
  check_equal(production, undisturbed)


def test_a_second_launch_is_refused(tmp_path, undisturbed):
  """It names who holds the run; the first is undisturbed."""
  production = Production(tmp_path)
  production.wait_for(30)
  second = production.start()
  out, _ = second.communicate(timeout=30 * SLACK)
  assert second.returncode == 1
  pattern = (
    rf"launched already by \S+ pid {production.process.pid} \(attempt 1, heartbeat \d+ s ago"
  )
  assert re.search(pattern, " ".join(out.split())), out
  assert production.end()[0] == 0
  check_equal(production, undisturbed)


def test_a_killed_launch(tmp_path, undisturbed):
  """kill -9 of the command: agent and ranks end with it; the same command goes on."""
  production = Production(tmp_path)
  production.wait_for(30)
  run = production.run_id()
  production.process.kill()
  wait_until(lambda: not ranks_of(run), 10, "no rank is left")
  production.process = production.start()
  assert production.end()[0] == 0
  check_equal(production, undisturbed)
