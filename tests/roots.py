"""Roots of known metrics, and the hash of all that is in one."""

import hashlib
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Run
from nmoe.records.root import Root

RUN = "20261123-142233-ab12"
# Processes that are killed in a flush of metrics, and in a transaction on the records.
KILLED = """
import duckdb, os, sys
db = duckdb.connect(sys.argv[1])
db.execute("SET checkpoint_threshold = '1GB'")
db.execute("INSERT INTO metrics VALUES (3, 30, 'loss', 3.0, 1.0)")
os.kill(os.getpid(), 9)
"""
SPILLED = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("PRAGMA cache_spill = 1")
db.execute("BEGIN EXCLUSIVE")
db.execute("UPDATE runs SET error = hex(randomblob(200000))")
os.kill(os.getpid(), 9)
"""


RECORD = {
  "toml": "[model]\ndim = 1\n",
  "fingerprint": "f" * 16,
  "data_digest": "d",
  "commit": "",
  "diff": "",
  "code_version": "c",
  "environment": {"torch": "2.13"},
  "target": "cpu",
}


def start_run(records: Experiments, experiment_id: str, arm: str, seed: int, **facts: Any) -> Run:
  """A made-up run; of what its record needs, only what matters is told."""
  return records.start_run(experiment_id, arm, seed, **(RECORD | facts))


def tree_hash(folder: Path) -> str:
  """Of every name, size, time and byte."""
  seen = hashlib.sha256()
  for path in sorted(folder.rglob("*")):
    at = path.lstat()
    seen.update(f"{path.relative_to(folder)} {at.st_mtime_ns} {at.st_size}\n".encode())
    seen.update(path.read_bytes() if path.is_file() else b"")
  return seen.hexdigest()


def write(root: Path, steps: range, run: str = RUN, scale: float = 1.0) -> None:
  writer = Metrics(root, run)
  for step in steps:
    writer.add(step, step * 10, {"loss": scale * step, "lr": 0.5})
  writer.flush()


def curves(step: np.ndarray, seed: int, shift: float, layers: int) -> dict[str, np.ndarray]:
  """What a run of `layers` MoE layers logs, made up: losses fall, loads even out."""
  noise = np.random.default_rng(seed)
  n = len(step)
  fall = 2.2 * np.exp(-step / (0.15 * step[-1])) + 3.0 + shift
  values = {
    "train/loss": fall + 0.03 * noise.standard_normal(n),
    "train/bpb": (fall + 0.03 * noise.standard_normal(n)) / 2.6,
    "grad_norm/all": 0.6 + 0.2 * noise.random(n) + 3 * np.exp(-step / (0.02 * step[-1])),
    "train/tokens_per_s": 51_000 + 900 * noise.standard_normal(n),
    "train/mfu": 0.41 + 0.006 * noise.standard_normal(n),
    "memory/peak_bytes": np.full(n, 61.5 * 2.0**30),
    "data/wait_s": 0.002 * noise.random(n),
  }
  warm = np.minimum(1.0, step / (0.05 * step[-1])) * np.minimum(1, 5 * (1.001 - step / step[-1]))
  values |= {f"lr/{name}": 3e-3 * scale * warm for name, scale in (("dense", 1), ("expert", 0.5))}
  phases = {"load": 0.01, "forward": 0.9, "backward": 1.8, "clip": 0.05, "step": 0.2, "log": 0.02}
  values |= {f"time/{k}_s": s * (1 + 0.05 * noise.random(n)) for k, s in phases.items()}
  for layer in range(layers):
    bad = (2.5 if layer == 2 else 0.3) * (1 + 0.2 * noise.random(n))
    values[f"moe/{layer}/load_max_over_mean"] = 1 + bad * (0.4 + np.exp(-step / (0.3 * step[-1])))
    values[f"moe/{layer}/load_p05"] = 0.5 + 0.3 * step / step[-1]
    values[f"moe/{layer}/load_p50"] = np.full(n, 0.98)
    values[f"moe/{layer}/load_p95"] = 1.6 - 0.3 * step / step[-1]
    values[f"moe/{layer}/dead"] = np.round((3 if layer == 2 else 0) * np.exp(-step / step[-1]))
    values[f"moe/{layer}/entropy"] = 0.95 + 0.04 * step / step[-1]
    values[f"moe/{layer}/bias_range"] = 0.1 * step / step[-1]
  return values


def fill(root: Path, run: str, rank: int, step: np.ndarray, values: dict[str, np.ndarray]) -> None:
  """Write whole curves at once: step -> 1000 tokens a step, a second apart, until now."""
  writer = Metrics(root, run, rank)
  writer.add(0, 0, {"made": 1.0})
  writer.flush()
  n = len(step)
  batch = {
    "step": np.tile(step, len(values)),
    "tag": np.repeat(np.array(list(values), object), n),
    "value": np.concatenate(list(values.values())),
    "time": np.tile(time.time() - (step[-1] - step), len(values)),
  }
  with duckdb.connect(str(writer.path)) as db:
    db.execute("DELETE FROM metrics")
    db.register("batch", batch)
    db.execute(
      "INSERT INTO metrics SELECT step, 1000 * step, tag, coalesce(value, 'NaN'::DOUBLE), time "
      "FROM batch ORDER BY step"
    )


def add_loads(root: Path, run: str, step: np.ndarray, layers: int, experts: int) -> None:
  """Counts of every expert that drift apart, and two experts that die."""
  noise = np.random.default_rng(1)
  with duckdb.connect(str(Root(root).metrics(run, 0))) as db:
    db.execute("CREATE TABLE IF NOT EXISTS loads (step BIGINT, layer INTEGER, count UINTEGER[])")
    for layer in range(layers):
      taste = np.exp(0.5 * noise.standard_normal(experts))
      share = taste ** (1 - 0.7 * step[:, None] / step[-1]) * (0.9 + 0.2 * noise.random(experts))
      share[len(step) // 2 :, [3, 11]] *= 0.001
      counts = (8000 * share).astype(np.uint32)
      steps, columns = step.tolist(), [row.tolist() for row in counts]
      rows = [(s, layer, row) for s, row in zip(steps, columns, strict=True)]
      db.executemany("INSERT INTO loads VALUES (?, ?, ?)", rows)
