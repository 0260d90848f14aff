"""The report's head and results in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from nmoe.records.reader import Experiment
from stages.report import mixtures, sweep
from stages.report.findings import Findings, gather
from stages.text import plain

BADGES = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow", "failed": "red"}


def terminal_summary(root: Path, experiment: str) -> Group:
  """What an experiment claims, its results, its verdict, as a rich renderable."""
  found = gather(root, experiment)
  verdict = _verdict(found)
  if sweep.is_sweep(found.experiment):
    return Group(_sweep(found.experiment), *verdict)
  if mixtures.is_swarm(found.experiment):
    return Group(_models(found.experiment), *verdict)
  grid = Table(title=plain(found.claim.statement, "bold"), title_justify="left")
  grid.add_column("")
  for arm in found.arms:
    grid.add_column(plain(arm.name), justify="right")
  if found.compares:
    grid.add_column("variant − baseline", justify="right")
  for row in found.rows:
    cells = [str(cell) for cell in row.cells()]
    cells += [str(row.difference_cell())] if found.compares else []
    grid.add_row(
      row.label, *map(plain, cells), style="bold" if row.key == found.claim.metric else ""
    )
  return Group(grid, *verdict)


def _verdict(found: Findings) -> list[Text]:
  style = f"bold {BADGES.get(found.verdict, 'default')}"
  timing = [plain(line, "yellow") for line in found.timing]
  return [*timing, Text.assemble(plain(found.verdict, style), ": ", plain(found.reason))]


def _models(experiment: Experiment) -> Table:
  grid = Table(title=plain(experiment.headline.statement, "bold"), title_justify="left")
  for column in mixtures.MODEL_HEAD:
    grid.add_column(column)
  for row in mixtures.model_rows(experiment):
    grid.add_row(*map(plain, row))
  return grid


def _sweep(experiment: Experiment) -> Table:
  title = plain(experiment.headline.statement, "bold")
  grid = Table(title=title, title_justify="left")
  for column in sweep.HEAD[:-1]:
    grid.add_column(column)
  for row in sweep.group_rows(experiment):
    grid.add_row(*map(plain, row[:-1]))
  return grid
