"""The attempts of a production run and what happened in them.

An attempt is one allocation: it begins when an engine starts the hosts and ends with an outcome.
Its number counts a run's attempts; the highest is the one that may write (a fencing token).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nmoe import files
from nmoe.errors import FencedError, RecordError
from nmoe.records import launches
from nmoe.records.experiments import Experiments
from nmoe.records.reader import Amendment, Reader, Run

KINDS = (
  *("submit", "launch", "restart", "stop", "override", "diverged", "refused", "crashed"),
  *("preempted", "no progress", "straggler", "hardware", "permanent", "bad step", "skip"),
  *("rewind", "amend", "amended", "corrupt", "pruned", "disk full", "code"),
)
ENDS = ("stop", "amended", "diverged", "refused", "disk full")  # of ranks that end an attempt
ADD_EVENT = "INSERT INTO events VALUES (?,?,?,?,?,?,?,?)"
OUTCOMES = (
  *("completed", "stopped", "preempted", "crashed", "diverged", "refused", "no progress"),
  *("superseded", "disk full", "amended"),
)


@dataclass(frozen=True)
class Attempt:
  """Times are seconds since 1970; `ended` is 0 and `outcome` "" while it is under way.

  first_step, last_step: of the newest checkpoint when it began and when it ended.
  """

  run_id: str
  number: int
  engine: str
  job_id: str
  nodes: list[str]
  commit: str
  started: float
  first_step: int
  last_step: int
  ended: float
  outcome: str
  exit: int


@dataclass(frozen=True)
class Event:
  """One of KINDS, at a step of an attempt."""

  run_id: str
  attempt: int
  time: float
  step: int
  kind: str
  rank: int
  host: str
  detail: dict[str, Any]


class History(Reader):
  """The records, with what production runs add; opened read-only."""

  def attempts(self, run_id: str) -> list[Attempt]:
    """Of a run, oldest first."""
    rows = self._read("SELECT * FROM attempts WHERE run_id = ? ORDER BY number", run_id)
    return [Attempt(**{**dict(row), "nodes": json.loads(row["nodes"])}) for row in rows]

  def following(self, run_id: str) -> int:
    """The number of the attempt that is to begin next."""
    return max((attempt.number for attempt in self.attempts(run_id)), default=0) + 1

  def events(self, run_id: str) -> list[Event]:
    """Of a run, oldest first."""
    rows = self._read("SELECT * FROM events WHERE run_id = ? ORDER BY rowid", run_id)
    return [Event(**{**dict(row), "detail": json.loads(row["detail"])}) for row in rows]

  def run(self, run_id: str) -> Run:
    """A run with its amendments, and with the code that it goes on under (event "code")."""
    found = super().run(run_id)
    codes = self._read("SELECT detail FROM events WHERE run_id = ? AND kind = 'code'", run_id)
    code = json.loads(codes[-1]["detail"])["code"] if codes else found.code_version
    return replace(found, amendments=tuple(self.amendments(run_id)), code_version=code)

  def amendments(self, run_id: str) -> list[Amendment]:
    """Of a run, in the order in which they take effect."""
    columns = "at_tokens, key, value, reason, who, time"
    sql = f"SELECT {columns} FROM amendments WHERE run_id = ? ORDER BY at_tokens, rowid"
    return [Amendment(**dict(row)) for row in self._read(sql, run_id)]

  def artifacts(self, run_id: str) -> dict[str, str]:
    """Path -> SHA-256 of what was generated for a run."""
    rows = self._read("SELECT path, sha256 FROM artifacts WHERE run_id = ? ORDER BY rowid", run_id)
    return {row["path"]: row["sha256"] for row in rows}


def check_newest(root: Path, run_id: str, attempt: int) -> None:
  """The fencing token: FencedError if a newer attempt of the run than `attempt` has begun.

  0 is a run without attempts, which nothing fences.
  """
  if attempt == 0:
    return
  with closing(History(root)) as records:
    newest = records.attempts(run_id)[-1]
  if newest.number > attempt:
    raise FencedError(
      f"attempt {attempt} of run {run_id} writes no more: attempt {newest.number} has begun on "
      f"{', '.join(newest.nodes)}"
    )


class Attempts(Experiments, History):
  """The same, opened for writing: by the commands and by rank 0."""

  def begin(
    self,
    run_id: str,
    *,
    engine: str,
    job_id: str,
    nodes: Sequence[str],
    commit: str,
    step: int,
    number: int = 0,
  ) -> int:
    """Record that an attempt begins at the checkpoint of `step`; its number, by default the next.

    RecordError if an attempt of this number or of a later one began before.
    """
    with self._writing() as db:
      last = db.execute("SELECT max(number) FROM attempts WHERE run_id = ?", (run_id,)).fetchone()
      following = (last[0] or 0) + 1
      if 0 < number < following:
        raise RecordError(
          f"attempt {number} of run {run_id} cannot begin: attempt {following - 1} did before; "
          "`nmoe prod launch` generates anew what its engine takes"
        )
      number = number or following
      row = (run_id, number, engine, job_id, json.dumps(list(nodes)), commit, time.time(), step)
      db.execute("INSERT INTO attempts VALUES (?,?,?,?,?,?,?,?,?,0,'',0)", (*row, step))
    return number

  def end(self, run_id: str, number: int, *, outcome: str, exit_status: int, step: int) -> None:
    """Record how an attempt ended; `step` of the newest checkpoint."""
    assert outcome in OUTCOMES
    with self._writing() as db:
      db.execute(
        "UPDATE attempts SET ended = ?, outcome = ?, exit = ?, last_step = ? "
        "WHERE run_id = ? AND number = ?",
        (time.time(), outcome, exit_status, step, run_id, number),
      )
    launches.end(self.root, run_id, number)

  def started(
    self,
    run_id: str,
    attempt: int,
    step: int,
    host: str,
    detail: Mapping[str, Any] | None = None,
  ) -> None:
    """Record that ranks train from `step` on: a launch, or a restart within the attempt."""
    starts = ("launch", "restart")
    before = any(e.attempt == attempt and e.kind in starts for e in self.events(run_id))
    kind = "restart" if before else "launch"
    self.event(run_id, attempt, kind, step=step, host=host, detail=detail)

  def event(
    self,
    run_id: str,
    attempt: int,
    kind: str,
    *,
    step: int = 0,
    rank: int = 0,
    host: str = "",
    detail: Mapping[str, Any] | None = None,
  ) -> None:
    """Record that something of `kind` happened now."""
    assert kind in KINDS
    row = (run_id, attempt, time.time(), step, kind, rank, host, json.dumps(dict(detail or {})))
    with self._writing() as db:
      db.execute(ADD_EVENT, row)

  def left(self, run_id: str, attempt: int) -> None:
    """Record that an attempt was told to leave, if its ranks did not: they had not begun to train,
    or could not save.
    """
    kinds = [event.kind for event in self.events(run_id) if event.attempt == attempt]
    if self.run(run_id).finished or (kinds and kinds[-1] in ENDS):
      return
    detail = {"why": "it was told to leave before its ranks could save"}
    self.event(run_id, attempt, "stop", detail=detail)

  def amend(self, run_id: str, amendments: Sequence[Amendment], attempt: int) -> None:
    """Record amendments, all or none; each is an event too."""
    with self._writing() as db:
      for one in amendments:
        row = (one.at_tokens, one.key, one.value, one.reason, one.who, one.time)
        db.execute("INSERT INTO amendments VALUES (?,?,?,?,?,?,?)", (run_id, *row))
        told = (run_id, attempt, time.time(), 0, "amend", 0, "", json.dumps(asdict(one)))
        db.execute(ADD_EVENT, told)

  def artifact(self, run_id: str, path: Path) -> None:
    """Record a generated file by its hash."""
    digest = files.sha256(path)
    with self._writing() as db:
      db.execute("INSERT OR REPLACE INTO artifacts VALUES (?,?,?)", (run_id, str(path), digest))
