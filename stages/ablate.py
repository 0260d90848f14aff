"""Stage 2: a paired ablation. Baseline and variant share seeds, so initial weights and data, and
are judged pair by pair.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nmoe import config as configs
from nmoe.config import Config
from nmoe.errors import ConfigError
from stages.runs import Workbench, progress_display, seeds_of, value
from stages.statistics import paired


def run(baseline: Path, variant: Path, seeds: int | None, console: Console) -> Path:
  """Train both arms over paired seeds, judge the variant's hypothesis, write the report; returns
  its path.

  The hypothesis is recorded before the first step. Arms take turns seed by seed, so that a drift of
  the machine falls on both. Completed runs of the same configuration, data and code are reused.
  """
  base, other = configs.load(baseline), configs.load(variant)
  if seeds:
    other = other.with_values(**{"experiment.seeds": seeds})
  differences(base, other, baseline, variant, console)
  asked = other.experiment
  bench = Workbench.open(other.run.root, console)
  arms = [bench.arm("baseline", base), bench.arm("variant", other)]
  experiment = bench.experiment("ablate", other, arms)
  runs = {arm.name: [] for arm in arms}
  with progress_display(console) as progress:
    for seed in seeds_of(other):
      for arm in arms:
        runs[arm.name].append(bench.run(experiment, arm, seed, progress))
  everything = runs["baseline"] + runs["variant"]
  bench.check(experiment, everything)
  judged = paired(
    [value(run, asked.metric) for run in runs["baseline"]],
    [value(run, asked.metric) for run in runs["variant"]],
    direction=asked.direction,
    min_effect=asked.min_effect,
  )
  return bench.close(experiment, judged.verdict, judged.as_dict(), everything)


def differences(
  base: Config, variant: Config, base_path: Path, variant_path: Path, console: Console
) -> None:
  """Print the leaves that differ, [experiment] aside. ConfigError if none does."""
  found = {k: v for k, v in configs.diff(base, variant).items() if not k.startswith("experiment.")}
  if all(configs.kind(key) == "free" for key in found):
    raise ConfigError(
      f"{variant_path} computes the same as {base_path}: no identity or schedule key differs; an "
      "ablation "
      "needs one. For the noise between seeds alone, use nmoe research run"
    )
  for key, (before, after) in found.items():
    console.print(f"  {key}: {before!r} → [bold]{after!r}[/bold]")
  if len(found) > 1:
    console.print(
      f"[yellow]{len(found)} keys differ: the outcome cannot be attributed to one of them[/yellow]"
    )
