"""Stage 1: one architecture on one GPU (or the cpu), its hypothesis, its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from nmoe.config import file as configs
from nmoe.errors import ConfigError, RunError
from nmoe.records.metrics import read
from nmoe.records.reader import Hypothesis, Reader, Run
from nmoe.records.root import Root
from stages.branches import branched
from stages.judge import single
from stages.judge.table import Judgement
from stages.launch.display import Display
from stages.runs import carrying, changes
from stages.study import Study, carry_out
from stages.workbench import Arm, Workbench, hypothesis_of, seeds_of

LOSS = "train/loss"


def run(path: Path, seeds: int | None, console: Console, checkpoints: Sequence[str] = ()) -> Path:
  """Train the configuration over its seeds, judge its hypothesis, write the report; returns its
  path.

  The hypothesis of a single arm is about the metric's change from the unigram baseline: `direction`
  and `min_effect` are read against it when the metric is val/bpb, otherwise the outcome is only
  described. checkpoints: RUN or RUN@STEP, with which the runs begin, one a seed; (): none.
  """
  config = configs.load(path)
  if checkpoints and seeds:
    raise ConfigError("--from has the seeds of its runs: leave --seeds out, name more runs instead")
  if seeds:
    config = configs.changed(config, {"experiment.seeds": seeds})
  asked = hypothesis_of(config)
  judge, seeds_asked = partial(single.judge, asked), seeds_of(config)
  with Workbench.open(config.run.root, console) as bench:
    arm = bench.arm(path.stem, config)
    if checkpoints:
      arm = branched(arm, checkpoints, bench)
      seeds_asked = sorted(arm.branches)
    study = Study(config.experiment.name, "research", (asked,), (arm,), seeds_asked, judge)
    return carry_out(study, bench).report


def rerun(run_id: str, root: Path, console: Console) -> Path:
  """Execute a recorded run once more and compare: same configuration and seed, same code, same
  data.

  RunError if it has not completed, or if the code has changed since, naming both versions.
  """
  with closing(Reader(root)) as records:
    old = records.run(run_id)
  if old.status != "completed":
    raise RunError(f"run {run_id} is {old.status}; only a completed run can be repeated")
  losses(root, old)
  with Workbench.open(str(root), console, anew=True) as bench:
    if old.code_version != bench.code_version:
      raise RunError(
        f"run {run_id} was made by code {old.code_version} (commit {old.commit[:10]}), this is "
        f"{bench.code_version} (commit {bench.commit[:10]}); check that commit out and apply the "
        "run's diff"
      )
    return _repeated(bench, old)


def _repeated(bench: Workbench, old: Run) -> Path:
  config = configs.loads(old.toml, f"run {old.id}")
  branches = {old.seed: old.branch} if old.branch else {}
  arm = Arm(old.arm, config, Root(bench.root).data / old.data_digest, branches=branches)
  first = bench.experiments.find(old.experiment_id)
  claim = Hypothesis(f"Run {old.id} repeats exactly.", first.headline.metric, "none", 0.0)
  asked = ("research", f"rerun-{first.name}", (claim,), (arm,), (old.seed,))
  with carrying(bench, *asked) as work, Display(bench.console) as display:
    bench.experiments.link(work.experiment.id, first.id, "repeats", f"of run {old.id}")
    new = work.repeat(arm, old.seed, display)
    work.check([new])
    before, after = (losses(bench.root, run) for run in (old, new))
    equal = np.array_equal(before, after, equal_nan=True)
    reason = f"{len(before)} logged losses, " + ("bit-identical" if equal else "not identical")
    others = changes(old)
    verdict = "confirmed" if equal else "inconclusive" if others else "refuted"
    reason += f", under other versions or on another host: {'; '.join(others)}" if others else ""
    judgement = Judgement(verdict, reason, {"of": old.id})
    return work.conclude(judgement, [new], summary=True)


def losses(root: Path, run: Run) -> np.ndarray:
  """Those that a run has logged. RunError if there are none to compare."""
  found = read(root, run.id, [LOSS])
  if LOSS not in found:
    raise RunError(
      f"run {run.id} has no logged {LOSS} (no {Root(root).metrics(run.id, 0)}): there is nothing "
      "to compare; restore the file"
    )
  return found[LOSS][2]
