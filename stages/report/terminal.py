"""The report's head and results in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from stages.report.findings import gather
from stages.text import plain

BADGES = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow", "failed": "red"}


def terminal_summary(root: Path, experiment: str) -> Group:
  """What an experiment claims, its results, its verdict, as a rich renderable."""
  found = gather(root, experiment)
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
  style = f"bold {BADGES.get(found.verdict, 'default')}"
  timing = [plain(line, "yellow") for line in found.timing]
  return Group(grid, *timing, Text.assemble(plain(found.verdict, style), ": ", plain(found.reason)))
