"""`nmoe bench step`: what one step costs, phase by phase, from the metrics of a real run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nmoe.config import file as configs
from nmoe.config import plan
from nmoe.config.sections import Config
from nmoe.errors import ConfigError
from nmoe.files import check_out
from nmoe.records.metrics import Series, read
from nmoe.records.provenance import REPO
from nmoe.records.reader import Run
from nmoe.train.progress import Entry
from nmoe.train.startup import PHASES as STARTUP
from nmoe.train.startup import process_age
from nmoe.wording import counted
from stages.judge.intervals import student_t
from stages.judge.table import Judgement
from stages.launch.display import Display
from stages.proofs.shortened import claim, named, shortened
from stages.proofs.timeline import OTHER, Timeline, kernel_name, timeline
from stages.runs import carrying
from stages.text import plain
from stages.workbench import Workbench

COMPUTE = ("forward", "backward", "graph", "clip", "step", "gather")
STATEMENT = "What a training step costs."
LONGEST = 8  # kernels that are named
INTERVALS = 20  # measured stretches of a run; the first is the warm-up and is dropped


@dataclass(frozen=True)
class StepBench:
  """Milliseconds a step, one value per stretch of steps; phases add up to the whole."""

  device: str
  commit: str
  steps: int
  ms: list[float]
  phases_ms: dict[str, list[float]]
  tokens_per_s: float
  loader_tokens_per_s: float
  flops_terms: dict[str, float]
  mfu: float  # of the data sheet's dense peak; on a CPU, of what a matrix product reached there
  peak_bytes: float
  retries: int  # times that a rank's allocator freed its cache to find room, after the first log
  first_step: int  # the first logged one
  first_step_s: float  # from the start of the command's process to its line, data_s included
  data_s: float  # for finding or preparing the data
  startup_s: dict[str, float]  # of rank 0, by phase, from its own start to the same line
  routing: str  # what the times are of: forced or real routing, and how uneven
  timeline: Timeline | None  # of the GPU, where it was profiled

  @property
  def outside(self) -> float:
    """The share of a step outside forward, backward and optimizer; the median of the stretches."""
    inside = np.sum([self.phases_ms[name] for name in COMPUTE if name in self.phases_ms], axis=0)
    return float(np.median(1 - inside / np.array(self.ms)))


def step(
  path: Path,
  steps: int,
  console: Console,
  against: Sequence[Path] = (),
  out: Path | None = None,
  trace: Path | None = None,
) -> StepBench:
  """Run `steps` training steps of a configuration as a child process and report what they cost.

  against: measurements of earlier runs, of one configuration.
  """
  check_out(out)
  config = configs.load(path)
  before = [_earlier(path) for path in against]
  warmup = min(config.schedule.warmup_tokens, steps * config.schedule.batch_tokens)
  if config.nodes > 1:
    raise ConfigError(
      f"{path}: has {counted(config.launch.ranks, 'rank')} on {counted(config.nodes, 'host')}, and "
      f"the bench measures on this one; give a configuration of {config.node_ranks}"
    )
  config = shortened(config, steps, keep=0)
  values = {"launch.engine": "local", "schedule.warmup_tokens": warmup}
  values |= {"train.log_every": max(1, steps // INTERVALS)}
  config = configs.changed(config, values)
  with Workbench.open(config.run.root, console, anew=True) as bench:
    begun = time.monotonic()
    arm = bench.arm(path.stem, config)
    data_s = time.monotonic() - begun
    arrived: list[tuple[int, float]] = []

    def follow(entry: Entry) -> None:
      arrived.append((entry.step, process_age()))

    asked = (named("bench", path), claim(STATEMENT, config), [arm], [config.train.seed])
    with carrying(bench, "bench", *asked) as work:
      with Display(console) as display:
        run = work.repeat(arm, config.train.seed, display, trace, follow)
      work.check([run])
      found = _measure(bench, run, config, arm.data, arrived[0], data_s)
      if trace is not None:
        found = replace(found, timeline=timeline(trace / "trace.json"))
      reason = f"{float(np.median(found.ms)):.3f} ms a step on {found.device}."
      work.conclude(Judgement("measured", reason, asdict(found)), [run])
  _show(found, console)
  if found.timeline is not None:
    _show_timeline(found.timeline, console)
  if before:
    names = ", ".join(p.name for p in against)
    console.print(plain(change(float(np.median(found.ms)), before, names)))
  if out is not None:
    out.write_text(json.dumps(asdict(found), indent=1))
  return found


def _measure(
  bench: Workbench,
  run: Run,
  config: Config,
  data: Path,
  first: tuple[int, float],
  data_s: float,
) -> StepBench:
  series = read(bench.root, run.id)
  logged = series["train/loss"][0]
  phases = phases_ms(series)
  ms = np.sum(list(phases.values()), axis=0).tolist()
  rate = config.schedule.batch_tokens / float(np.median(ms)) * 1e3
  return StepBench(
    device=run.results["device"],
    commit=run.commit,
    steps=int(logged[-1] - logged[0]),
    ms=ms,
    phases_ms=phases,
    tokens_per_s=rate,
    loader_tokens_per_s=loader_rate(config, data),
    flops_terms={term.name: term.value for term in plan.plan(config).flops},
    mfu=float(np.median(series["train/mfu"][2])),
    peak_bytes=float(series["memory/peak_bytes"][2].max()),
    retries=max(
      retries_of(read(bench.root, run.id, ["memory/retries"], rank))
      for rank in range(config.launch.ranks)
    ),
    first_step=first[0],
    first_step_s=first[1],
    data_s=data_s,
    startup_s={phase: float(series[f"startup/{phase}_s"][2][0]) for phase in STARTUP},
    routing=routing_of(config, series),
    timeline=None,
  )


def routing_of(config: Config, series: Mapping[str, Series]) -> str:
  """Which routing the last logged step had; a real one as it was then, by its layers.

  At full rates from the first step on, routing collapses: the warm-up is the configuration's.
  """
  last = {tag: float(values[-1]) for tag, (*_, values) in series.items()}
  uneven = [x for tag, x in last.items() if tag.endswith("/load_max_over_mean")]
  if config.moe.forced_balance or not uneven:
    return "forced balance" if uneven else "none, the model is dense"
  warmup = math.ceil(config.schedule.warmup_tokens / config.schedule.batch_tokens)
  dead = sum(x for tag, x in last.items() if tag.endswith("/dead"))
  waited, full = (int(last.get(f"rdep/{name}_passes", 0)) for name in ("waiting", "full"))
  waits = ""
  if waited:
    (*_, needed) = series["rdep/capacity_needed"]
    last_needed, most_needed = (math.ceil(100 * x) / 100 for x in (needed[-1], needed.max()))
    waits = (
      f"; of {config.steps * config.micro_batches} forward passes {full} had more rows than "
      f"rdep.capacity, {config.rdep.capacity:g}, and {waited} waited for counts: of the logged "
      f"micro-batches the last needed {last_needed:.2f}, one {most_needed:.2f}"
    )
  return (
    f"real, after {config.steps} steps, {warmup} of them warm-up: the fullest expert has "
    f"{min(uneven):.2f} to {max(uneven):.2f} times the mean of its layer, {dead:.0f} of "
    f"{len(uneven) * config.moe.num_experts} experts are dead{waits}"
  )


def retries_of(series: Mapping[str, Series]) -> int:
  """How often the allocator freed its cache between the first and the last log; 0 on a CPU."""
  (*_, counts) = series.get("memory/retries", (np.zeros(1),))
  return int(counts[-1] - counts[0])


def phases_ms(series: Mapping[str, Series]) -> dict[str, list[float]]:
  """Milliseconds a step of each phase in every stretch between logs but the first; zero where a
  stretch does not enter it. Phases that only the first enters are left out.
  """
  logged = series["train/loss"][0]
  found = {}
  for tag, (steps, _, seconds) in series.items():
    if tag.startswith("time/"):
      ms = np.zeros(len(logged))
      ms[np.searchsorted(logged, steps)] = 1e3 * seconds
      if ms[1:].any():
        found[tag.removeprefix("time/").removesuffix("_s")] = (ms[1:] / np.diff(logged)).tolist()
  return found


def loader_rate(config: Config, data: Path) -> float:
  """Tokens per second of the loader alone, in a process of its own: this one never needs torch."""
  given = (str(data.resolve()), str(config.data.seq_len), str(config.train.seed))
  command = [sys.executable, "-m", "nmoe.bench.loader", *given]
  done = subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True)
  return float(done.stdout)


def _show(b: StepBench, console: Console) -> None:
  table = Table(title=f"{counted(b.steps, 'step')} on {b.device}")
  for column in ("phase", "ms/step (median)", "spread (p5–p95)", "share"):
    table.add_column(column, justify="left" if column == "phase" else "right")
  whole = float(np.median(b.ms))
  for name, values in [*b.phases_ms.items(), ("step, whole", b.ms)]:
    low, mid, high = np.percentile(values, [5, 50, 95])
    table.add_row(name, f"{mid:.3f}", f"{low:.3f}–{high:.3f}", f"{mid / whole:.1%}")
  console.print(table)
  console.print(f"outside forward, backward and optimizer: {b.outside:.2%} of a step")
  console.print(
    f"{b.tokens_per_s:,.0f} tokens/s; loader alone {b.loader_tokens_per_s / 1e6:,.1f} M tokens/s"
  )
  terms = " + ".join(f"{name} {value / 1e6:,.1f}" for name, value in b.flops_terms.items())
  console.print(
    f"MFLOP per token, forward and backward: {terms} = {sum(b.flops_terms.values()) / 1e6:,.1f}"
  )
  console.print(
    f"step {b.first_step}, the first logged: {b.first_step_s:.1f} s after the command's start, "
    f"{b.data_s:.1f} s of it for data"
  )
  console.print(
    "the training process: "
    + ", ".join(f"{phase.replace('_', ' ')} {s:.1f} s" for phase, s in b.startup_s.items())
  )
  console.print(f"routing: {b.routing}")
  console.print(f"MFU {b.mfu:.1%}; peak memory {b.peak_bytes / 2**30:.2f} GiB")
  if b.retries:
    console.print(
      f"memory ran short {counted(b.retries, 'time')}: torch waited for the GPU and freed its cache"
    )


def _show_timeline(t: Timeline, console: Console) -> None:
  title = f"a profiled step of {t.ms:.1f} ms: what each part adds to those above it"
  table = Table(title=title, title_justify="left")
  for column in ("part", "ms", "share"):
    table.add_column(column, justify="left" if column == "part" else "right")
  for name, ms in t.parts.items():
    table.add_row(name, f"{ms:.2f}", f"{ms / t.ms:.1%}")
  console.print(table)
  most = ", ".join(
    f"{kernel_name(name)} {ms:.1f}" for name, ms in list(t.exposed.items())[:LONGEST]
  )
  console.print(f"{OTHER}, ms each: {most}", soft_wrap=True)
  console.print(f"{t.kernels:,.0f} kernels and copies a step, {t.host_waits:.1f} waits of the host")


def _earlier(path: Path) -> float:
  """Median milliseconds a step of an earlier measurement: neither a stall nor the stretch in which
  a profile is written is what a step costs.
  """
  try:
    return float(np.median(np.array(json.loads(path.read_text())["ms"], dtype=np.float64)))
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise ConfigError(f"{path} is not a measurement of `nmoe bench step --out`: {error}") from error


def change(ms: float, before: Sequence[float], names: str) -> str:
  """The change of ms/step from the mean of earlier runs, with a 95 % interval if there are several.

  Runs are the replicates: the stretches of one run share its machine, its memory layout and its
  temperature. The interval is Student's for one new run: t(0.975, n − 1) · sd · √(1 + 1/n).
  """
  mean, n = float(np.mean(before)), len(before)
  delta = ms - mean
  said = f"against {names}: {delta:+.3f} ms/step, {delta / mean:+.2%}"
  if n == 1:
    return f"{said}; of one run each there is no interval: give --against for several earlier runs"
  half = student_t(0.975, n - 1) * float(np.std(before, ddof=1)) * math.sqrt(1 + 1 / n)
  return f"{said} (95 % interval {delta - half:+.3f} to {delta + half:+.3f}, {n} earlier runs)"
