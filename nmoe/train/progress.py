"""What a rank tells of its progress while it runs: messages to its launcher, lines in its log.

The launcher reads messages from a pipe of their own, never from standard output. Does not import
torch.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nmoe.errors import RecordError
from nmoe.records.heartbeat import Entry, Heartbeat
from nmoe.records.root import AMEND, STOP

# exit statuses of a rank
INTERRUPTED = 75  # it was told to stop and can be resumed (EX_TEMPFAIL)
FAILED_FOR_GOOD = 76  # another try would end alike, as long as the cause stands
LINE_S = 20.0  # a log gets a line at least this often, as long as steps are logged
BEAT_S = 5.0  # and the heartbeat a sign, as long as steps are begun


class Progress:
  """Messages through the descriptor `fd`, of a pipe; None: nobody listens.

  A full pipe loses messages: a launcher that was stopped (Ctrl-Z) stops no rank. heartbeat: a file
  for the newest entry and the state of a production run's `attempt`; a file STOP or AMEND beside
  it is a request. before: what the file said when this process began.
  """

  def __init__(self, fd: int | None = None, heartbeat: Path | None = None, attempt: int = 0):
    self.fd, self.heartbeat, self.attempt = fd, heartbeat, attempt
    self._line = -LINE_S
    self.before = self._read()
    self._entry = Entry(0, 0, 0.0, 0.0, 0.0) if self.before is None else self.before.entry
    self._state, self._limit_s, self._beaten = "", 0.0, 0.0
    if fd is not None:
      os.set_blocking(fd, False)

  def log(self, entry: Entry, *, tell: bool) -> bool:
    """Write the entry into the log, if the last line is old, and tell the launcher if `tell`.

    False if the run is to stop: the launcher is gone, or asks for it.
    """
    now = time.monotonic()
    if now - self._line >= LINE_S or entry.step == entry.total:
      _say(str(entry))
      self._line = now
    if not tell:
      return True
    if self.heartbeat is not None:
      self._entry = entry
      if not self._beat():
        return False
      if any(self.heartbeat.with_name(name).exists() for name in (STOP, AMEND)):
        return False
    return self.tell(entry._asdict())

  def enter(self, state: str, limit_s: float = 0.0) -> None:
    """The run is in one of nmoe.records.heartbeat.STATES from now on, as the launcher is told, or
    begins another step in it; for limit_s at most.
    """
    if state != self._state:
      self.tell({"state": state})
    told = state == self._state and limit_s <= self._limit_s
    self._state, self._limit_s = state, limit_s
    if not told or time.monotonic() - self._beaten >= BEAT_S:
      self._beat()

  def _beat(self) -> bool:
    """Write the file; False, and nothing, if it is a newer attempt's, which replaced this one."""
    if self.heartbeat is None:
      return True
    last = self._read()
    if last is not None and last.attempt > self.attempt:
      return False
    self._beaten = time.monotonic()
    said = (time.time(), socket.gethostname(), os.getpid(), self.attempt)
    try:
      self.heartbeat.parent.mkdir(parents=True, exist_ok=True)
      Heartbeat(self._entry, *said, self._state, self._limit_s).write(self.heartbeat)
    except OSError as error:  # such as of a disk on which a checkpoint takes all
      _say(f"{error}: nobody is told that the run lives")
    return True

  def _read(self) -> Heartbeat | None:
    """What the file says; None also for one that is none of ours: it is written anew."""
    try:
      return None if self.heartbeat is None else Heartbeat.read(self.heartbeat)
    except RecordError as error:
      _say(str(error))
      return None

  def tell(self, message: dict[str, Any]) -> bool:
    """Send a message of less than 4 KiB, which a pipe takes whole or not; False: launcher gone."""
    if self.fd is None:
      return True
    try:
      os.write(self.fd, (json.dumps(message) + "\n").encode())
    except BlockingIOError:
      return True
    except BrokenPipeError:
      return False
    return True


def _say(text: str) -> None:
  """A line in the log, if its disk has room."""
  with suppress(OSError):
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
