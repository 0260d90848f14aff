"""A profile of a few steps: the trace for a viewer and the kernels' times as a table."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

SKIP, STEPS = 12, 3  # steps before the profile, steps in it; fewer in a short run


class Profiler:
  """Does nothing without a folder; else writes trace.json and kernels.json there.

  kernels.json: device kernel name -> [milliseconds, launches] of one step. enter: called with
  "profiling" before both are written, which takes longer than any step.
  """

  def __init__(
    self, folder: Path | None, total: int, enter: Callable[[str], None] = lambda state: None
  ):
    self._profile, self._folder, self._enter = None, folder, enter
    self._steps = max(1, min(STEPS, total - 1))
    if folder is not None:
      folder.mkdir(parents=True, exist_ok=True)
      wait = max(0, min(SKIP, total - self._steps) - 1)
      self._left = wait + 1 + self._steps
      self._profile = profile(
        activities=supported_activities(),
        schedule=schedule(wait=wait, warmup=1, active=self._steps, repeat=1),
        on_trace_ready=self._write,
      )
      self._profile.start()

  def step(self) -> None:
    if self._profile is not None:
      self._left -= 1
      if self._left == 0:
        self._enter("profiling")
      self._profile.step()

  def _write(self, done: profile) -> None:
    done.export_chrome_trace(str(self._folder / "trace.json"))
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in done.events():
      if event.device_type.name == "CUDA" and not event.name.startswith("ProfilerStep"):
        kernels[event.name][0] += event.device_time_total / 1e3 / self._steps
        kernels[event.name][1] += 1 / self._steps
    table = dict(sorted(kernels.items(), key=lambda item: -item[1][0]))
    (self._folder / "kernels.json").write_text(json.dumps(table, indent=1))
