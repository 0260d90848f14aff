"""The command that is told of events: each once, in order, also after a restart."""

import json
import threading
import time

import pytest

from nmoe.errors import RecordError
from nmoe.records.attempts import Attempts
from nmoe.records.root import Root
from stages.launch import notify


def test_each_event_is_told_once(lab, tmp_path):
  run, told = lab.record(), tmp_path / "told"
  command = f"cat >> {told}; echo >> {told}"
  records = Attempts(lab.root)
  records.event(run, 1, "launch", step=3, detail={"x": 1})
  assert notify.deliver(lab.root, run, command) == 1
  records.event(run, 1, "crashed", rank=1, host="a")
  assert notify.deliver(lab.root, run, "") == 0
  assert notify.deliver(lab.root, run, command) == 1
  assert notify.deliver(lab.root, run, command) == 0
  first, second = (json.loads(line) for line in told.read_text().splitlines())
  assert (first["kind"], first["step"], first["detail"]) == ("launch", 3, {"x": 1})
  assert (second["kind"], second["rank"], second["host"]) == ("crashed", 1, "a")
  records.close()


def test_a_command_that_fails_is_said_and_not_called_again(lab, capsys):
  run = lab.record()
  records = Attempts(lab.root)
  records.event(run, 1, "launch")
  records.close()
  assert notify.deliver(lab.root, run, "echo no mail >&2; exit 3") == 1
  assert "ended with 3: no mail" in capsys.readouterr().err
  assert notify.deliver(lab.root, run, "exit 3") == 0


def test_events_are_told_while_a_host_runs(lab, tmp_path, monkeypatch):
  monkeypatch.setattr(notify, "EVERY_S", 0.05)
  run, told = lab.record(), tmp_path / "told"
  records = Attempts(lab.root)
  with notify.telling(lab.root, run, f"cat > {told}"):
    records.event(run, 1, "stop", step=4)
    deadline = time.monotonic() + 30
    while not (told.exists() and told.read_text()):
      assert time.monotonic() < deadline
      time.sleep(0.05)
  assert json.loads(told.read_text())["kind"] == "stop"
  records.close()


@pytest.mark.faults
@pytest.mark.parametrize("error", [RecordError("locked"), OSError(28, "full")], ids=str)
def test_records_that_cannot_be_read_for_a_moment_end_no_alerts(lab, monkeypatch, capsys, error):
  """As while another process writes, or a disk is full."""
  monkeypatch.setattr(notify, "EVERY_S", 0.01)
  calls, went_on = [], threading.Event()

  def deliver(*_):
    calls.append(1)
    if len(calls) == 1:
      raise error
    went_on.set()

  monkeypatch.setattr(notify, "deliver", deliver)
  with notify.telling(lab.root, "run", "true"):
    assert went_on.wait(10)
  assert str(error) in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize("left", ["", "many"])
def test_a_count_that_a_kill_left_half_written(lab, tmp_path, left):
  """No event is lost and none ends the run: all are told once more."""
  run, told = lab.record(), tmp_path / "told"
  records = Attempts(lab.root)
  for step in (1, 2):
    records.event(run, 1, "stop", step=step)
  records.close()
  assert notify.deliver(lab.root, run, "true") == 2
  (Root(lab.root).prod(run) / "notified").write_text(left)
  assert notify.deliver(lab.root, run, f"cat >> {told}; echo >> {told}") == 2
  assert len(told.read_text().splitlines()) == 2
