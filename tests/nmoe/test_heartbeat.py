"""What a rank tells of itself: the heartbeat, whatever the disk does, and the stacks of a hang."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nmoe.errors import RecordError
from nmoe.train.progress import Entry, Heartbeat, Progress


def test_a_heartbeat_is_whole_and_a_request_is_seen(tmp_path):
  path = tmp_path / "heartbeat.json"
  assert Heartbeat.read(path) is None
  progress = Progress(None, path, 3)
  entry = Entry(1, 9, 2.0, 3.0, 4.0)
  assert progress.log(entry, tell=True)
  beat = Heartbeat.read(path)
  assert beat.entry == entry and beat.attempt == 3 and abs(beat.time - time.time()) < 60
  (tmp_path / "stop").touch()
  assert not progress.log(entry, tell=True)
  (tmp_path / "stop").unlink()
  beat._replace(attempt=4).write(path)
  assert not progress.log(entry, tell=True)  # a newer attempt has begun: it is left alone
  assert Heartbeat.read(path).attempt == 4
  beat.write(path)
  (tmp_path / "stop").touch()
  assert progress.log(entry, tell=False)  # rank 0 hears it for all


@pytest.mark.faults
@pytest.mark.parametrize(
  "left", ["", "\0" * 400, '{"entry": {"st', "[]"], ids=("empty", "zeros", "cut", "other")
)
def test_a_heartbeat_that_a_loss_of_power_left(tmp_path, left):
  """Empty, of zeros, or cut: new ranks write it anew, and who only asks sees none or says so."""
  path = tmp_path / "heartbeat.json"
  path.write_text(left)
  if left.strip("\0"):
    with pytest.raises(RecordError, match="no heartbeat"):
      Heartbeat.read(path)
  else:
    assert Heartbeat.read(path) is None
  progress = Progress(None, path, 3)
  progress.enter("starting", 60.0)
  assert progress.before is None and Heartbeat.read(path).state == "starting"
  path.write_text(left)
  assert progress.log(Entry(1, 9, 2.0, 3.0, 4.0), tell=True)
  assert Heartbeat.read(path).entry.step == 1


@pytest.mark.faults
def test_a_disk_that_is_full_for_a_moment_ends_no_run(tmp_path, monkeypatch):
  """Between a checkpoint that does not fit and the older one that gives way, a log comes: neither
  its line nor its sign can be written, and the run goes on.
  """
  path = tmp_path / "heartbeat.json"
  progress = Progress(None, path, 3)
  full = Path("/dev/full").open("w", buffering=1)
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stderr", full)
    patch.setattr(Heartbeat, "write", lambda self, _: full.write("no\n"))
    progress.enter("saving", 60.0)
    assert progress.log(Entry(1, 9, 2.0, 3.0, 4.0), tell=True)
    (tmp_path / "stop").touch()
    assert not progress.log(Entry(2, 9, 2.0, 3.0, 4.0), tell=True)  # a request is heard
  assert not path.exists()
  progress.enter("stepping", 60.0)
  assert Heartbeat.read(path).entry.step == 2


HANG = """
import sys, threading, time
from nmoe.train.watchdog import no_longer_than
for _ in range(3):
  no_longer_than(1.0)
  time.sleep(0.6)
print("three steps", flush=True)
def the_line_that_hangs(): threading.Event().wait()
the_line_that_hangs()
"""


def test_a_hang_ends_with_the_stacks():
  """Steps within the deadline go on; a hang leaves the stack and a status that is not 0."""
  done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stdout == "three steps\n"
  assert "the_line_that_hangs" in done.stderr and "Timeout" in done.stderr
