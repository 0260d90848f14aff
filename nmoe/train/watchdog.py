"""The deadline of whatever a run does: a hang ends the process, with the stacks of its threads.

A process that is stopped, or waits for its disk, can do nothing; the others wait for it in the same
state, or the next, and end at their deadline:

  starting, loading    START_S
  stepping             hang_s, and (20 + log_every) steps, but LEAST_S at least
  evaluating           hang_s, each batch of it
  saving, stopping     hang_s, or SAVES times what this process saw a checkpoint take, if that is
                       more; SAVE_S, if that is more than hang_s, until it saw one
  profiling            hang_s, or SAVE_S, if that is more, to write a profile
"""

from __future__ import annotations

import faulthandler
import statistics
from collections import deque

from nmoe.train.progress import Progress

START_S = 1800.0  # to start and to load
SAVE_S = 900.0  # the first checkpoint, or to leave before it
SAVES = 3.0  # of the longest so far
LEAST_S = 60.0  # a step


def no_longer_than(seconds: float) -> None:
  """End this process, with the stacks of its threads in its log, unless this is called again within
  `seconds`: a hang in a kernel, a collective or Python ends the run, and a launcher may restart it.
  """
  faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def limit(state: str, hang_s: float, step_s: float, log_every: int, save_s: float = 0.0) -> float:
  """Seconds that a run may be in a state of nmoe.records.heartbeat.STATES, or in one step.

  step_s: the median of what a step took so far, save_s: the longest that a checkpoint did; 0: none
  is known. The host waits for the device at logs only, so a step may take all since the last, and a
  save waits for the one before.
  """
  if state in ("starting", "loading"):
    return START_S
  if state == "profiling":
    return max(hang_s, SAVE_S)
  if state in ("saving", "stopping"):
    return max(hang_s, SAVES * save_s if save_s else SAVE_S)
  if state == "evaluating" or step_s == 0:
    return hang_s
  return min(hang_s, max(LEAST_S, (20 + log_every) * step_s))


class Watchdog:
  """Called at each change of state and each step; tells the run's state to its heartbeat."""

  def __init__(self, progress: Progress | None = None, hang_s: float = START_S, log_every: int = 1):
    self.progress, self.hang_s, self.log_every = progress or Progress(), hang_s, log_every
    self._steps: deque[float] = deque(maxlen=32)
    self._save_s = 0.0

  def enter(self, state: str) -> None:
    """The run is in `state` from now on, or begins another step."""
    step_s = statistics.median(self._steps) if self._steps else 0.0
    seconds = limit(state, self.hang_s, step_s, self.log_every, self._save_s)
    no_longer_than(seconds)
    self.progress.enter(state, seconds)

  def saved(self, seconds: float) -> None:
    """A checkpoint was written, in so many seconds."""
    self._save_s = max(self._save_s, seconds)

  def measured(self, step_s: float) -> None:
    """Steps since the last log took this long each."""
    self._steps.append(step_s)
