"""What passes between the start of a process and its first logged step. Does not import torch."""

from __future__ import annotations

import os
import time
from pathlib import Path

PHASES = ("imports", "kernels", "ranks_and_data", "model", "first_step")


def process_age() -> float:
  """Seconds since this process started, to a clock tick of 10 ms (proc(5): starttime)."""
  fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
  return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StartUp:
  """Seconds of this process's start-up by phase of PHASES; the first begins with the process."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  def end(self, phase: str) -> None:
    """A phase ends here, and the next begins."""
    self.seconds[phase] = process_age() - sum(self.seconds.values())

  def first_step(self) -> dict[str, float]:
    """startup/{phase}_s of every phase, the last of them ending at this first call; then {}."""
    if "first_step" in self.seconds:
      return {}
    self.end("first_step")
    return {f"startup/{phase}_s": seconds for phase, seconds in self.seconds.items()}
