"""What a production run is doing now, and whether somebody is to be woken: one answer for all who
show it.
"""

from __future__ import annotations

import time
import tomllib

from nmoe.records.goodput import Account, trains
from nmoe.records.launches import START_S, Launch

HEALTHY, UNKNOWN, SICK = 0, 1, 2  # exit statuses of `nmoe prod status --check`
AGAIN = 75  # the exit status of an attempt that is to be queued again


def ago(when: float) -> str:
  """How long something is past, in words. Clocks of hosts differ, and a clock can step back."""
  seconds = time.time() - when
  if seconds <= -1:
    return f"{-seconds:,.0f} s ahead of this clock"
  for least, unit, digits, name in (
    (172_800, 86_400, 1, "d"),
    (5400, 3600, 1, "h"),
    (90, 60, 0, "min"),
  ):
    if seconds >= least:
      return f"{seconds / unit:.{digits}f} {name} ago"
  return f"{abs(seconds):.0f} s ago"


def _aged(when: float, most_s: float) -> int:
  """Of a sign that may be as old as most_s; one that is as far ahead tells nothing of now."""
  age_s = time.time() - when
  return UNKNOWN if age_s < -most_s else HEALTHY if age_s <= most_s else SICK


def replacing(found: Account) -> Launch | None:
  """The launch that lives while its run has no ranks, or ranks that do not train yet."""
  if trains(found.run, found.heartbeat):
    return None
  return found.launch if found.run.live else None


def state(found: Account) -> str:
  """Of a run that is not over, in words: what its ranks do, or since when it has none."""
  launch, beat = replacing(found), found.heartbeat
  if launch is not None:
    which = f"attempt {launch.attempt}" + f", restart {launch.restarts}" * bool(launch.restarts)
    when = time.strftime("%H:%M:%S", time.gmtime(launch.since))
    return f"{which}, since {when} UTC, {ago(launch.since)}"
  if found.run.status == "running" and beat is not None:
    return beat.state
  if submitted(found):
    return f"the next attempt is {tomllib.loads(found.run.toml)['launch']['engine']}'s to begin"
  if abandoned(found):
    return (
      f"attempt {found.last.number} is open and nobody keeps it up; "
      "`nmoe prod launch` goes on with it"
    )
  if queued(found):
    return f"the next attempt is {found.last.engine}'s to begin"
  return "" if found.run.status != "interrupted" else "`nmoe prod launch` goes on with it"


def status(found: Account) -> str:
  """The run's, in a word: "restarting" also while new ranks load."""
  launch = replacing(found)
  if launch is not None:
    return launch.status
  if submitted(found):
    return "queued"
  last = found.last
  left = last is not None and found.run.status == "interrupted" and last.outcome
  return last.outcome if left or queued(found) else found.run.status


def health(found: Account, stale_s: float) -> int:
  """What a monitor is told. A run that is over is healthy, and so is one whose launch replaces its
  ranks, for START_S. One that failed is sick, and one that is silent for longer than stale_s and
  than its state may last (Heartbeat.limit_s), or whose launch is gone: at once on the local engine,
  for longer than stale_s on another, which may begin the next attempt. Of a stopped or a queued one
  nobody can tell, nor by a sign that a clock wrote which is far ahead.
  """
  launch, beat, run = replacing(found), found.heartbeat, found.run
  if run.status == "completed":
    return HEALTHY
  if launch is not None:
    return _aged(launch.since, START_S)
  if run.status == "running" and beat is not None:
    return _aged(beat.time, max(stale_s, beat.limit_s))
  if submitted(found):
    return UNKNOWN
  if abandoned(found) and run.status == "interrupted":
    engine, since = found.last.engine, beat.time if beat is not None else 0.0
    return SICK if engine == "local" or time.time() - since > stale_s else UNKNOWN
  return SICK if run.status == "failed" and not queued(found) else UNKNOWN


def submitted(found: Account) -> bool:
  """Whether a job was handed to an engine of many hosts whose attempt has not begun yet."""
  following = found.last.number + 1 if found.last is not None else 1
  jobs = (event.detail for event in found.events if event.kind == "submit")
  return not found.run.live and any(job.get("for_attempt") == following for job in jobs)


def abandoned(found: Account) -> bool:
  """Whether an attempt is under way by the records, and in truth nobody is there."""
  last = found.last
  return last is not None and not last.outcome and found.run.status in ("interrupted", "failed")


def queued(found: Account) -> bool:
  """Whether a scheduler is to begin the next attempt: when, it alone knows."""
  last = found.last
  if last is None or last.engine == "local" or found.run.live or last.exit != AGAIN:
    return False
  return last.outcome != "disk full"
