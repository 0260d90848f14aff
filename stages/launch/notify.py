"""The command that is told of a production run's events (prod.notify): one call an event.

It gets the event as JSON on its standard input. What was delivered is counted beside the run, so a
restart tells nothing twice; a command that fails is said in the log and not called again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from nmoe import files
from nmoe.errors import RecordError
from nmoe.records.attempts import History
from nmoe.records.root import Root

EVERY_S = 5.0
PATIENCE_S = 60.0  # with a command


def deliver(root: Path, run_id: str, command: str) -> int:
  """Tell of all events since the last call; how many."""
  if not command:
    return 0
  told = Root(root).prod(run_id) / "notified"
  count = _delivered(told)
  with closing(History(root)) as records:
    events = records.events(run_id)[count:]
  for number, event in enumerate(events, start=count + 1):
    told.parent.mkdir(parents=True, exist_ok=True)
    files.replace(told, str(number))
    _tell(command, json.dumps(asdict(event)))
  return len(events)


def _delivered(told: Path) -> int:
  """How many events the command knows; 0 if the count cannot be read: they are told again."""
  try:
    return int(told.read_text())
  except (FileNotFoundError, ValueError):
    return 0


def _tell(command: str, text: str) -> None:
  try:
    done = subprocess.run(
      command, shell=True, input=text, text=True, capture_output=True, timeout=PATIENCE_S
    )
  except subprocess.TimeoutExpired:
    sys.stderr.write(f"prod.notify: {command!r} took more than {PATIENCE_S:g} s: {text}\n")
    return
  if done.returncode != 0:
    sys.stderr.write(f"prod.notify: {command!r} ended with {done.returncode}: {done.stderr}\n")


@contextmanager
def telling(root: Path, run_id: str, command: str) -> Iterator[None]:
  """While the block runs, events are delivered every EVERY_S."""
  ended = threading.Event()

  def watch() -> None:
    while not ended.wait(EVERY_S):
      try:
        deliver(root, run_id, command)
      except (RecordError, OSError) as error:
        sys.stderr.write(f"prod.notify: {error}; it is told later\n")

  thread = threading.Thread(target=watch, daemon=True)
  if command:
    thread.start()
  try:
    yield
  finally:
    ended.set()
    if command:
      thread.join(PATIENCE_S)
