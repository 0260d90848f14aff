"""Stage 2: a paired ablation. Baseline and variant share seeds, so initial weights and data, and
are judged pair by pair.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff, fingerprint, kind
from nmoe.errors import ConfigError
from nmoe.evals.measure import read_items
from nmoe.evals.suites import suite_of
from nmoe.records.root import Root
from stages.judge import paired
from stages.judge.items import task_differences
from stages.study import Outcome, Study, carry_out
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
    arms = (bench.arm("baseline", base), bench.arm("variant", other))
    check_different(*arms)
    study = Study(other.experiment.name, "ablate", (asked,), arms, seeds_of(other), judge)
    outcome = carry_out(study, bench)
    show_items(outcome, base, other, bench, console)
    return outcome.report


def show_items(
  outcome: Outcome, base: Config, variant: Config, bench: Workbench, console: Console
) -> None:
  """Task by task, how the variant answers the same items, if both arms answered a suite."""
  if base.eval.suite == "none" or base.eval.suite != variant.eval.suite:
    return
  suite, root = suite_of(variant.eval.suite).name, Root(bench.root)
  runs = {(r.arm, r.seed): r for r in bench.experiments.runs(outcome.experiment.id)}
  files = [
    [root.eval_items(runs[arm, seed].id, steps, suite) for arm, steps in arms_of(base, variant)]
    for seed in seeds_of(variant)
    if all(runs[arm, seed].status == "completed" for arm, _ in arms_of(base, variant))
  ]
  complete = [pair for pair in files if all(path.is_file() for path in pair)]
  if not complete:
    return
  pairs = [(read_items(a), read_items(b)) for a, b in complete]
  table = Table("task", "measure", "variant − baseline", "p", "told apart", box=None)
  for measure in ("bpb", "acc"):
    for t in task_differences(pairs, measure):
      shown = f"{t.mean:+.4f} ± {t.error:.4f}"
      style = "" if t.told_apart else "dim"
      apart = "yes" if t.told_apart else "no"
      table.add_row(plain(t.task), t.measure, shown, f"{t.p:.3g}", apart, style=style)
  console.print(table)
  console.print(
    f"{suite}: {len(pairs)} seeds; ± is a standard error clustered by document and by seed; told "
    "apart by Holm's procedure over tasks, at 5 %",
    soft_wrap=True,
  )


def arms_of(base: Config, variant: Config) -> tuple[tuple[str, int], tuple[str, int]]:
  """The arms and their last steps."""
  return ("baseline", base.steps), ("variant", variant.steps)


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
