"""A process that executes one-rank runs one after the other: torch, kernels, data are loaded once.

`python -m nmoe.train.worker --progress FD` reads one job a line, JSON, from standard input: the
arguments of nmoe.train.loop and the log that takes this process's output meanwhile. After each it
tells the exit status. What a run computes is the same bits as in a process of its own.

It ends with its input, and after a run that failed: what the failure left behind is lost with it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
from functools import lru_cache
from pathlib import Path

import torch

from nmoe.data.prepared import open_data
from nmoe.errors import NmoeError
from nmoe.train import loop
from nmoe.train.progress import Progress
from nmoe.train.startup import process_age

DATA_SETS = 4  # the most recent ones stay open


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m nmoe.train.worker")
  parser.add_argument("--progress", type=int, required=True)
  fd = parser.parse_args().progress
  launcher, opened = Progress(fd), lru_cache(DATA_SETS)(open_data)
  for number, line in enumerate(sys.stdin):
    since = process_age() if number else 0.0
    job = json.loads(line)
    redirect(Path(job["log"]))
    try:
      options = loop.options([*job["arguments"], "--progress", str(fd)], since)
      status = loop.attempt(options, opened)
    except NmoeError as error:
      status = loop.told(error)
    clean_up()
    launcher.tell({"end": status})
    if status != 0:
      return status
  return 0


def redirect(log: Path) -> None:
  """Everything that this process writes goes to the end of `log` from now on."""
  sys.stdout.flush()
  sys.stderr.flush()
  with log.open("a") as out:
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)


def clean_up() -> None:
  """Free what a run held, so that the next one finds the device and the peaks as it did."""
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  gc.collect()
  if torch.cuda.is_initialized():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
  Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of resident memory


if __name__ == "__main__":
  sys.exit(main())
