"""Ranks that are stopped hear no deadline: their agent misses the sign of rank 0."""

import json
import os
import socket
import time

import pytest

from nmoe.records.heartbeat import Entry, Heartbeat
from nmoe.train.progress import Progress
from stages.launch.agent import MISSED_S, Pulse

ENTRY = Entry(7, 9, 2.0, 3.0, 4.0)


@pytest.fixture
def clock(monkeypatch):
  """The seconds that every clock of ours says."""
  at = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: at[0])
  return at


def beat(path, limit_s=20.0, host=None, pid=7, at=0.0, step=7):
  told = (at, host or socket.gethostname(), pid, 1, "stepping", limit_s)
  Heartbeat(ENTRY._replace(step=step), *told).write(path)


@pytest.mark.faults
def test_a_silent_rank_is_missed_after_its_own_deadline(tmp_path, clock):
  """Whatever the clock of the heartbeat says: a sign is another text than the one before."""
  path = tmp_path / "heartbeat.json"
  pulse = Pulse(path)
  assert pulse.missed_s([7]) == 0
  for n in range(50):  # it lives, by a clock that steps back
    beat(path, at=-100.0 * n)
    clock[0] += 19.0 + MISSED_S
    assert pulse.missed_s([7]) == 0
  clock[0] += 20.0 + MISSED_S
  assert pulse.missed_s([7]) == 0
  clock[0] += 1.0
  assert pulse.missed_s([7]) == 21.0 + MISSED_S
  beat(path, limit_s=900.0, step=8)  # it saves
  clock[0] += 800.0
  assert pulse.missed_s([7]) == 0


@pytest.mark.faults
@pytest.mark.parametrize("other", [{"pid": 8}, {"host": "another"}, None])
def test_the_sign_of_others_is_not_waited_for(tmp_path, clock, other):
  """Of ranks before a restart, of another host; and a file that is no heartbeat."""
  path = tmp_path / "heartbeat.json"
  beat(path, **other) if other else path.write_text(json.dumps("no"))
  pulse = Pulse(path)
  pulse.missed_s([7])
  clock[0] += 1e6
  assert pulse.missed_s([7]) == 0


@pytest.mark.faults
def test_steps_between_two_logs_are_signs(tmp_path, clock):
  """However seldom a run logs; and a longer limit is told at once."""
  path = tmp_path / "heartbeat.json"
  progress, pulse = Progress(None, path, 1), Pulse(path)
  progress.enter("stepping", 20.0)
  for _ in range(1000):
    clock[0] += 4.0
    progress.enter("stepping", 20.0)
    assert pulse.missed_s([os.getpid()]) == 0
  progress.enter("stepping", 60.0)
  clock[0] += 60.0
  assert pulse.missed_s([os.getpid()]) == 0
  assert Heartbeat.read(path).limit_s == 60.0
