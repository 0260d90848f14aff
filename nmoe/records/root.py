"""The layout of a root, the folder of all that runs leave: every path of it is made here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmoe.records.manifests import steps

STOP, AMEND = "stop", "amend"  # requests to a production run: files beside its heartbeat
DEFAULT_ROOT = ".nmoe"  # of configurations and commands alike, where NMOE_ROOT is not set


@dataclass(frozen=True)
class Root:
  """The paths of one root. Making them creates nothing."""

  path: Path

  @property
  def experiments_db(self) -> Path:
    """SQLite: experiments, runs, conclusions, links."""
    return self.path / "experiments.db"

  @property
  def data(self) -> Path:
    """One folder a prepared mixture, named by its digest."""
    return self.path / "data"

  def contamination(self, data: str, items: str) -> Path:
    """Which of the items stand in the training data, by the digests of both."""
    return self.data / data / f"contamination-{items}.json"

  @property
  def imports(self) -> Path:
    """One folder a HuggingFace model, named by its digest."""
    return self.path / "imports"

  def imported(self, digest: str) -> Path:
    """The weights and the tokenizer of a HuggingFace folder."""
    return self.imports / digest

  @property
  def evals(self) -> Path:
    """One folder a set of prepared items, named by its digest."""
    return self.path / "evals"

  def eval_items(self, run_id: str, step: int, suite: str) -> Path:
    """What a suite measured at a step, an item a row (Parquet)."""
    return self.path / "evals" / "runs" / run_id / f"step_{step:08d}_{suite}.parquet"

  def evaluated(self, run_id: str) -> dict[str, Path]:
    """Suite -> its items at the newest step at which the run has them."""
    files = sorted((self.path / "evals" / "runs" / run_id).glob("step_????????_*.parquet"))
    return {file.stem[14:]: file for file in files}

  @property
  def kernel_cache(self) -> Path:
    """One folder an architecture, as kernels.tools.build fills it."""
    return self.path / "kernel_cache"

  def metrics(self, run_id: str, rank: int) -> Path:
    """A rank's DuckDB file."""
    return self.path / "metrics" / run_id / f"rank_{rank}.duckdb"

  def checkpoints(self, run_id: str) -> Path:
    """One folder a step."""
    return self.path / "checkpoints" / run_id

  def checkpoint_steps(self, run_id: str) -> list[int]:
    """Of the run's finished checkpoints, ascending."""
    return steps(self.checkpoints(run_id))

  @property
  def locks(self) -> Path:
    """One file a run."""
    return self.path / "locks"

  def lock(self, run_id: str) -> Path:
    """Locked by the process that owns the run."""
    return self.locks / run_id

  def experiment_lock(self, experiment_id: str) -> Path:
    """Locked, shared, by the processes that carry the experiment out."""
    return self.locks / f"experiment-{experiment_id}"

  def logs(self, run_id: str) -> Path:
    """What the run's ranks and the compiler beside them print."""
    return self.path / "logs" / run_id

  def prod(self, run_id: str) -> Path:
    """Of a production run: what was generated for it, its heartbeat, the request to stop."""
    return self.path / "runs" / run_id

  def heartbeat(self, run_id: str) -> Path:
    """How far a production run is, written by rank 0."""
    return self.prod(run_id) / "heartbeat.json"

  def launch(self, run_id: str) -> Path:
    """What the launch of a production run says of itself (nmoe.records.launches)."""
    return self.prod(run_id) / "launch.json"

  def stop_request(self, run_id: str) -> Path:
    """While this file exists, a production run saves and leaves."""
    return self.prod(run_id) / STOP

  def amend_request(self, run_id: str) -> Path:
    """While this file exists, a production run saves and leaves, to be launched again at once."""
    return self.prod(run_id) / AMEND

  def report(self, experiment_id: str) -> Path:
    """index.html, the arms' TOML, changes.patch."""
    return self.path / "reports" / experiment_id

  def traces(self, experiment_id: str) -> Path:
    """The profiles of an experiment's runs."""
    return self.path / "traces" / experiment_id

  def look_request(self, run_id: str) -> Path:
    """The step at which the agents of a production run are asked what their GPUs say."""
    return self.prod(run_id) / "look.json"
