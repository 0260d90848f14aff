"""Stage 1: one architecture on one GPU (or the cpu), its hypothesis, its seeds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nmoe import config as configs
from nmoe.config import Config
from stages import report
from stages.runs import Workbench, progress_display
from stages.statistics import single


def run(path: Path, seeds: int | None, console: Console) -> Path:
  """Train the configuration over its seeds, judge its hypothesis, write the report; returns its path."""
  config = configs.load(path)
  num_seeds = seeds or config.experiment.seeds
  bench = Workbench.open(config.run.root, console)
  experiment = bench.experiment("research", path.stem, config)
  arm = bench.arm(path.stem, config)
  runs = []
  with progress_display(console) as progress:
    for seed in seeds_of(config, num_seeds):
      found, reused = bench.run(experiment, arm, seed, progress)
      bench.say_reused(found, arm, seed, reused)
      runs.append(found)
  judged = single([r.results[config.experiment.metric] for r in runs])
  bench.experiments.conclude(experiment.id, "described", judged.as_dict())
  return bench.close(experiment)


def seeds_of(config: Config, count: int) -> range:
  """Seeds count up from the configuration's own."""
  return range(config.train.seed, config.train.seed + count)
