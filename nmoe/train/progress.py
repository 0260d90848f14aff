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
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from nmoe import files

# exit statuses of a rank
INTERRUPTED = 75  # it was told to stop and can be resumed (EX_TEMPFAIL)
FAILED_FOR_GOOD = 76  # another try would end alike, as long as the cause stands
LINE_S = 20.0  # a log gets a line at least this often, as long as steps are logged


class Entry(NamedTuple):
  """A logged step: training loss in nats, the rate since the last one, the time to the end."""

  step: int
  total: int
  loss: float
  tokens_per_s: float
  left_s: float

  def __str__(self) -> str:
    left = timedelta(seconds=round(self.left_s))
    rate = f"{self.tokens_per_s:,.0f} tokens/s"
    return f"step {self.step}/{self.total}  loss {self.loss:.4f}  {rate}  {left} left"


class Heartbeat(NamedTuple):
  """What the file of a production run says: the newest entry, when and by whom it was written."""

  entry: Entry
  time: float  # seconds since 1970
  host: str
  pid: int
  attempt: int

  @classmethod
  def read(cls, path: Path) -> Heartbeat | None:
    """None if no step was logged yet."""
    try:
      found = json.loads(path.read_text())
    except FileNotFoundError:
      return None
    return cls(Entry(**found.pop("entry")), **found)

  def write(self, path: Path) -> None:
    """A reader finds this one or the one before, never a part."""
    files.replace(path, json.dumps(self._asdict() | {"entry": self.entry._asdict()}))


class Progress:
  """Messages through the descriptor `fd`, of a pipe; None: nobody listens.

  A full pipe loses messages: a launcher that was stopped (Ctrl-Z) stops no rank. heartbeat: a file
  for the newest entry of a production run's `attempt`; a file named "stop" beside it is a request.
  """

  def __init__(self, fd: int | None = None, heartbeat: Path | None = None, attempt: int = 0):
    self.fd, self.heartbeat, self.attempt = fd, heartbeat, attempt
    self._line = -LINE_S
    if fd is not None:
      os.set_blocking(fd, False)

  def log(self, entry: Entry, *, tell: bool) -> bool:
    """Write the entry into the log, if the last line is old, and tell the launcher if `tell`.

    False if the run is to stop: the launcher is gone, or asks for it.
    """
    now = time.monotonic()
    if now - self._line >= LINE_S or entry.step == entry.total:
      sys.stderr.write(f"{entry}\n")
      sys.stderr.flush()
      self._line = now
    if not tell:
      return True
    if self.heartbeat is not None:
      beat = Heartbeat(entry, time.time(), socket.gethostname(), os.getpid(), self.attempt)
      beat.write(self.heartbeat)
      if self.heartbeat.with_name("stop").exists():
        return False
    return self.tell(entry._asdict())

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
