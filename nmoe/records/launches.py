"""The file by which a production run's launch says that it lives: `{root}/runs/RUN/launch.json`.

Heartbeats are of ranks (nmoe.records.heartbeat). While ranks that were lost are replaced there is
none; whoever replaces them speaks then: the command that begins an attempt, after it the agent of
the first host, every EVERY_S.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import NamedTuple

from nmoe import files
from nmoe.records import owner
from nmoe.records.root import Root

EVERY_S = 5.0
LIVES_S = 30.0  # who said nothing for so long on another host is gone
START_S = 1800.0  # hosts and ranks may take this long to start


class Launch(NamedTuple):
  """The attempt that is under way, when it began, when its ranks were lost last (0: never) and how
  often they were. Times are seconds since 1970. pid 0: a script began it, its agent is to come.
  """

  attempt: int
  began: float
  time: float
  host: str
  pid: int
  lost: float = 0.0
  restarts: int = 0

  @classmethod
  def read(cls, root: Path, run_id: str) -> Launch | None:
    """None if nobody launches the run, or the file is none of ours."""
    try:
      return cls(**json.loads(Root(root).launch(run_id).read_text()))
    except (OSError, ValueError, TypeError):
      return None

  def write(self, root: Path, run_id: str) -> bool:
    """False, and nothing is written, if a newer attempt has begun. Raises OSError."""
    known, path = Launch.read(root, run_id), Root(root).launch(run_id)
    if known is not None and known.attempt > self.attempt:
      return False
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(self._asdict()))
    return True

  @property
  def lives(self) -> bool:
    """Whether who wrote it is still there, as far as this host can tell."""
    age = time.time() - self.time
    if self.pid and self.host == socket.gethostname():
      written = time.strftime(owner.TIME_FORMAT, time.gmtime(self.time))
      return owner.lives(self.host, self.pid, written)
    return age < (LIVES_S if self.pid else START_S)

  @property
  def status(self) -> str:
    """Of a run that has no ranks now."""
    return "restarting" if self.lost or self.attempt > 1 else "starting"

  @property
  def since(self) -> float:
    """When it came to have no ranks."""
    return self.lost or self.began


def end(root: Path, run_id: str, attempt: int) -> None:
  """An attempt is over: nobody starts its ranks again."""
  found = Launch.read(root, run_id)
  if found is not None and found.attempt == attempt:
    Root(root).launch(run_id).unlink(missing_ok=True)
