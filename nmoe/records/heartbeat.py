"""The file by which a production run says that it lives: `{root}/runs/RUN/heartbeat.json`.

Rank 0 rewrites it at each log, each change of state and, between them, at a step every few seconds.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from nmoe import files
from nmoe.errors import RecordError

STATES = ("starting", "loading", "stepping", "saving", "evaluating", "profiling", "stopping")


class Entry(NamedTuple):
  """A logged step: training loss in nats, the rate since the last one, the time to the end. A rate
  of 0 means that no step was logged yet. Without a loss it is a batch of an evaluation.
  """

  step: int
  total: int
  loss: float | None
  tokens_per_s: float
  left_s: float

  def __str__(self) -> str:
    if self.tokens_per_s == 0:
      return "no step logged yet"
    rate = f"{self.tokens_per_s:,.0f} tokens/s"
    if self.step < self.total:
      rate += f"  {timedelta(seconds=round(self.left_s))} left"
    if self.loss is None:
      return f"batch {self.step:,}/{self.total:,}  {rate}"
    return f"step {self.step}/{self.total}  loss {self.loss:.4f}  {rate}"


class Heartbeat(NamedTuple):
  """What the file says: the newest logged step, when and by whom it was written, one of STATES and
  the seconds that it may last (nmoe.train.watchdog).
  """

  entry: Entry
  time: float  # seconds since 1970
  host: str
  pid: int
  attempt: int
  state: str = "stepping"
  limit_s: float = 0.0

  @classmethod
  def read(cls, path: Path) -> Heartbeat | None:
    """None if no rank has started yet, or a loss of power left the file empty. RecordError if it is
    no heartbeat.
    """
    try:
      text = path.read_text()
      if not text.strip("\0"):
        return None
      found = json.loads(text)
      return cls(Entry(**found.pop("entry")), **found)
    except FileNotFoundError:
      return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise RecordError(
        f"{path}: no heartbeat ({type(error).__name__}: {error}); delete it: the next log "
        "of rank 0 writes it again"
      ) from error

  def write(self, path: Path) -> None:
    """A reader finds this one or the one before, never a part."""
    files.replace(path, json.dumps(self._asdict() | {"entry": self.entry._asdict()}))
