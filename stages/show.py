"""Terminal tables: plans, the doctor's findings, the experiment records."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernels.arch import ARCHS
from kernels.tools.build import build
from nmoe.config import file as configs
from nmoe.config import plan as plans
from nmoe.config import scaling
from nmoe.config.fit import fits
from nmoe.config.sections import Config
from nmoe.config.shapes import kernel_shapes
from nmoe.data.mixture import load_mixture, phases
from nmoe.errors import ConfigError
from nmoe.machine.doctor import examine
from nmoe.records.reader import Counts, Reader
from nmoe.records.root import Root
from nmoe.train.schedule import rate_phases, remarks
from nmoe.wording import counted
from stages.launch import local as launch
from stages.report.terminal import terminal_summary
from stages.text import plain, print_lines


def plan(config: Config, console: Console) -> None:
  """Parameters, FLOPs per token and memory of a rank, every term with its formula."""
  p = plans.plan(config)
  n = p.parameters
  unit, name = _unit(n.total, ((1e9, "B"), (1e6, "M"), (1e3, "k")))
  console.print(
    plain(config.experiment.name, "bold"),
    f"on {config.target.arch} in {config.target.dtype}: {n.total / unit:,.3f} {name} parameters, "
    f"{n.active / unit:,.3f} {name} active (without embedding and head {n.body / unit:,.3f} {name} "
    f"and {n.active_body / unit:,.3f} {name})",
  )
  flops, sizes = ((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")), ((2**30, "GiB"), (2**20, "MiB"))
  console.print(_terms("FLOPs per token, forward and backward", p.flops, flops))
  console.print(_terms("Bytes of a rank at the step's peak", p.memory, sizes))
  console.print(_schedule(config))
  for remark in remarks(config):
    console.print(remark, markup=False, highlight=False, soft_wrap=True)
  console.print(_roles(config))
  if config.data.weights or config.data.weights_from:
    console.print(_mixture(config))
  if config.launch.ranks > 1:
    r = p.rdep
    console.print(
      f"RDEP buffers of a rank: balanced {r.balanced / 2**30:.3f} GiB, at capacity "
      f"{config.rdep.capacity} {r.capacity / 2**30:.3f} GiB, worst case {r.worst / 2**30:.3f} GiB"
    )
  for device in plans.DEVICES:
    if device.arch == config.target.arch:
      misfit = fits(p, device.memory_bytes)
      console.print(f"{device.name}: {'fits' if misfit is None else misfit}")


def _schedule(config: Config) -> Table:
  s = config.schedule
  title = (
    f"{counted(config.steps, 'step')} of {s.batch_tokens:,} tokens, {s.trained_tokens:,} in all: "
    "factors on the rates"
  )
  table = Table(title=title, title_justify="left")
  table.add_column("phase")
  for name in ("tokens", "steps", "first step", "last step"):
    table.add_column(name, justify="right")
  for p in rate_phases(s):
    counts = f"{p.tokens:,}", f"{p.steps:,}"
    table.add_row(p.name, *counts, f"{p.first:.4g}", f"{p.last:.4g}")
  return table


def _roles(config: Config) -> Table:
  title = (
    f"Tensors under scaling.rule = {config.scaling.rule!r}: initial std, peak and last rate, "
    "weight decay, Muon's factor"
  )
  table = Table(title=title, title_justify="left")
  table.add_column("tensor", no_wrap=True)
  for name in ("shape", "std", "rate", "last rate", "decay", "Muon's"):
    table.add_column(name, justify="right", overflow="fold")
  parts = rate_phases(config.schedule)
  factors = max(f for p in parts for f in (p.first, p.last)), parts[-1].last
  for r in scaling.roles(config):
    shape = " × ".join(map(str, r.shape))
    muon = "—" if r.muon is None else f"{r.muon:.4g}"
    rates = (f"{r.lr * factor:.3g}" for factor in factors)
    table.add_row(r.name, shape, f"{r.std:.3g}", *rates, f"{r.weight_decay:.3g}", muon)
  return table


def _mixture(config: Config) -> Table:
  """The shares of the mixture's sources over the run's tokens."""
  names = [source.name for source in load_mixture(config.data.mixture).sources]
  found = phases(names, config.data.weights, config.data.weights_from)
  ends = (*(phase.tokens for phase in found[1:]), config.schedule.trained_tokens)
  table = Table(title="Shares by training tokens", title_justify="left")
  for column in ("from", "to", "in step", *map(plain, names)):
    table.add_column(column, justify="right")
  for phase, end in zip(found, ends, strict=True):
    step = phase.tokens // config.schedule.batch_tokens
    total = sum(phase.weights.values()) if phase.weights else 0.0
    each = [f"{w / total:.4g}" for w in phase.weights.values()] if phase.weights else ()
    row = each or ["the mixture's own"] * len(names)
    table.add_row(f"{phase.tokens:,}", f"{end:,}", f"{step:,}", *row)
  return table


def _unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
  """The first of the units that a value has one of, else the last."""
  return next((one for one in units if one[0] <= value), units[-1])


def _terms(title: str, terms: tuple[plans.Term, ...], units: Sequence[tuple[float, str]]) -> Table:
  unit, name = _unit(sum(t.value for t in terms), units)
  table = Table(title=title, title_justify="left")
  table.add_column("term")
  table.add_column("formula", overflow="fold")
  table.add_column(name, justify="right")
  for term in terms:
    table.add_row(term.name, term.formula, f"{term.value / unit:,.3f}")
  table.add_row("[bold]sum[/bold]", "", f"[bold]{sum(t.value for t in terms) / unit:,.3f}[/bold]")
  return table


def doctor(path: Path | None, console: Console) -> int:
  """Print what was examined; returns 1 if anything is wrong, else 0."""
  checks = examine(None if path is None else configs.load(path))
  table = Table()
  for column in ("", "what", "found", "remedy"):
    table.add_column(column, overflow="fold")
  for check in checks:
    mark = "[green]ok[/green]" if check.ok else "[red]no[/red]"
    remedy = "" if check.ok else check.remedy
    table.add_row(mark, *map(plain, (check.name, check.found, remedy)))
  console.print(table)
  return 0 if all(check.ok for check in checks) else 1


def experiments(root: Path, console: Console) -> None:
  """Every experiment, newest first. Older are runs that were there before the hypothesis."""
  with closing(Reader(root)) as records:
    counts, listed = records.counts(), records.list()
  rows = []
  for e in listed:
    count = counts.get(e.id, Counts(0, 0, 0))
    more = f" (+ {len(e.hypotheses) - 1} more)" if len(e.hypotheses) > 1 else ""
    older = f" ({count.older} older)" if count.older else ""
    runs, claim = f"{count.completed}/{count.runs}{older}", e.headline.statement + more
    rows.append((e.id, e.stage, e.status, e.verdict, runs, claim))
  print_lines(("experiment", "stage", "status", "verdict", "runs", "hypothesis"), rows, console)


def experiment(root: Path, name: str, console: Console) -> None:
  """One experiment: hypotheses, numbers, runs, links."""
  with closing(Reader(root)) as records:
    found = records.find(name)
    runs, links = records.runs(found.id), records.links(found.id)
  console.print(terminal_summary(root, found.id))
  table = Table()
  for column in ("run", "arm", "seed", "status", "fingerprint", "commit", "error"):
    table.add_column(column, overflow="fold", no_wrap=column == "run")
  for run in runs:
    row = (run.id, run.arm, run.seed, run.status, run.fingerprint, run.commit[:10], run.error)
    table.add_row(*map(plain, row))
  console.print(table)
  for link in links:
    console.print(plain(f"{link.from_id} {link.relation} {link.to_id}: {link.note}"))


def kernels_built(path: Path, arch: str | None, console: Console) -> None:
  """Compile a configuration's kernels and say what was compiled; cached ones are left alone."""
  config = configs.load(path)
  arch = arch or config.target.arch
  if arch not in ARCHS:
    raise ConfigError(f"{arch!r} has no device code to compile; pass --arch {' or '.join(ARCHS)}")
  cache = Root(Path(config.run.root).resolve()).kernel_cache
  with console.status(plain(f"compiling the kernels of {path.name} for {arch}")):
    records = build([kernel_shapes(config)], arch, cache, launch.parent_environment())
  seconds = sum(record["seconds"] for record in records)
  console.print(plain(f"{len(records)} kernels compiled in {seconds:.1f} s into {cache / arch}"))
