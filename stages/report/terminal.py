"""The report's head and results in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from nmoe.errors import RecordError
from nmoe.records.reader import Experiment
from nmoe.wording import counted
from stages.report import mixtures, sweep
from stages.report.evaluations import NOTE, answers
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
  return Group(grid, *_answers(root, found), *verdict)


def _answers(root: Path, found: Findings) -> list[Table | Text]:
  """Of every suite, task by task; grey where two arms cannot be told apart."""
  shown: list[Table | Text] = []
  try:
    suites = answers(root, found.arms)
  except RecordError as error:
    return [plain(f"evaluations: {error}", "yellow")]
  for suite in suites:
    grid = Table(*suite.head(found.arms), box=None)
    for row in suite.rows:
      same = row.difference is not None and not row.difference.told_apart
      grid.add_row(plain(row.task), *row.cells(), style="dim" if same else "")
    shown += [grid, plain(f"{suite.suite}: {counted(suite.seeds, 'seed')}; {NOTE}")]
  return shown


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
