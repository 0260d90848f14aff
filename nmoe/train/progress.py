"""What a rank tells of its progress while it runs: messages to its launcher, lines in its log.

The launcher reads messages from a pipe of their own, never from standard output. Does not import
torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

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


class Progress:
  """Messages through the descriptor `fd`, of a pipe; None: nobody listens.

  A full pipe loses messages: a launcher that was stopped (Ctrl-Z) stops no rank.
  """

  def __init__(self, fd: int | None = None):
    self.fd = fd
    self._line = -LINE_S
    if fd is not None:
      os.set_blocking(fd, False)

  def log(self, entry: Entry, *, tell: bool) -> bool:
    """Write the entry into the log, if the last line is old, and tell the launcher if `tell`.

    False if the launcher is gone.
    """
    now = time.monotonic()
    if now - self._line >= LINE_S or entry.step == entry.total:
      sys.stderr.write(f"{entry}\n")
      sys.stderr.flush()
      self._line = now
    return self.tell(entry._asdict()) if tell else True

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
