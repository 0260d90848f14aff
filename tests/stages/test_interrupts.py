"""Ctrl-C and SIGTERM of any command: 128 + the signal, and what it changed is as it was."""

import os
import signal

import pytest
from typer.testing import CliRunner

from stages import show
from stages.cli import app
from stages.prod import launching

pytestmark = pytest.mark.faults


OTHERWISE = {"launch": 75}  # a supervisor launches it again, whenever it was told to leave


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize(
  ("module", "name", "words"),
  [(show, "plan", ["plan"]), (launching, "launch", ["prod", "launch"])],
  ids=["plan", "launch"],
)
def test_a_signal_ends_a_command_with_its_status_and_no_word(
  lab, monkeypatch, number, module, name, words
):
  before, cleaned = signal.getsignal(signal.SIGTERM), []

  def sent(*_: object) -> None:
    try:
      os.kill(os.getpid(), number)
      signal.pause()
    finally:
      cleaned.append(number)

  monkeypatch.setattr(module, name, sent)
  done = CliRunner().invoke(app, [*words, str(lab.file)])
  assert (done.exit_code, done.output.strip()) == (OTHERWISE.get(name, 128 + number), "")
  assert cleaned == [number] and signal.getsignal(signal.SIGTERM) is before
