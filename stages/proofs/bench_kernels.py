"""`nmoe bench kernels`: the kernels one by one beside the device's own limits, in a child process.

What is measured, and how, is in kernels.tools.bench; this parent never imports torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kernels.arch import ARCHS, environment
from nmoe.errors import ConfigError, RunError
from nmoe.files import check_out
from nmoe.records.provenance import REPO
from nmoe.records.root import Root
from stages.launch.local import parent_environment


def measure(
  arch: str,
  root: Path,
  names: Sequence[str],
  repeats: int,
  console: Console,
  out: Path | None = None,
) -> list[dict[str, Any]]:
  """Run the named benches of kernels.tools.bench, or all; prints a table, writes the rows to `out`.

  Kernels that the root's cache lacks are compiled first. ConfigError for an unknown arch, RunError
  with the child's last words if it fails.
  """
  check_out(out)
  if arch not in ARCHS:
    raise ConfigError(f"{arch!r} has no kernels to measure; pass --arch {' or '.join(ARCHS)}")
  command = [sys.executable, "-m", "kernels.tools.bench", "--repeats", str(repeats), *names]
  env = parent_environment() | environment(arch, Root(root.resolve()).kernel_cache)
  with console.status(f"measuring {', '.join(names) or 'all kernels'}"):
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
  if done.returncode:
    raise RunError(f"{' '.join(command[1:])} failed: {done.stderr[-2000:].strip()}")
  where, *rows = map(json.loads, done.stdout.splitlines())
  if out is not None:
    out.write_text(json.dumps({"where": where, "rows": rows}, indent=1, ensure_ascii=False))
  console.print(table(where, rows))
  return rows


def table(where: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
  made = Table(title=", ".join(f"{name} {value}" for name, value in where.items()))
  for column in ("what", "shape", "ms (median)", "spread (p10–p90)", "rate", "of the ceiling"):
    made.add_column(column, justify="left" if column in ("what", "shape") else "right")
  for row in rows:
    shape = " ".join(f"{name} {size}" for name, size in row["shape"].items())
    spread = f"{row['ms_p10']:.3f}–{row['ms_p90']:.3f}"
    rate = f"{row['rate']:,.0f} {row['unit']}"
    made.add_row(row["what"], shape, f"{row['ms']:.3f}", spread, rate, f"{row['share']:.2f}")
  return made
