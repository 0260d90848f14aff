"""Stage 2: a paired ablation. Baseline and variant share seeds, so initial weights and data, and
are judged pair by pair.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff, fingerprint, kind
from nmoe.errors import ConfigError
from stages.judge import paired
from stages.study import Study, carry_out
from stages.text import plain
from stages.workbench import Arm, Workbench, hypothesis_of, seeds_of


def run(baseline: Path, variant: Path, seeds: int | None, console: Console) -> Path:
  """Train both arms over paired seeds, judge the variant's hypothesis, write the report; returns
  its path.

  The hypothesis is recorded before the first step. Arms take turns seed by seed, so that a drift of
  the machine falls on both. Completed runs of the same configuration, data and code are reused.
  """
  base, other = configs.load(baseline), configs.load(variant)
  if seeds:
    other = configs.changed(other, {"experiment.seeds": seeds})
  differences(base, other, console)
  asked = hypothesis_of(other)
  judge = partial(paired.judge, asked)
  with Workbench.open(other.run.root, console) as bench:
    arms = bench.arms({"baseline": base, "variant": other})
    check_different(*arms)
    study = Study(other.experiment.name, "ablate", (asked,), arms, seeds_of(other), judge)
    return carry_out(study, bench).report


def differences(base: Config, variant: Config, console: Console) -> None:
  """Print the leaves that differ, [experiment] and the seed aside, and whether they are too many
  for one cause.
  """
  aside = ("experiment.", "train.seed")
  found = {k: v for k, v in diff(base, variant).items() if not k.startswith(aside)}
  for key, (before, after) in found.items():
    console.print(plain(f"  {key}: {before!r} →"), plain(repr(after), "bold"))
  causes = [key for key in found if kind(key) != "free" or key == "data.mixture"]
  if len(causes) > 1:
    console.print(
      f"[yellow]{len(causes)} keys differ: the outcome cannot be attributed to one of them[/yellow]"
    )


def check_different(baseline: Arm, variant: Arm) -> None:
  """ConfigError if the arms compute the same from the same data."""
  one, other = (
    fingerprint(arm.at_seed(baseline.config.train.seed), arm.data.name)
    for arm in (baseline, variant)
  )
  if one == other:
    raise ConfigError(
      "the variant computes the same as the baseline: no identity or schedule key and no data "
      "differ; an ablation needs one. For the noise between seeds alone, use nmoe research run"
    )
