"""Stage 1: one architecture on one GPU (or the cpu), its hypothesis, its seeds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nmoe import config as configs
from nmoe.errors import RunError
from stages.runs import Arm, Workbench, progress_display, seeds_of, value
from stages.statistics import judge, single


def run(path: Path, seeds: int | None, console: Console) -> Path:
  """Train the configuration over its seeds, judge its hypothesis, write the report; returns its
  path.

  The hypothesis of a single arm is about the metric's change from the unigram baseline: `direction`
  and `min_effect` are read against it when the metric is val/bpb, otherwise the outcome is only
  described.
  """
  config = configs.load(path)
  if seeds:
    config = config.with_values(**{"experiment.seeds": seeds})
  bench = Workbench.open(config.run.root, console)
  arm = bench.arm(path.stem, config)
  experiment = bench.experiment("research", config, [arm])
  with progress_display(console) as progress:
    runs = [bench.run(experiment, arm, seed, progress) for seed in seeds_of(config)]
  asked = config.experiment
  values = [value(r, asked.metric) for r in runs]
  if asked.metric == "val/bpb":
    values = [v - value(r, "unigram_bpb") for v, r in zip(values, runs, strict=True)]
  judged = single(values)
  verdict, reason = "described", f"{asked.metric} is {judged.mean:.4f}"
  if asked.metric == "val/bpb":
    interval = (judged.low, judged.high)
    verdict, reason = judge(judged.mean, interval, judged.n, asked.direction, asked.min_effect)
    reason = reason.replace("The variant", "val/bpb, against a unigram model,", 1)
  return bench.close(experiment, verdict, {**judged.as_dict(), "reason": reason}, runs)


def rerun(run_id: str, root: Path, console: Console) -> Path:
  """Execute a recorded run once more and compare: same configuration and seed, same code, same
  data.

  RunError if the code has changed since, naming both versions.
  """
  bench = Workbench.open(str(root), console)
  old = bench.experiments.run(run_id)
  if old.code_version != bench.code_version:
    raise RunError(
      f"run {run_id} was made by code {old.code_version} (commit {old.commit[:10]}), this is "
      f"{bench.code_version} (commit {bench.commit[:10]}); check that commit out and apply the "
      "run's diff"
    )
  config = configs.loads(old.toml, f"run {run_id}")
  arm = Arm(old.arm, config, root / "data" / old.data_digest)
  first = bench.experiments.find(old.experiment_id)
  name = f"rerun-{first.name}"
  experiment = bench.experiments.create(
    name, "research", f"Run {run_id} repeats exactly.", first.metric, "none", 0.0
  )
  bench.experiments.link(experiment.id, first.id, "repeats", f"of run {run_id}")
  with progress_display(console) as progress:
    new = bench.repeat(experiment, arm, old.seed, progress)
  before, after = value(old, first.metric), value(new, first.metric)
  equal = before == after
  reason = f"{first.metric} was {before!r} and is {after!r}"
  verdict = "confirmed" if equal else "refuted"
  return bench.close(experiment, verdict, {"reason": reason, "run": run_id}, [new])
