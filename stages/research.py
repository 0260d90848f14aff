"""Stage 1: one architecture on one GPU (or the cpu), its hypothesis, its seeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from nmoe.config import file as configs
from nmoe.errors import RunError
from nmoe.records.metrics import read
from nmoe.records.reader import Hypothesis, Reader
from nmoe.records.root import Root
from stages.judge import single
from stages.launch.display import Display
from stages.runs import Arm, Workbench, hypothesis_of, seeds_of
from stages.study import Study, carry_out


def run(path: Path, seeds: int | None, console: Console) -> Path:
  """Train the configuration over its seeds, judge its hypothesis, write the report; returns its
  path.

  The hypothesis of a single arm is about the metric's change from the unigram baseline: `direction`
  and `min_effect` are read against it when the metric is val/bpb, otherwise the outcome is only
  described.
  """
  config = configs.load(path)
  if seeds:
    config = configs.changed(config, {"experiment.seeds": seeds})
  bench = Workbench.open(config.run.root, console)
  asked = hypothesis_of(config)
  study = Study(
    config.experiment.name,
    "research",
    (asked,),
    (bench.arm(path.stem, config),),
    seeds_of(config),
    partial(single.judge, asked),
  )
  return carry_out(study, bench).report


def rerun(run_id: str, root: Path, console: Console) -> Path:
  """Execute a recorded run once more and compare: same configuration and seed, same code, same
  data.

  RunError if it has not completed, or if the code has changed since, naming both versions.
  """
  old = Reader(root).run(run_id)
  bench = Workbench.open(str(root), console, anew=True)
  if old.status != "completed":
    raise RunError(f"run {run_id} is {old.status}; only a completed run can be repeated")
  if old.code_version != bench.code_version:
    raise RunError(
      f"run {run_id} was made by code {old.code_version} (commit {old.commit[:10]}), this is "
      f"{bench.code_version} (commit {bench.commit[:10]}); check that commit out and apply the "
      "run's diff"
    )
  config = configs.loads(old.toml, f"run {run_id}")
  arm = Arm(old.arm, config, Root(root).data / old.data_digest)
  first = bench.experiments.find(old.experiment_id)
  name = f"rerun-{first.name}"
  claim = Hypothesis(f"Run {run_id} repeats exactly.", first.headline.metric, "none", 0.0)
  experiment = bench.experiments.create(name, "research", (claim,))
  bench.experiments.link(experiment.id, first.id, "repeats", f"of run {run_id}")
  with Display(console) as display:
    new = bench.repeat(experiment, arm, old.seed, display)
  bench.check(experiment, [new])
  before, after = (read(root, r.id, ["train/loss"])["train/loss"][2] for r in (old, new))
  equal = np.array_equal(before, after, equal_nan=True)
  reason = f"{len(before)} logged losses, " + ("bit-identical" if equal else "not identical")
  outcome = {"reason": reason, "of": run_id}
  return bench.close(experiment, "confirmed" if equal else "refuted", outcome, [new])
