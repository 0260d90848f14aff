"""Time per phase of a step, without stopping the device: CUDA events there, a wall clock on cpu."""

from __future__ import annotations

import time

import torch


class Clock:
  """Accumulates seconds per phase between two `read` calls. `read` is the only place that waits."""

  def __init__(self, device: torch.device):
    self.cuda = device.type == "cuda"
    self.marks: list[tuple[str, object]] = []
    self.start("step")

  def start(self, phase: str) -> None:
    """End the current phase and begin `phase`; on CUDA also an NVTX range of that name.

    While a CUDA graph is captured nothing runs, and the phase goes on.
    """
    if self.cuda and torch.cuda.is_current_stream_capturing():
      return
    if self.cuda:
      if self.marks:
        torch.cuda.nvtx.range_pop()
      torch.cuda.nvtx.range_push(phase)
      now = torch.cuda.Event(enable_timing=True)
      now.record()
    else:
      now = time.perf_counter()
    self.marks.append((phase, now))

  def read(self) -> dict[str, float]:
    """Seconds per phase since the last read; the current phase goes on."""
    phase = self.marks[-1][0]
    self.start(phase)
    if self.cuda:
      self.marks[-1][1].synchronize()
    seconds: dict[str, float] = {}
    for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
      elapsed = begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
      seconds[name] = seconds.get(name, 0.0) + elapsed
    self.marks = self.marks[-1:]
    return seconds
