"""Text from people and records on a terminal: shown as it is, neither markup nor control codes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
  from rich.console import Console  # whose import takes as long as all that is here

# C0 and C1 controls but tab and newline, and what turns the direction of the text around it.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

IN_LINE = str.maketrans("\t\n", "  ")
WIDEST = 40  # cells of a column

PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))


def visible(text: str) -> str:
  """A control character is written as its number, such as \\x1b."""
  return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def plain(value: object, style: str = "") -> Text:
  """A value as text without markup."""
  return Text(visible(str(value)), style=style)


def print_lines(head: Sequence[str], rows: Sequence[Sequence[object]], console: Console) -> None:
  """Columns two spaces apart, a row a line, nothing cut: of thousands of rows rich's table takes
  seconds. A cell of more than WIDEST moves what is behind it.
  """
  table = [[visible(str(cell)).translate(IN_LINE) for cell in row] for row in (head, *rows)]
  size = [[cell_len(cell) for cell in row] for row in table]
  width = [max((n for n in column if n <= WIDEST), default=0) for column in zip(*size, strict=True)]
  lines = [
    "  ".join(cell + " " * (w - n) for cell, n, w in zip(*row, width, strict=True)).rstrip()
    for row in zip(table, size, strict=True)
  ]
  console.out(lines[0], style="bold", highlight=False)
  if rows:
    console.out("\n".join(lines[1:]), highlight=False)


def rounded(number: float, unit: str = "") -> str:
  """Three digits with a prefix of thousands: "1.23 M", "4.5 GB"; of a unit's parts too: "2 ms"."""
  prefixes = PREFIXES if unit else PREFIXES[:5]
  found = next((p for p in prefixes if float(f"{number:.3g}") >= p[1]), ("", 1.0))
  return f"{number / found[1]:.3g} {found[0]}{unit}".rstrip()
