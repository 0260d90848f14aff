"""Where the time of a production run went: `production(root, run_id)`, all that its pages show.

The wall from the first launch to now, or to the end, is cut into spans one after the other, so they
sum to it. Only steps of the final lineage count as stepping: what a restart computes again was lost
the first time. Goodput is their share of the wall; ETTR (effective training time ratio) the same of
the time that was not queued.

starting, compiling, loading   of every start of the ranks, as they measured it
lost steps                     after the checkpoint of the restart, to the last sign of life
hang wait                      from there until ranks start again, or the attempt ends
save stall                     the steps' waits for checkpoints; the last write of an attempt
queued, stopped                between attempts: the engine had yet to start one, or nobody asked
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nmoe.records import metrics
from nmoe.records.attempts import Attempt, Event, History
from nmoe.records.heartbeat import Heartbeat
from nmoe.records.launches import Launch
from nmoe.records.live import Logged
from nmoe.records.metrics import Timed
from nmoe.records.reader import Amendment, Link, Run
from nmoe.records.root import Root

BUCKETS = (
  "stepping",
  "save stall",
  "eval",
  "lost steps",
  "hang wait",
  "starting",
  "compiling",
  "loading",
  "queued",
  "stopped",
)
STARTUP = {  # of the phases before the first step
  "imports": "starting",
  "kernels": "compiling",
  "ranks_and_data": "starting",
  "model": "loading",
}
STARTS = ("launch", "restart")  # the events with which ranks begin to train
LOGGED = ("checkpoint/stall_s", "time/eval_s", "train/loss")  # the tags that an account reads
LEFT = ("completed", "stopped", "preempted", "amended")  # outcomes of attempts that saved and left


@dataclass(frozen=True)
class Span:
  """Seconds since 1970. The spans of "stepping" hold the save stalls and evaluations in them."""

  bucket: str
  begin: float
  end: float
  attempt: int

  @property
  def seconds(self) -> float:
    return self.end - self.begin


@dataclass(frozen=True)
class Account:
  """The wall of a run as it stands; `seconds` by bucket of BUCKETS, which sum to `wall_s`."""

  run: Run
  attempts: list[Attempt]
  events: list[Event]
  checkpoints: list[int]  # steps
  heartbeat: Heartbeat | None
  launch: Launch | None
  spans: list[Span]
  seconds: dict[str, float]
  step: int  # the last that is logged
  tokens: int  # trained by then
  total_tokens: int

  @property
  def last(self) -> Attempt | None:
    """The newest attempt; None: none has begun."""
    return self.attempts[-1] if self.attempts else None

  @property
  def wall_s(self) -> float:
    return self.spans[-1].end - self.spans[0].begin if self.spans else 0.0

  @property
  def goodput(self) -> float:
    return self.seconds["stepping"] / self.wall_s if self.spans else 0.0

  @property
  def ettr(self) -> float:
    busy = self.wall_s - self.seconds["queued"]
    return self.seconds["stepping"] / busy if busy > 0 else 0.0

  @property
  def failures(self) -> int:
    """Restarts of the ranks, and attempts that ended without having saved."""
    over = [a for a in self.attempts if a.outcome or a is not self.last]
    lost = sum(a.outcome in ("crashed", "no progress", "") for a in over)
    return lost + sum(event.kind == "restart" for event in self.events)

  @property
  def mttf_s(self) -> float | None:
    """Mean time to failure of what ran, between attempts aside; None: there was no failure."""
    ran = self.wall_s - self.seconds["queued"] - self.seconds["stopped"]
    return ran / self.failures if self.failures else None

  @property
  def left_s(self) -> float | None:
    """To the end, at the pace so far with all losses but the time between attempts; None: not known
    or over.
    """
    if not self.run.live or self.tokens == 0:
      return None
    busy = self.wall_s - self.seconds["queued"] - self.seconds["stopped"]
    return (self.total_tokens - self.tokens) * busy / self.tokens


@dataclass(frozen=True)
class Production(Account):
  """A production run: its account, and what its record says beside."""

  amendments: list[Amendment]
  evidence: list[Link]  # from experiments to the run's own
  artifacts: dict[str, str]  # path -> SHA-256


def production(root: Path, run_id: str, now: float | None = None) -> Production:
  """What the records of a run say. Reads only. RecordError: no such run.

  now: seconds since 1970, to which a live run is counted.
  """
  with closing(History(root)) as records:
    run = records.run(run_id)
    attempts, events = records.attempts(run_id), records.events(run_id)
    links = [one for one in records.links(run.origin) if one.to_id == run.origin]
    artifacts = records.artifacts(run_id)
  logged = metrics.timed(root, run_id, LOGGED)
  found = account(root, run, attempts, events, logged, now)
  beside = {"amendments": list(run.amendments), "evidence": links, "artifacts": artifacts}
  return Production(**vars(found), **beside)


def trains(run: Run, beat: Heartbeat | None) -> bool:
  """Whether a run has ranks that are through with their start."""
  return run.status == "running" and (beat is None or beat.state not in ("starting", "loading"))


def account(
  root: Path,
  run: Run,
  attempts: list[Attempt],
  events: list[Event],
  logged: Mapping[str, Timed | Logged],
  now: float | None = None,
) -> Account:
  """The same of records and metrics that were read before. logged: the rows of LOGGED."""
  beat = Heartbeat.read(Root(root).heartbeat(run.id))
  steps = Root(root).checkpoint_steps(run.id)
  launch = Launch.read(root, run.id)
  end = (time.time() if now is None else now) if run.live else _ended(attempts, beat)
  newest, up = steps[-1] if steps else 0, trains(run, beat)
  line = _Line(attempts, events, _saved(logged), newest, beat, launch, run.live, up, end)
  spans = line.spans()
  losses = logged.get("train/loss")
  return Account(
    run=run,
    attempts=attempts,
    events=events,
    checkpoints=steps,
    heartbeat=beat,
    launch=launch,
    spans=spans,
    seconds=_seconds(spans, logged),
    step=int(losses.step[-1]) if losses is not None else 0,
    tokens=int(losses.tokens[-1]) if losses is not None else 0,
    total_tokens=tomllib.loads(run.toml).get("schedule", {}).get("total_tokens", 0),
  )


def _saved(logged: Mapping[str, Timed | Logged]) -> dict[int, float]:
  """Step -> when its checkpoint had been copied."""
  if "checkpoint/stall_s" not in logged:
    return {}
  rows = logged["checkpoint/stall_s"]
  return dict(zip(rows.step.tolist(), rows.time.tolist(), strict=True))


def _ended(attempts: Sequence[Attempt], beat: Heartbeat | None) -> float:
  """Of a run that is not live: the end of its last attempt, or its last sign."""
  last = [attempts[-1].ended or attempts[-1].started] if attempts else [0.0]
  if beat is not None and attempts and not attempts[-1].ended:
    last.append(beat.time)
  return max(last)


def _seconds(spans: Sequence[Span], logged: Mapping[str, Timed | Logged]) -> dict[str, float]:
  """By bucket; what checkpoints and evaluations took is no longer stepping."""
  found = dict.fromkeys(BUCKETS, 0.0)
  for span in spans:
    found[span.bucket] += span.seconds
  for bucket, tag in (("save stall", "checkpoint/stall_s"), ("eval", "time/eval_s")):
    rows = logged.get(tag)
    taken = min(float(np.sum(rows.value)) if rows is not None else 0.0, found["stepping"])
    found[bucket] += taken
    found["stepping"] -= taken
  return found


@dataclass
class _Line:
  """The wall, filled from its begin on. saved: step -> when; newest: the last checkpoint's step;
  up: its ranks train.
  """

  attempts: Sequence[Attempt]
  events: Sequence[Event]
  saved: dict[int, float]
  newest: int
  beat: Heartbeat | None
  launch: Launch | None
  live: bool
  up: bool
  end: float
  found: list[Span] = field(default_factory=list)
  at: float = 0.0

  def spans(self) -> list[Span]:
    if not self.attempts:
      return []
    begun = [e.time for e in self.events if e.kind == "submit"] + [self.attempts[0].started]
    self.at = min(begun)
    before, lives = None, [e for e in self.events if e.kind in STARTS]
    for attempt in self.attempts:
      self._to(attempt.started, _between(before), attempt.number)
      self._attempt(attempt, lives)
      before = attempt
    return self.found

  def _to(self, when: float, bucket: str, attempt: int) -> None:
    """All until `when` that is not filled yet."""
    when = min(when, self.end)
    if when > self.at:
      self.found.append(Span(bucket, self.at, when, attempt))
      self.at = when

  def _attempt(self, attempt: Attempt, lives: list[Event]) -> None:
    last, number = attempt is self.attempts[-1], attempt.number
    for i, life in enumerate(lives):
      if life.attempt == number:
        self._life(life, lives[i + 1 :], attempt)
    if last and self.live:
      began = any(life.attempt == number for life in lives)
      bucket = "starting" if not began else "stepping" if self.up else "hang wait"
      self._to(self.end, bucket, number)
    elif attempt.ended:
      began = any(life.attempt == number for life in lives)
      left = "save stall" if began else "starting"
      self._to(attempt.ended, left if attempt.outcome in LEFT else "hang wait", number)

  def _life(self, life: Event, later: list[Event], attempt: Attempt) -> None:
    """From before its processes started to its last sign."""
    number, startup = life.attempt, life.detail.get("startup", {})
    first = not any(span.attempt == number and span.bucket == "stepping" for span in self.found)
    birth = life.time - sum(startup.values())
    self._to(birth, "starting" if first else "hang wait", number)
    for phase, bucket in STARTUP.items():
      birth += startup.get(phase, 0.0)
      self._to(birth, bucket, number)
    self._to(life.time, "loading", number)
    if not later and self.up:
      return
    if not later and attempt.outcome == "completed":
      self._to(max(self.saved.values(), default=attempt.ended), "stepping", number)
      return
    self._to(self._kept(life, later), "stepping", number)
    sign = later[0].detail.get("reached_at", 0.0) if later else self._last_sign(number)
    if attempt.outcome not in LEFT or (later and later[0].attempt == number):
      self._to(sign, "lost steps", number)

  def _last_sign(self, attempt: int) -> float:
    """Of ranks after which none trained: their heartbeat, unless those that start have written it
    since.
    """
    signs = [self.beat.time] if self.beat else []
    if self.launch is not None and self.launch.attempt == attempt and self.launch.lost:
      signs.append(self.launch.lost)
    return min(signs, default=0.0)

  def _kept(self, life: Event, later: list[Event]) -> float:
    """When a life had the last step that belongs to the final lineage."""
    step = min((other.step for other in later), default=self.newest)
    times = [when for at, when in self.saved.items() if life.step < at <= step]
    return max(times, default=life.time)


def _between(before: Attempt | None) -> str:
  """What the time after an attempt is, until the next one: or before the first."""
  if before is None:
    return "queued"
  killed = not before.outcome and before.engine == "local"
  return (
    "queued"
    if before.outcome in ("crashed", "preempted", "amended", "") and not killed
    else "stopped"
  )
