"""What may be compared: arms on one held-out set, speeds and memory of one machine."""

from __future__ import annotations

from collections.abc import Sequence

from nmoe.data.heldout import differences, heldout_set
from nmoe.errors import ConfigError, RunError
from nmoe.records.measures import MEASURES
from nmoe.records.reader import Hypothesis, Reader, Run, places
from stages.workbench import Arm


def check_held_out(hypotheses: Sequence[Hypothesis], arms: Sequence[Arm]) -> None:
  """ConfigError if a metric is measured on held-out sets of which two differ."""
  metrics = [h.metric for h in hypotheses if MEASURES[h.metric].heldout]
  first, *others = arms
  if not metrics or not others:
    return
  ours = _held_out(first)
  for other in others:
    theirs = _held_out(other)
    for metric in metrics:
      keys = differences(metric, ours, theirs)
      if keys:
        told = ", ".join(f"{key} ({ours[key]} against {theirs[key]})" for key in keys)
        raise ConfigError(
          f"{first.name} and {other.name} have different held-out sets, on which {metric} must not "
          f"be compared: {told}; evaluate both on one set, or choose another experiment.metric"
        )


def _held_out(arm: Arm) -> dict[str, str]:
  return heldout_set(arm.data, arm.config.data.seq_len, arm.config.data.val_tokens)


def check_one_machine(
  hypotheses: Sequence[Hypothesis], runs: Sequence[Run], records: Reader
) -> None:
  """RunError if a metric depends on the device and runs were on several, or on several versions,
  also one run that was continued on another.
  """
  metrics = [h.metric for h in hypotheses if MEASURES[h.metric].device_dependent]
  moved = [run.id for run in runs if metrics and len(places(records.starts(run.id))) > 1]
  if moved:
    raise RunError(
      f"{metrics[0]} depends on the machine, but {', '.join(moved)} began on one and was continued "
      "on another, or with other versions, no verdict; run again: other runs take their place"
    )
  machines = {machine(run): run for run in runs if run.status == "completed"}
  if metrics and len(machines) > 1:
    told = "; ".join(f"run {run.id}: {' '.join(name)}" for name, run in machines.items())
    raise RunError(
      f"{metrics[0]} depends on the machine and must not be compared between several, no verdict: "
      f"{told}; run all arms on one machine with one set of versions"
    )


def machine(run: Run) -> tuple[str, ...]:
  """A run's device and the versions of its libraries."""
  versions = (f"{name} {value}" for name, value in sorted(run.environment.items()))
  return str(run.results.get("device", "")), *versions
