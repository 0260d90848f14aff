"""`nmoe proxy sweep FILE --plan`: points, tokens, seconds, what is recorded; nothing runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernels.arch import ARCHS
from kernels.tools.build import build
from nmoe.config.shapes import kernel_shapes
from nmoe.errors import ConfigError
from nmoe.records.provenance import code_version
from nmoe.records.reader import Experiment, Reader, Run
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.launch import local as launch
from stages.proxy.file import load_sweep
from stages.proxy.grid import Sweep, loaded
from stages.text import plain


def show(path: Path, console: Console) -> None:
  file = loaded(path)
  sweep = Sweep.planned(file)
  sweeps = recorded(Path(file.base.run.root))
  runs = by_scale(next((of for e, of in sweeps if e.name == file.sweep.name), ()))
  found = outcomes(run for _, of in sweeps for run in of)
  known = [Sweep.planned(file, Path(digest)) for digest in {digest for digest, _ in found}]
  table = Table(title=plain(file.sweep.statement, "bold"), title_justify="left")
  for column in ("group", "scale", "registered", "at most", "tokens", "seconds", "recorded"):
    table.add_column(column)
  s = file.sweep
  for group, scale in sweep.lines():
    repeats = 3 * (s.seeds - 1) if scale in sweep.ends else 0
    count = s.points + repeats
    tokens = file.scales[list(sweep.scales).index(scale)].config.schedule.total_tokens
    seconds = [r.results["wall_s"] for r in runs[scale] if "wall_s" in r.results]
    each = f"{count * statistics.median(seconds):,.0f}" if seconds else "no run to go by"
    asked = [(p, seed) for p in sweep.within_reach(group, scale) for seed in sweep.seeds]
    done = sum(
      any((k.data.name, k.arm(place).fingerprint(seed)) in found for k in known)
      for place, seed in asked
    )
    row = (group, scale, count, count + s.extend, f"{count * tokens:,}", each, done)
    table.add_row(*(plain(str(cell)) for cell in row))
  console.print(table)
  limit = f", {file.budget.device_seconds:g} device seconds" if file.budget.device_seconds else ""
  console.print(f"budget: {counted(file.budget.runs, 'run')}{limit}")


def build_kernels(path: Path, console: Console) -> None:
  """Compile the kernels of every scale into the root's cache, so that no run waits for them."""
  file = load_sweep(path)
  arch = file.base.target.arch
  if arch not in ARCHS:
    raise ConfigError(f"{path}: the base's target is {arch!r}, which has no device code to compile")
  cache = Root(Path(file.base.run.root).resolve()).kernel_cache
  shapes = [kernel_shapes(scale.config) for scale in file.scales]
  with console.status(
    plain(f"compiling the kernels of {counted(len(shapes), 'scale')} for {arch}")
  ):
    records = build(shapes, arch, cache, launch.parent_environment())
  seconds = sum(record["seconds"] for record in records)
  console.print(
    plain(f"{counted(len(records), 'kernel')} compiled in {seconds:.1f} s into {cache / arch}")
  )


def recorded(root: Path) -> list[tuple[Experiment, list[Run]]]:
  """The sweeps of a root, newest first, and the runs of each."""
  if not Root(root).experiments_db.exists():
    return []
  with closing(Reader(root)) as records:
    return [(e, records.runs(e.id)) for e in records.list() if e.stage == "proxy"]


def by_scale(runs: Sequence[Run]) -> dict[str, list[Run]]:
  found: dict[str, list[Run]] = defaultdict(list)
  for run in runs:
    found[run.arm.rpartition(" ")[0].partition(" ")[2]].append(run)
  return found


def outcomes(runs: Iterable[Run]) -> set[tuple[str, str]]:
  """Data and fingerprint of the runs that a sweep of this code would take up."""
  code = code_version()
  return {(r.data_digest, r.fingerprint) for r in runs if r.finished and r.code_version == code}
