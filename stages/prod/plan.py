"""`nmoe prod plan`: what a production run takes, before anything starts. Does not import torch.

The interval between checkpoints is Young's first-order optimum (1974): W = sqrt(2 · stall · MTTF).
The mean time to failure is that of an earlier launch of the model on as many ranks, from its
events; without failures there a host fails 6.5 times in 1,000 days (arXiv 2410.21680).
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nmoe.config import file as configs
from nmoe.config import parameters
from nmoe.config import plan as plans
from nmoe.config.sections import Config, diff, kind
from nmoe.errors import ConfigError, NmoeError
from nmoe.records import metrics
from nmoe.records.attempts import History
from nmoe.records.goodput import production
from nmoe.records.provenance import code_version
from nmoe.records.reader import Reader, Run
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.prod.evidence import Evidence, evidence
from stages.text import plain, rounded

HOST_FAILURES = 6.5e-3 / 86400  # of a host, each second
MFU = 0.3  # assumed where nothing was measured
STALL_S = 5.0  # likewise, of a checkpoint
RESTART_S = 180.0  # from a failure to training again, assumed
OUTSIDE = ("train.seed", "experiment.")  # identity keys that no speed depends on


@dataclass(frozen=True)
class Figure:
  """A number, with where it comes from."""

  value: float
  source: str


@dataclass(frozen=True)
class Plan:
  """What a run takes. `rate` is None, and what follows from it NaN, if nothing is known of it.

  rate in tokens/s, stall, mttf (mean time to failure) and interval in seconds, sizes in bytes.
  """

  config: Config
  rate: Figure | None
  stall: Figure
  mttf: Figure
  interval_s: float
  checkpoint_bytes: int
  evidence: list[Evidence]

  @property
  def step_s(self) -> float:
    return self.config.schedule.batch_tokens / self.rate.value if self.rate else math.nan

  @property
  def train_s(self) -> float:
    """Without any fault."""
    return self.step_s * self.config.steps

  @property
  def interval_steps(self) -> int:
    """Of train.checkpoint_every; 0: not known."""
    if self.rate is None:
      return 0
    return min(self.config.steps, max(1, round(self.interval_s / self.step_s)))

  def share(self, interval_s: float) -> float:
    """Of the time that trains: 1 - stall / W - (W / 2 + restart) / MTTF."""
    return 1 - self.stall.value / interval_s - (interval_s / 2 + RESTART_S) / self.mttf.value

  @property
  def storage_rate(self) -> float:
    """Bytes/s that let a write end in half an interval."""
    return 2 * self.checkpoint_bytes / self.interval_s


def plan(config: Config, path: Path, rate: float = 0.0) -> Plan:
  """rate: tokens/s to reckon with; 0: those of a run of this model on as many ranks, newest bench
  first, else of MFU of the data sheets' peak.
  """
  found, runs = _records(config, path)
  measured = _measured(config, runs)
  stall = stall_of(config, measured[1] if measured else None)
  mttf = _mttf(config, runs)
  interval_s = young(stall.value, mttf.value)
  speed = Figure(rate, "given") if rate else measured[0] if measured else _assumed(config)
  size = parameters.checkpoint_bytes(config)
  return Plan(config, speed, stall, mttf, interval_s, size, found)


def _records(config: Config, path: Path) -> tuple[list[Evidence], list[Run]]:
  """The evidence, and the runs of the root: those of benches first, each kind newest first."""
  root = Root(Path(config.run.root).resolve())
  if not root.experiments_db.exists():
    return evidence(config, path, None, ""), []
  with closing(Reader(root.path)) as records:
    experiments = sorted(records.list(), key=lambda one: one.stage != "bench")
    runs = [run for one in experiments for run in reversed(records.runs(one.id))]
    return evidence(config, path, records, code_version()), runs


def _measured(config: Config, runs: list[Run]) -> tuple[Figure, Run] | None:
  """The speed of the first run of this model, batch and number of ranks that has one."""
  for run in runs:
    rate = run.results.get("train/tokens_per_s")
    if rate and _alike(config, run):
      device = run.results.get("device", run.target)
      return Figure(rate, f"measured in run {run.id} on {device}"), run
  return None


def _alike(config: Config, run: Run) -> bool:
  try:
    other = configs.loads(run.toml, f"run {run.id}", env={})
  except NmoeError:
    return False  # of a configuration that this version does not know
  apart = diff(config, other)
  shape = ("launch.ranks", "launch.threads", "schedule.batch_tokens", "train.micro_batch")
  return not any(
    key in shape or (kind(key) == "identity" and not key.startswith(OUTSIDE)) for key in apart
  )


def _assumed(config: Config) -> Figure | None:
  peak = plans.peak_flops(config)
  if peak is None:
    return None
  flops = plans.plan(config).flops_per_token
  rate = MFU * peak * config.launch.ranks / flops
  return Figure(rate, f"assumed: {MFU:.0%} of {peak / 1e12:,.0f} TFLOP/s a GPU, nothing measured")


def young(stall_s: float, mttf_s: float) -> float:
  """Seconds between checkpoints."""
  return math.sqrt(2 * stall_s * mttf_s)


def _mttf(config: Config, runs: list[Run]) -> Figure:
  """Of the newest run of this model and ranks that has had a failure, by its hosts and these."""
  launched = _launched(config) if runs else set()
  for run in runs:
    if run.id not in launched or not _alike(config, run):
      continue
    found = production(Path(config.run.root), run.id)
    if found.mttf_s is not None:
      own = configs.loads(run.toml, f"run {run.id}", env={}).nodes
      told = f"{counted(found.failures, 'failure')} of run {run.id}"
      return Figure(found.mttf_s * own / config.nodes, told)
  told = f"assumed: {HOST_FAILURES * 86400e3:.2g} failures in 1,000 days of a host"
  return Figure(1 / (HOST_FAILURES * config.nodes), told)


def _launched(config: Config) -> set[str]:
  """The production runs of the root."""
  with closing(History(Path(config.run.root))) as records:
    return {run.id for one in records.list() if one.stage == "prod" for run in records.runs(one.id)}


def stall_of(config: Config, run: Run | None) -> Figure:
  """Seconds that a checkpoint stops the steps."""
  if run is not None:
    found = metrics.read(Path(config.run.root), run.id, ["checkpoint/stall_s"])
    if "checkpoint/stall_s" in found:
      seconds = float(np.median(found["checkpoint/stall_s"][2]))
      return Figure(seconds, f"measured in run {run.id}")
  return Figure(STALL_S, "assumed, no checkpoint measured")


def advice(config: Config, path: Path) -> str:
  """The line for train.checkpoint_every that the plan comes to."""
  found = plan(config, path)
  if found.interval_steps:
    told = f"train.checkpoint_every = {found.interval_steps}, {_long(found.interval_s)}"
    return f"set {told} by Young's formula (`nmoe prod plan {path}`)"
  return f"`nmoe prod plan {path}` says which interval"


def show(path: Path, console: Console, rate: float = 0.0) -> Plan:
  """Print the plan of a configuration. Starts and writes nothing."""
  if not 0 <= rate < math.inf:
    raise ConfigError(f"--tokens-per-s {rate:g} must be finite, and 0 or more")
  config = configs.load(path)
  found = plan(config, path, rate)
  table = Table(title=plain(f"{path}: {counted(config.steps, 'step')}"), title_justify="left")
  for column in ("what", "value", "from"):
    table.add_column(column)
  for row in (*_time(found, path), *_saving(found)):
    table.add_row(*map(plain, row))
  console.print(table)
  for one in found.evidence:
    console.print(str(one), markup=False, highlight=False, soft_wrap=True)
  return found


def _time(p: Plan, path: Path) -> list[tuple[str, str, str]]:
  c = p.config
  on = f"{counted(c.launch.ranks, 'rank')} on {counted(c.nodes, 'host')}"
  machines = ("machines", on, f"launch.engine = {c.launch.engine}")
  if p.rate is None:
    remedy = f"`nmoe bench step {path}` measures it; or give --tokens-per-s"
    return [machines, ("tokens/s", "not known", remedy)]
  hours, share = p.train_s / 3600, p.share(p.interval_s)
  work = f"{c.schedule.trained_tokens:,} tokens, {p.step_s:.3g} s a step"
  return [
    machines,
    ("tokens/s", f"{p.rate.value:,.0f}", p.rate.source),
    ("wall time", _long(p.train_s / share), work),
    ("device hours", _count(hours * c.launch.ranks / share), f"{share:.2%} of the time trains"),
    ("failures", f"{_count(p.train_s / p.mttf.value)} in that time", "one a time between failures"),
  ]


def _saving(p: Plan) -> list[tuple[str, str, str]]:
  every = p.config.train.checkpoint_every
  young = "Young: sqrt(2 · stall · time between failures)"
  rows = [
    ("between failures", _long(p.mttf.value), p.mttf.source),
    ("checkpoint stall", f"{p.stall.value:.3g} s", p.stall.source),
    ("best interval", _interval(p.interval_s, p.interval_steps), young),
  ]
  if every:
    source, interval = "train.checkpoint_every", counted(every, "step")
    if p.rate is not None:
      own = every * p.step_s
      source, interval = f"{source}: {p.share(own):.2%} of the time trains", _interval(own, every)
    rows.append(("interval as set", interval, source))
  keep = p.config.train.keep_checkpoints
  return [
    *rows,
    ("a checkpoint", rounded(p.checkpoint_bytes, "B"), "weights, masters, moments"),
    ("storage rate", rounded(p.storage_rate, "B/s"), "a write ends in half the best interval"),
    ("storage", rounded(parameters.kept_bytes(p.config), "B"), f"{keep} kept, one being written"),
  ]


def _interval(seconds: float, steps: int) -> str:
  return f"{_long(seconds)}, {counted(steps, 'step')}" if steps else _long(seconds)


def _long(seconds: float) -> str:
  """A time in the unit that fits it."""
  for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
    if seconds >= 2 * size:
      return f"{seconds / size:,.3g} {unit}"
  return f"{seconds:.3g} s"


def _count(number: float) -> str:
  return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
