"""A dashboard and a trainer beside each other for long: what either costs the other.

`PYTHONPATH=. python tests/endure_viz.py flush`: ten minutes of a trainer that flushes 100 tags
twice a second while three browsers look on; how long it waited for its log lines, which a thread
flushes, and how long those flushes took. `... heap`: 3,600 refreshes of the table of runs, ten a
second; what the page's heap and the server's memory grew by. A second number: how much of it, in
minutes or refreshes. A third, for heap: seconds between two refreshes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import uvicorn
from chrome import chrome
from roots import add_loads, curves, fill, start_run

from nmoe.config import file as configs
from nmoe.errors import RecordError
from nmoe.records.experiments import Experiments
from nmoe.records.live import Live
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Hypothesis
from stages.viz.server import Server

REPO = Path(__file__).resolve().parents[1]
RUNS, LAYERS, EXPERTS = 12, 12, 16
STEP = np.arange(1, 1001) * 10
HEAP = "(gc(), performance.memory.usedJSHeapSize)"


def make(root: Path) -> list[str]:
  """Runs of one arm; the last one is written on."""
  records = Experiments(root)
  claim = Hypothesis("It endures.", "val/bpb", "none", 0.0)
  experiment = records.create("long", "research", [claim])
  toml = configs.to_toml(configs.load(REPO / "configs/moonlet/cpu.toml", env={}))
  ids = []
  for seed in range(RUNS):
    ids.append(start_run(records, experiment.id, "arm", seed, toml=toml).id)
    fill(root, ids[-1], 0, STEP, curves(STEP, seed, 0.0, LAYERS))
  add_loads(root, ids[-1], STEP[::50], LAYERS, EXPERTS)
  records.close()
  return ids


def write(root: Path, run: str, every_s: float, seconds: float) -> None:
  """Be a trainer: log a line, of which a thread begins the flush, and wait for that; print how long
  both took and whether rows had to wait beside.
  """
  writer, step = Metrics(root, run, batch=1), int(STEP[-1])
  values = {tag: float(of[-1]) for tag, of in curves(STEP, 0, 0.0, LAYERS).items()}
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    step += 10
    began, used, waited, error = time.perf_counter(), time.process_time(), 0.0, ""
    try:
      writer.add(step, 1000 * step, values)
      waited = time.perf_counter() - began
      writer.flush()
    except RecordError as refused:
      error = str(refused)
    took, cpu = time.perf_counter() - began, time.process_time() - used
    line = {"waited": waited, "s": took, "cpu": cpu, "beside": writer.beside.exists()}
    sys.stdout.write(json.dumps(line | {"error": error}) + "\n")
    sys.stdout.flush()
    time.sleep(max(0.0, every_s - took))


@contextmanager
def served(root: Path, cache: Path, every_s: float):
  """The address of a server that looks at its files every so often."""
  config = uvicorn.Config(Server(Live(root, cache), every_s).app(), port=0, log_level="warning")
  config.timeout_graceful_shutdown = 1
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    time.sleep(0.02)
  (socket,) = server.servers[0].sockets
  try:
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join(20)


def trainer(root: Path, run: str, every_s: float, seconds: float, told: IO) -> subprocess.Popen:
  command = [sys.executable, __file__, "write", str(root), run, str(every_s), str(seconds)]
  return subprocess.Popen(command, stdout=told, text=True)


def flush(minutes: float) -> None:
  with ExitStack() as stack:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    ids = make(folder / "root")
    address = stack.enter_context(served(folder / "root", folder / "cache", 1.0))
    browser, pages = shutil.which("chromium") or shutil.which("google-chrome"), []
    for i, path in enumerate(("/", f"/run/{ids[-1]}", f"/run/{ids[-1]}/router")):
      page = stack.enter_context(chrome(browser, folder / f"profile-{i}"))
      page.size(1280, 1000)
      page.open(address + path)
      page.wait("document.querySelectorAll('.panel canvas').length > 2")
      pages.append(page)
    told_file = stack.enter_context((folder / "told").open("w"))
    writer = trainer(folder / "root", ids[-1], 0.5, 60 * minutes, told_file)
    heaps = []
    while writer.poll() is None:
      time.sleep(5)
      heaps.append([page.ask(HEAP) / 1e6 for page in pages])
      assert not any(page.errors for page in pages), [page.errors for page in pages]
    told = [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    told.sort(key=lambda line: line["s"])
    took, waited = ([1000 * line[of] for line in told] for of in ("s", "waited"))
    slow = [f"{1000 * line['s']:.0f} ({1000 * line['cpu']:.0f} of CPU)" for line in told[-3:]]
    errors = [line["error"] for line in told if line["error"]]
    beside = sum(line["beside"] for line in told)
    asked = [sum("/api/series" in url for url in page.requests) for page in pages]
  sys.stdout.write(
    f"{len(took)} lines in {minutes:g} min, waited for: median {statistics.median(waited):.2f} ms, "
    f"worst {max(waited):.1f} ms; their flushes: median {statistics.median(took):.0f} ms, "
    f"99 % {took[int(0.99 * len(took))]:.0f} ms, worst {', '.join(slow)} ms; load average "
    f"{os.getloadavg()[0]:.1f}; {beside} kept beside; {len(errors)} errors {errors[:1]}; "
    f"{asked} refreshes of the three pages, heaps {_mb(heaps[2])} MB then, {_mb(heaps[-1])} now\n"
  )


def _mb(sizes: list[float]) -> str:
  return ", ".join(f"{size:.1f}" for size in sizes)


def heap(refreshes: float, every_s: float) -> None:
  with ExitStack() as stack:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    ids = make(folder / "root")
    address = stack.enter_context(served(folder / "root", folder / "cache", every_s))
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    page = stack.enter_context(chrome(browser, folder / "profile"))
    page.size(1280, 1000)
    page.open(address + "/?x=step")
    page.wait("document.querySelectorAll('.panel canvas').length == 6")
    nothing = stack.enter_context(open(os.devnull, "w"))
    writer = trainer(folder / "root", ids[-1], every_s, 24 * 3600, nothing)
    began, heaps, resident, count = time.monotonic(), [], [], 0
    while count < refreshes:
      time.sleep(5)
      heaps.append(page.ask(HEAP) / 1e6)
      resident.append(_resident_mb())
      # the table's small curves are asked for beside the panels, once each
      count = sum("/api/series" in url and "apart=" not in url for url in page.requests)
    writer.terminate()
    assert page.errors == [], page.errors
  sys.stdout.write(f"{count} refreshes in {time.monotonic() - began:.0f} s, load average ")
  sys.stdout.write(
    f"{os.getloadavg()[0]:.1f}: {_grew('heap', heaps)}; {_grew('server', resident)}\n"
  )


def _grew(name: str, sizes: list[float]) -> str:
  """In words, without the first tenth: pages and caches fill."""
  tenth = max(1, len(sizes) // 10)
  first, last = (statistics.median(part) for part in (sizes[tenth : 2 * tenth], sizes[-tenth:]))
  return (
    f"{name} {sizes[0]:.1f} MB at first, {first:.1f} in the second tenth, {last:.1f} in the last, "
    f"{max(sizes):.1f} at most"
  )


def _resident_mb() -> float:
  """Of this process, which is the server."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
  what, *rest = sys.argv[1:]
  if what == "write":
    write(Path(rest[0]), rest[1], float(rest[2]), float(rest[3]))
  elif what == "flush":
    flush(float(rest[0]) if rest else 10)
  else:
    refreshes, every_s = [*map(float, rest), *(3600, 0.1)[len(rest) :]]
    heap(refreshes, every_s)
