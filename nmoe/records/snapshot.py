"""The records of a root at one moment, as a dashboard holds them; of a killed writer too."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from nmoe.errors import RecordError
from nmoe.records.attempts import Attempt, Event, History
from nmoe.records.reader import Evaluation, Experiment, Link, Member, Run, decoded_run

_RUNS_SQL = """
  SELECT r.id, m.experiment_id, m.arm, r.seed, r.toml, r.fingerprint, r.data_digest, r."commit",
    '' AS diff, r.code_version, r.environment, r.target, r.status, r.results, r.error, r.host,
    r.pid, r.created, r.updated
  FROM runs r JOIN members m ON m.run_id = r.id ORDER BY m.rowid"""


@dataclass(frozen=True)
class Snapshot:
  """The records of a root at one moment. Runs stand once for each experiment that they serve, and
  without their diffs. `notice`: what a reader should know of the file, or "". `history`: of the
  production runs among them; `evaluations`: of those that `nmoe eval` measured.
  """

  experiments: tuple[Experiment, ...]
  runs: tuple[Run, ...]
  links: tuple[Link, ...]
  notice: str = ""
  history: dict[str, tuple[list[Attempt], list[Event]]] = field(default_factory=dict)
  evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)

  def run(self, run_id: str) -> Run | None:
    return next((run for run in self.runs if run.id == run_id), None)

  def experiment(self, experiment_id: str) -> Experiment | None:
    return next((e for e in self.experiments if e.id == experiment_id), None)

  def members(self) -> list[Member]:
    """Of all experiments, as `runs` has them."""
    names = {e.id: e.name for e in self.experiments}
    return [
      Member(run.id, run.arm, run.seed, run.experiment_id, names[run.experiment_id])
      for run in self.runs
    ]


class LiveReader(History):
  """A Reader that also reads what a killed writer left half done, from a recovered copy."""

  def __init__(self, root: str | Path, copies: Path, timeout_s: float):
    self._copies, self.notice = copies, ""
    super().__init__(root, timeout_s=timeout_s)

  def _open(self) -> None:
    try:
      super()._open()
    except RecordError as error:
      journal = Path(f"{self.path}-journal")
      if "readonly" not in str(error) or not journal.is_file():
        raise
      self._copies.mkdir(parents=True, exist_ok=True)
      copy = self._copies / self.path.name
      shutil.copyfile(journal, f"{copy}-journal")
      shutil.copyfile(self.path, copy)
      with self._explained():
        self._connect(copy.resolve().as_uri())
        self._check_version()
      self.notice = "experiments.db awaits recovery: run any nmoe command that writes"

  def every_run(self) -> list[Run]:
    """The members of all experiments, without diffs, in the order in which they joined."""
    return [self._seen(decoded_run(row)) for row in self._read(_RUNS_SQL)]

  def every_history(self) -> dict[str, tuple[list[Attempt], list[Event]]]:
    """Attempts and events of every run that has some."""
    rows = self._read("SELECT run_id FROM attempts UNION SELECT run_id FROM events")
    return {
      row["run_id"]: (self.attempts(row["run_id"]), self.events(row["run_id"])) for row in rows
    }

  def every_evaluation(self) -> dict[str, list[Evaluation]]:
    """Of every run that has some."""
    rows = self._read("SELECT DISTINCT run_id FROM evaluations")
    return {row["run_id"]: self.evaluations(row["run_id"]) for row in rows}

  def every_link(self) -> list[Link]:
    return [Link(**row) for row in self._read("SELECT * FROM links ORDER BY rowid")]
