"""Words that a number decides on."""

from __future__ import annotations


def counted(number: float, what: str) -> str:
  """ "1 host", "2 hosts", "0.5 hosts": a number of things whose name takes an s."""
  told = f"{number:,}" if isinstance(number, int) else f"{number:g}"
  return f"{told} {what}{'' if number == 1 else 's'}"
