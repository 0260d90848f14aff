"""Stage 3: a sweep of rates over scales, as a Study, and its product."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nmoe.records.reader import Hypothesis
from stages.proxy import coords
from stages.proxy.grid import METRIC, Sweep, loaded
from stages.proxy.recommend import write_transfer
from stages.study import Study, carry_out
from stages.text import plain
from stages.workbench import Workbench


def run(path: Path, console: Console) -> Path:
  """Check the coordinates, run the sweep's points, or find them, judge the transfer and write
  transfer.toml beside the report, whose path is returned. RunError if a coordinate is out.
  """
  file = loaded(path)
  with Workbench.open(file.base.run.root, console) as bench:
    sweep = Sweep.of(file, bench)
    sweep.coords = coords.evidence(file, bench)
    asked = Hypothesis(file.asked, METRIC, "none", file.verdict.max_regret)
    study = Study(
      file.sweep.name,
      "proxy",
      (asked,),
      tuple(arm for arm, _ in sweep.first()),
      (file.base.train.seed,),
      sweep.judge,
      sweep.further,
      divergence=False,
    )
    outcome = carry_out(study, bench)
    written = write_transfer(file, outcome, bench)
    console.print(plain(f"transfer: {written}"), soft_wrap=True)
  return outcome.report
