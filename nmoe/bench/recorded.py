"""A measurement as a recorded run: what rank 0 measured, or what failed, stands in its record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.distributed.meeting import Meeting, shared_run
from nmoe.errors import NmoeError
from nmoe.records.experiments import Experiments
from nmoe.records.provenance import check_code

Measure = Callable[[argparse.Namespace, Config, Meeting], dict[str, Any]]


def recorded(options: argparse.Namespace, measure: Measure) -> int:
  """measure(options, the run's configuration, where its ranks met) on every rank; the exit status.
  Its value on rank 0 becomes the run's results.
  """
  try:
    meeting = Meeting.of(options)
    if options.rank > 0:
      run = shared_run(meeting)
      check_code(run.id, run.code_version)
      measure(options, configs.loads(run.toml, f"run {run.id}", env={}), meeting)
    else:
      _first(options, meeting, measure)
  except NmoeError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1
  return 0


def _first(options: argparse.Namespace, meeting: Meeting, measure: Measure) -> None:
  """Rank 0 owns the record meanwhile."""
  with closing(Experiments(options.root)) as records:
    run = shared_run(meeting, lambda: records.claim(options.run))
    try:
      check_code(run.id, run.code_version)
      found = measure(options, configs.loads(run.toml, f"run {run.id}", env={}), meeting)
    except BaseException as error:
      name = "" if isinstance(error, NmoeError) else f"{type(error).__name__}: "
      records.update_run(run.id, status="failed", error=f"{name}{error}")
      raise
    records.update_run(run.id, status="completed", results=found)
