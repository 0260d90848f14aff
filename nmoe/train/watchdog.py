"""The deadline of whatever a run does: a hang ends the process, with the stacks of its threads."""

from __future__ import annotations

import faulthandler
import statistics
from collections import deque

from nmoe.train.progress import Progress

START_S = 1800.0  # to start and to load
SAVE_S = 900.0  # a checkpoint, or to leave
LEAST_S = 60.0  # a step
LIMITS = {"starting": START_S, "loading": START_S, "saving": SAVE_S, "stopping": SAVE_S}


def no_longer_than(seconds: float) -> None:
  """End this process, with the stacks of its threads in its log, unless this is called again within
  `seconds`: a hang in a kernel, a collective or Python ends the run, and a launcher may restart it.
  """
  faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def limit(state: str, hang_s: float, step_s: float, log_every: int) -> float:
  """Seconds that a run may be in a state of nmoe.records.heartbeat.STATES, or in one step.

  step_s: the median of what a step took so far, 0: none is known. hang_s: of any step or
  evaluation. The host waits for the device at logs only, so a step may take all since the last.
  """
  if state in LIMITS:
    return LIMITS[state]
  if state == "evaluating" or step_s == 0:
    return hang_s
  return min(hang_s, max(LEAST_S, (20 + log_every) * step_s))


class Watchdog:
  """Called at each change of state and each step; tells the run's state to its heartbeat."""

  def __init__(self, progress: Progress | None = None, hang_s: float = START_S, log_every: int = 1):
    self.progress, self.hang_s, self.log_every = progress or Progress(), hang_s, log_every
    self._steps: deque[float] = deque(maxlen=32)

  def enter(self, state: str) -> None:
    """The run is in `state` from now on, or begins another step."""
    step_s = statistics.median(self._steps) if self._steps else 0.0
    seconds = limit(state, self.hang_s, step_s, self.log_every)
    no_longer_than(seconds)
    self.progress.enter(state, seconds)

  def measured(self, step_s: float) -> None:
    """Steps since the last log took this long each."""
    self._steps.append(step_s)
