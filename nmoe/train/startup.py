"""What passes between the start of a process and its first logged step. Does not import torch."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

PHASES = ("imports", "kernels", "ranks_and_data", "model", "first_step")


def parser(module: str) -> argparse.ArgumentParser:
  """Of the arguments that a launcher gives every rank, whatever it runs."""
  p = argparse.ArgumentParser(prog=f"python -m {module}")
  p.add_argument("--root", type=Path, required=True)
  p.add_argument("--run", required=True, help="a recorded run of the root")
  p.add_argument("--rank", type=int, default=0)
  p.add_argument("--ranks", type=int, default=1, help="of the run")
  p.add_argument("--local-rank", type=int, help="among the ranks of this host; default: --rank")
  p.add_argument("--local-ranks", type=int, help="on this host; default: all of the run")
  p.add_argument("--rendezvous", help="where the ranks meet: a URL, as torch.distributed's")
  p.add_argument("--deadline", type=float, help="seconds that they wait for each other to come")
  p.add_argument("--progress", type=int, help="the descriptor of a pipe for messages")
  p.add_argument("--heartbeat", type=Path, help="a file that says how far the run is")
  p.add_argument("--attempt", type=int, default=0, help="of a production run; 0: it is none")
  return p


def process_age() -> float:
  """Seconds since this process started, to a clock tick of 10 ms (proc(5): starttime)."""
  fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
  return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StartUp:
  """Seconds of a run's start-up by phase of PHASES; the first begins when this process was `since`
  seconds old: 0, but for a process that executes one run after another.
  """

  def __init__(self, since: float = 0.0):
    self.since = since
    self.seconds: dict[str, float] = {}
    self.rewound = 0  # steps that an earlier process logged after the checkpoint

  def end(self, phase: str) -> None:
    """A phase ends here, and the next begins."""
    self.seconds[phase] = process_age() - self.since - sum(self.seconds.values())

  def first_step(self) -> dict[str, float]:
    """startup/{phase}_s of every phase, the last of them ending at this first call, and
    startup/rewound_steps where there are some; then {}.
    """
    if "first_step" in self.seconds:
      return {}
    self.end("first_step")
    rewound = {"startup/rewound_steps": float(self.rewound)} if self.rewound else {}
    return {f"startup/{phase}_s": seconds for phase, seconds in self.seconds.items()} | rewound
