"""`nmoe prod check`: the ranks of a configuration are started by its engine, on its hosts, and say
whether they are fit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from nmoe.config import file as configs
from nmoe.config.parameters import kept_bytes
from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.records.reader import Run
from nmoe.records.root import Root
from stages.judge.table import Judgement
from stages.launch.display import Display
from stages.launch.local import Job
from stages.prod import hosts
from stages.proofs.shortened import claim, named
from stages.runs import carrying
from stages.text import plain
from stages.workbench import Arm, Workbench

NO_DATA = Path("")
STATEMENT = "The machine is fit for this configuration."
PREFLIGHT = "nmoe.bench.preflight"
POLL_S = 2.0  # a scheduler is asked this often
LEAVE_S = 120.0  # a job whose ranks have said all may take this long to leave its queue
SLOW = 0.9  # of the median rate: slower is a straggler


@dataclass(frozen=True)
class Finding:
  """One thing that was checked; `fault` names what is wrong and what to do, "" if nothing."""

  what: str
  found: str
  fault: str = ""


def check(path: Path, console: Console) -> list[Finding]:
  """Start the ranks for a few seconds; print the findings and record them as a check.

  RunError if one is a fault, or if the hosts differ: the ranks themselves find that first.
  """
  config = configs.load(path)
  seed = config.train.seed
  with Workbench.open(config.run.root, console, anew=True) as bench:
    arm = Arm("preflight", config, NO_DATA)
    asked = (named("prod-check", path), claim(STATEMENT, config), [arm], [seed])
    with carrying(bench, "check", *asked) as work, Display(console) as display:
      run = work.start(arm, seed)
      if config.launch.engine == "local":
        done = work.execute(Job(run.id, config, PREFLIGHT), display)
      else:
        line = display.line("preflight", 1, f"queued {run.id}")
        done = elsewhere(config, run.id, bench, line.idle)
        line.end(done.status)
      work.check([done])
      findings = list(judged(done.results["ranks"], kept_bytes(config)))
      faults = [one for one in findings if one.fault]
      verdict = "refuted" if faults else "confirmed"
      rows = {"rows": [vars(one) for one in findings]}
      reason = f"{len(findings) - len(faults)} of {len(findings)} checks hold."
      work.conclude(Judgement(verdict, reason, rows), [done])
  _show(findings, console)
  if faults:
    raise RunError(f"{path}: {'; '.join(f'{one.what}: {one.fault}' for one in faults)}")
  return findings


def elsewhere(config: Config, run_id: str, bench: Workbench, idle: Callable[[], None]) -> Run:
  """The run of a preflight that the engine's own job executes, once it has an outcome and the job
  is gone: its hosts are free then, and nothing of it writes. It may take LEAVE_S to go.

  RunError if the job is gone without an outcome.
  """
  deadline = float("inf")
  path = hosts.generate(config, run_id, bench.root, preflight=True)
  hosts.submit(config, run_id, path, bench.console)
  while True:
    over = not hosts.job_of(config, run_id)
    found = bench.experiments.run(run_id)
    if found.status in ("completed", "failed"):
      deadline = min(deadline, time.monotonic() + LEAVE_S)
      if over or time.monotonic() > deadline:
        return found
    elif over:
      logs = Root(bench.root).logs(run_id)
      raise RunError(f"run {run_id}: the job ended without an outcome; see {logs}")
    idle()
    time.sleep(POLL_S)


def judged(ranks: Sequence[Mapping[str, Any]], needed: float) -> Iterator[Finding]:
  """What the ranks' reports come to; needed: bytes of the checkpoints that the run keeps."""
  usual, _ = Counter(one["bits"] for one in ranks).most_common(1)[0]
  odd = [_name(one) for one in ranks if one["bits"] != usual or not one["steady"]]
  fault = f"{', '.join(odd)} computes other bits; take it out" if odd else ""
  yield Finding("the same product on all ranks", f"{len(ranks) - len(odd)} of {len(ranks)}", fault)
  middle = median(one["tflops"] for one in ranks)
  slow = [f"{_name(one)} {one['tflops']:.3g}" for one in ranks if one["tflops"] < SLOW * middle]
  yield Finding("TFLOP/s, median", f"{middle:.3g}", _slow(slow, ranks))
  open_ = [_name(one) for one in ranks if not one["locks"]]
  fault = (
    f"{', '.join(open_)} took a lock that rank 0 held: file locks do not hold between these hosts; "
    "put run.root on a filesystem where they do (Lustre: mount with -o flock)"
  )
  held = f"{len(ranks) - len(open_)} of {len(ranks)}"
  yield Finding("a lock keeps others out", held, fault if open_ else "")
  if len(ranks) > 1:
    slowest = min(one["sum_gb_s"] for one in ranks)
    yield Finding("sums of gradients, GB/s", f"{slowest:.3g}")
  yield Finding("all write at once, GB/s", f"{sum(one['write_gb_s'] for one in ranks):.3g}")
  free = min(one["free_bytes"] for one in ranks)
  fault = f"checkpoints take {needed / 1e9:.1f} GB; free space or move run.root"
  yield Finding("free space, GB", f"{free / 1e9:.1f}", fault if free < needed else "")


def _slow(slow: Sequence[str], ranks: Sequence[Mapping[str, Any]]) -> str:
  """Processors that are slower than the median; on a CPU the cores' other work decides that."""
  if not slow or ranks[0]["processor"].find("NVIDIA") < 0:
    return ""
  return f"slower: {', '.join(slow)}; look at its clocks and temperature, or take it out"


def _name(one: Mapping[str, Any]) -> str:
  return f"rank {one['rank']} on {one['host']}"


def _show(findings: Sequence[Finding], console: Console) -> None:
  table = Table()
  for column in ("what", "found", "fault"):
    table.add_column(column)
  for one in findings:
    table.add_row(plain(one.what), plain(one.found), plain(one.fault or "none"))
  console.print(table)
