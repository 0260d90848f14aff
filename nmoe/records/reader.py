"""What was asked, what was run, what came out: the records of a root, for those who only read.

A claim is a chain: hypothesis -> experiment -> runs -> conclusion, and links between experiments.

One file: what a row holds, how it is read, and whether a run that stands as running still does.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from nmoe import files
from nmoe.errors import RecordError
from nmoe.records.launches import Launch
from nmoe.records.migrations import MIGRATIONS, migrate, version
from nmoe.records.owner import lives
from nmoe.records.root import Root

Point = Mapping[str, float | int | str]
FEW = 5  # runs that a message names
LIVE = ("running", "starting", "restarting")  # statuses of a run; the last two as `Reader` sees it

RUN_SQL = """
  SELECT r.id, m.experiment_id, m.arm, r.seed, r.toml, r.fingerprint, r.data_digest, r."commit",
    r.diff, r.code_version, r.environment, r.target, r.status, r.results, r.error, r.host, r.pid,
    r.created, r.updated,
    (SELECT o.experiment_id FROM members o WHERE o.run_id = r.id ORDER BY o.rowid LIMIT 1)
      AS origin,
    (SELECT json_object('trunk', b.trunk, 'step', b.step, 'tokens', b.tokens, 'sha256', b.sha256,
      'changed', json(b.changed)) FROM branches b WHERE b.run_id = r.id) AS branch
  FROM runs r JOIN members m ON m.run_id = r.id """


@dataclass(frozen=True)
class Hypothesis:
  """A claim that an experiment tests.

  statement   the claim, in a sentence
  metric      a tag of nmoe.records.measures.MEASURES
  direction   "lower" or "higher": what is claimed of the variant; "none": that it doesn't matter
  min_effect  the smallest difference that matters, in the metric's unit
  """

  statement: str
  metric: str
  direction: str
  min_effect: float


@dataclass(frozen=True)
class ArmRecord:
  """An arm as it was planned. `created`: UTC, ISO 8601.

  point        its place on the axes of a sweep; {} where there is none
  computation  what it computes, whatever the seed: equal arms of equal code have the same one; ""
               in a record of schema 1
  """

  name: str
  point: Point
  computation: str
  created: str = ""


@dataclass(frozen=True)
class Experiment:
  """Hypotheses and their outcome. Times: UTC, ISO 8601. `verdict` is "" until concluded."""

  id: str
  name: str
  stage: str
  hypotheses: tuple[Hypothesis, ...]
  arms: tuple[ArmRecord, ...]
  status: str
  verdict: str
  conclusion: dict[str, Any]
  created: str
  updated: str

  @property
  def headline(self) -> Hypothesis:
    """The first hypothesis."""
    return self.hypotheses[0]


@dataclass(frozen=True)
class Branch:
  """The checkpoint with which a run begins, written by another run.

  sha256   of its manifest
  changed  schedule keys that differ from those under which it was written, and the mixture's digest
           and weights where they do: (then, now)
  """

  trunk: str  # the other run's id
  step: int
  tokens: int
  sha256: str
  changed: Mapping[str, Sequence[Any]] = field(default_factory=dict)

  def __str__(self) -> str:
    return f"{self.trunk}@{self.step}"

  @property
  def changes(self) -> str:
    """What is another from there on, for people."""
    told = (f"{key} {then!r} → {now!r}" for key, (then, now) in self.changed.items())
    return ", ".join(told) or "no key of the schedule changed"


@dataclass(frozen=True)
class Amendment:
  """A change of a production run's schedule: a key's value (JSON) from `at_tokens` on, and who
  decided it why and when (seconds since 1970).
  """

  at_tokens: int
  key: str
  value: str
  reason: str
  who: str
  time: float


@dataclass(frozen=True)
class Run:
  """One training run as a member of one experiment (`experiment_id`, `arm`).

  `host` and `pid` are its last owner; "" in `commit` means that it ran outside a git checkout.
  `origin` is the experiment that it was started for. `branch`: None for a run from its first step.
  """

  id: str
  experiment_id: str
  arm: str
  seed: int
  toml: str
  fingerprint: str
  data_digest: str
  commit: str
  diff: str
  code_version: str
  environment: dict[str, Any]
  target: str
  status: str
  results: dict[str, Any]
  error: str
  host: str
  pid: int
  created: str
  updated: str
  origin: str = ""
  branch: Branch | None = None
  amendments: tuple[Amendment, ...] = ()  # by tokens; of a run that nmoe.records.attempts read

  @property
  def live(self) -> bool:
    """Whether it has ranks, or a launch that starts them."""
    return self.status in LIVE

  @property
  def finished(self) -> bool:
    """Whether it has an outcome: it completed or diverged."""
    return self.status == "completed" or "diverged" in self.results


class Member(NamedTuple):
  """A run in an experiment, by what people call both."""

  run: str
  arm: str
  seed: int
  experiment: str
  name: str

  def __str__(self) -> str:
    return f"{self.run} ({self.experiment}: {self.arm} seed {self.seed})"

  def answers(self, name: str) -> bool:
    """Whether `name` is of its experiment, its arm or the arm's file."""
    return name in (self.experiment, self.name) or Path(name).stem == self.arm


def no_run(name: str, members: Iterable[Member]) -> str:
  """What to say of a run that is not there: those that may be meant, of members oldest first."""
  newest = list(members)[::-1]
  if not newest:
    return f"no run {name!r}; there is none yet: `nmoe research run CONFIG` makes one"
  meant = [member for member in newest if member.answers(name)]
  which = "the newest of that experiment or arm" if meant else "the newest"
  told: dict[str, str] = {}
  for member in meant or newest:
    told.setdefault(member.run, str(member))
  return (
    f"no run {name!r}; {which} are: {', '.join(list(told.values())[:FEW])}; "
    "`nmoe experiments list` and `nmoe experiments show NAME` list all"
  )


class Counts(NamedTuple):
  """Of the runs of an experiment. `older` had an outcome before its hypotheses were written."""

  completed: int
  runs: int
  older: int


@dataclass(frozen=True)
class Link:
  """Evidence: experiment `from_id` supports, refutes, refines or repeats experiment `to_id`."""

  from_id: str
  to_id: str
  relation: str
  note: str
  created: str


@dataclass(frozen=True)
class Evaluation:
  """What a suite measured of a run's checkpoint.

  items       the digest of what was asked
  arithmetic  of the model: architecture and dtype
  results     values by tag: eval/TASK/MEASURE, eval/SUITE/MEASURE
  """

  step: int
  suite: str
  items: str
  arithmetic: str
  results: dict[str, float]
  seconds: float
  created: str = ""


@dataclass(frozen=True)
class Start:
  """A process that began to execute a run, at a step."""

  step: int
  host: str
  device: str
  environment: dict[str, str]
  created: str = ""

  def changes(self, before: Start) -> str:
    """What is another than at a start before, for people; "" if nothing."""
    pairs = {"host": (before.host, self.host), "device": (before.device, self.device)}
    for name in before.environment | self.environment:
      pairs[name] = (before.environment.get(name, "none"), self.environment.get(name, "none"))
    return ", ".join(f"{k} {then} → {now}" for k, (then, now) in pairs.items() if then != now)


def places(starts: Sequence[Start]) -> set[tuple[str, ...]]:
  """The different hosts, devices and versions of a run's starts."""
  return {
    (s.host, s.device, *(f"{name} {value}" for name, value in sorted(s.environment.items())))
    for s in starts
  }


@dataclass(frozen=True)
class Export:
  """A folder that a run's checkpoint was written to.

  path    where it was written; it may have been moved since
  digest  sha256 of its nmoe.json, which has that of every file and tensor
  check   what was compared with transformers, and how far apart it was
  """

  run_id: str
  step: int
  path: str
  digest: str
  check: dict[str, Any]
  created: str = ""


class Reader:
  """The records of one root, opened read-only: it creates, changes and locks nothing.

  Those of an older schema are read from a copy in memory, which shows them as they were then.
  A run or an experiment whose owner died reads as "interrupted", whatever its row says, and a run
  whose ranks its launch replaces as "restarting". Raises RecordError if the root has no database,
  or one that cannot be read: locked, corrupt or of another schema.
  """

  def __init__(self, root: str | Path, timeout_s: float = 10.0):
    self.root = Path(root)
    self.path = Root(self.root).experiments_db
    self._timeout_s = timeout_s
    self._open()

  def _open(self) -> None:
    if not self.path.is_file():
      raise RecordError(
        f"{self.root} holds no records (no experiments.db); name the root of your runs by --root "
        "or NMOE_ROOT, or make one with `nmoe ablate`"
      )
    with self._explained():
      self._connect(f"{self.path.resolve().as_uri()}?mode=ro")
      self._check_version()
      if version(self._db) < len(MIGRATIONS):
        self._look_at_a_copy()

  def _connect(self, uri: str) -> None:
    self._db = sqlite3.connect(uri, timeout=self._timeout_s, isolation_level=None, uri=True)
    self._db.row_factory = sqlite3.Row

  def _look_at_a_copy(self) -> None:
    """Of a file of an older schema: in memory, migrated there, as the file is now."""
    file = self._db
    self._connect(":memory:")
    file.backup(self._db)
    file.close()
    migrate(self._db)

  def _check_version(self) -> None:
    """Refuse a schema of the future, and a file that has none."""
    found, known = version(self._db), len(MIGRATIONS)
    if not found:
      raise RecordError(
        f"{self.path} holds no records: it is {self.path.stat().st_size} bytes without a schema; "
        "restore a copy of it, or move it away to begin anew"
      )
    if found > known:
      raise RecordError(
        f"{self.path} has schema {found}, this nmoe reads schemas 1 to {known}; "
        "use the nmoe that wrote it, or another run.root"
      )

  def close(self) -> None:
    """Close the database."""
    self._db.close()

  def find(self, name_or_id: str) -> Experiment:
    """The experiment of this id, else the newest of this name. RecordError if there is none."""
    rows = self._read(
      "SELECT * FROM experiments WHERE id = ? OR name = ? ORDER BY id = ? DESC, rowid DESC LIMIT 1",
      *3 * (name_or_id,),
    )
    if not rows:
      of_run = "SELECT experiment_id AS id FROM members WHERE run_id = ? ORDER BY rowid LIMIT 1"
      for row in self._read(of_run, name_or_id):
        raise RecordError(f"{self.path}: {name_or_id!r} is a run; its experiment is {row['id']}")
      newest = self._read("SELECT id FROM experiments ORDER BY rowid DESC LIMIT 8")
      known = ", ".join(row["id"] for row in newest) or "none yet"
      raise RecordError(f"{self.path}: no experiment {name_or_id!r}; the newest are: {known}")
    return self._experiments(rows)[0]

  def list(self) -> list[Experiment]:
    """Every experiment, newest first."""
    return self._experiments(self._read("SELECT * FROM experiments ORDER BY rowid DESC"))

  def counts(self) -> dict[str, Counts]:
    """Of every experiment that has runs."""
    rows = self._read(
      """SELECT e.id, count(*) AS runs, sum(r.status = 'completed') AS completed,
        sum((r.status = 'completed' OR instr(r.results, '"diverged"')) AND r.updated <= e.created
          AND e.id != (
            SELECT o.experiment_id FROM members o WHERE o.run_id = r.id ORDER BY o.rowid LIMIT 1
          )) AS older
      FROM members m JOIN runs r ON r.id = m.run_id JOIN experiments e ON e.id = m.experiment_id
      GROUP BY e.id"""
    )
    return {row["id"]: Counts(row["completed"], row["runs"], row["older"]) for row in rows}

  def links(self, experiment_id: str) -> list[Link]:
    """The links from and to an experiment, oldest first."""
    sql = "SELECT * FROM links WHERE from_id = ? OR to_id = ? ORDER BY rowid"
    return [Link(**row) for row in self._read(sql, experiment_id, experiment_id)]

  def starts(self, run_id: str) -> list[Start]:
    """Of a run, oldest first; [] if it was made before they were recorded."""
    sql = "SELECT step, host, device, environment, created FROM starts WHERE run_id = ? "
    rows = self._read(sql + "ORDER BY rowid", run_id)
    return [Start(**{**dict(row), "environment": decoded(row["environment"])}) for row in rows]

  def evaluations(self, run_id: str) -> list[Evaluation]:
    """What `nmoe eval` measured of a run, oldest first."""
    columns = "step, suite, items, arithmetic, results, seconds, created"
    rows = self._read(f"SELECT {columns} FROM evaluations WHERE run_id = ? ORDER BY rowid", run_id)
    return [Evaluation(**{**dict(row), "results": json.loads(row["results"])}) for row in rows]

  def exports(self, run_id: str) -> list[Export]:
    """The folders that a run was exported to, oldest first."""
    rows = self._read("SELECT * FROM exports WHERE run_id = ? ORDER BY rowid", run_id)
    return [Export(**{**dict(row), "check": json.loads(row["check"])}) for row in rows]

  def runs(self, experiment_id: str) -> list[Run]:
    """The members of an experiment, in the order in which they joined it."""
    rows = self._read(RUN_SQL + "WHERE m.experiment_id = ? ORDER BY m.rowid", experiment_id)
    return [self._seen(decoded_run(row)) for row in rows]

  def run(self, run_id: str) -> Run:
    """A run, as a member of the experiment it was started for. RecordError if there is none."""
    rows = self._read(RUN_SQL + "WHERE r.id = ? ORDER BY m.rowid LIMIT 1", run_id)
    if not rows:
      members = self._read(
        """SELECT m.run_id AS run, m.arm, r.seed, e.id AS experiment, e.name FROM members m
        JOIN runs r ON r.id = m.run_id JOIN experiments e ON e.id = m.experiment_id
        ORDER BY m.rowid"""
      )
      raise RecordError(f"{self.path}: {no_run(run_id, (Member(**row) for row in members))}")
    return self._seen(decoded_run(rows[0]))

  def _seen(self, run: Run) -> Run:
    """The run with the status that is true: "running" needs an owner that holds its lock; where it
    has none, or failed, a launch that lives is "starting" or "restarting" its ranks. A study that
    has given it up for a child to claim is "starting" it, if its process still lives.
    """
    row = run.status
    if run.status == "running" and not _owned(Root(self.root).lock(run.id), run):
      run = replace(run, status="interrupted")
    if run.status in ("interrupted", "failed") and not run.finished:
      launch = Launch.read(self.root, run.id)
      if launch is not None and launch.lives:
        return replace(run, status=launch.status)
    if row == "interrupted" and lives(run.host, run.pid, run.updated):
      if _carried_out(Root(self.root).experiment_lock(run.experiment_id)):
        return replace(run, status="starting")
    return run

  def _experiments(self, rows: Sequence[sqlite3.Row]) -> list[Experiment]:
    """Rows of `experiments` with what other tables hold of them."""
    one = [row["id"] for row in rows] if len(rows) == 1 else []
    where = "WHERE experiment_id = ?" if one else ""
    claims: dict[str, list[Hypothesis]] = {}
    for row in self._read(f"SELECT * FROM hypotheses {where} ORDER BY number", *one):
      claim = Hypothesis(row["statement"], row["metric"], row["direction"], row["min_effect"])
      claims.setdefault(row["experiment_id"], []).append(claim)
    arms: dict[str, list[ArmRecord]] = {}
    for row in self._read(f"SELECT * FROM arms {where} ORDER BY rowid", *one):
      arm = ArmRecord(row["name"], decoded(row["point"]), row["computation"], row["created"])
      arms.setdefault(row["experiment_id"], []).append(arm)
    return [
      Experiment(
        **{**dict(row), "conclusion": decoded(row["conclusion"]), "status": self._status(row)},
        hypotheses=tuple(claims[row["id"]]),
        arms=tuple(arms.get(row["id"], ())),
      )
      for row in rows
    ]

  def _status(self, row: sqlite3.Row) -> str:
    """An experiment's: "running" needs a process that carries it out."""
    if row["status"] == "running" and not _carried_out(Root(self.root).experiment_lock(row["id"])):
      return "interrupted"
    return row["status"]

  def _read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
    with self._explained():
      return self._db.execute(sql, values).fetchall()

  @contextmanager
  def _explained(self) -> Iterator[None]:
    """SQLite's errors as RecordError with the remedy."""
    try:
      yield
    except sqlite3.Error as error:
      raise RecordError(f"{self.path}: {error}; {self._remedy(str(error))}") from error

  def _remedy(self, message: str) -> str:
    if "locked" in message or "locking" in message:
      return (
        f"another process held it for {self._timeout_s:g} s, or its filesystem has no file locks: "
        "stop that process, or put run.root on a filesystem with locks"
      )
    if "not a database" in message or "malformed" in message:
      return (
        "the file is corrupt: restore a copy or move it away; metrics and checkpoints are apart"
      )
    if "readonly" in message or "unable to open" in message:
      return "it cannot be written here: make the folder writable, or set run.root (NMOE_ROOT)"
    if "full" in message:
      return "the disk is full: free space and run again; nothing of this write was kept"
    return "check the folder's permissions and free space"


def _owned(path: Path, run: Run) -> bool:
  """Whether a process holds the run's lock file, or, where that was deleted, lives."""
  try:
    with path.open() as file:
      return not files.lock(file, shared=True)
  except FileNotFoundError:
    return lives(run.host, run.pid, run.updated)
  except OSError:
    return True  # not ours to ask


def _carried_out(path: Path) -> bool:
  """Whether a process holds an experiment's lock file."""
  try:
    with path.open() as file:
      return not files.lock(file)
  except FileNotFoundError:
    return False
  except OSError:
    return True  # not ours to ask


def decoded(text: str) -> Any:
  """JSON of a record. RecordError if it is none."""
  try:
    return json.loads(text)
  except ValueError as error:
    raise RecordError(
      f"a record holds {text[:40]!r} where JSON belongs ({error}): experiments.db was changed by "
      "another program; restore a copy, or move it away"
    ) from error


def decoded_run(row: sqlite3.Row) -> Run:
  found = dict(row)
  found |= {key: decoded(found[key]) for key in ("environment", "results")}
  if found.get("branch") is not None:
    found["branch"] = Branch(**decoded(found["branch"]))
  return Run(**found)
