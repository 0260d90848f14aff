"""Ctrl-C and SIGTERM end a command alike: what is under way is saved or removed. The exit status
says which of them it was, as shells expect: 128 + the signal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
  """A SIGTERM."""


@contextmanager
def interruptible() -> Iterator[None]:
  """A SIGTERM is an interrupt meanwhile; in a thread that takes no signals nothing changes."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = signal.signal(signal.SIGTERM, _raise)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)


def status(cause: BaseException | None) -> int:
  """The exit status of a command that this ended, by itself or as the cause of its error."""
  if not isinstance(cause, KeyboardInterrupt):
    return 1
  return 128 + (signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT)


def _raise(*_: object) -> None:
  raise Terminated
