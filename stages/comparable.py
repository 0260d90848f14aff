"""What may be compared: arms on one held-out set or suite, speeds and memory of one machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nmoe.data.heldout import differences, heldout_set
from nmoe.errors import ConfigError, RunError
from nmoe.evals.requests import by_accuracy, find_task, read_manifest
from nmoe.evals.suites import ITEMS, Suite, suite_of
from nmoe.records.measures import of_metric
from nmoe.records.reader import Hypothesis, Reader, Run, places
from stages.runs import suite_metric
from stages.workbench import Arm


def check_held_out(hypotheses: Sequence[Hypothesis], arms: Sequence[Arm]) -> None:
  """ConfigError if a metric is measured on held-out sets of which two differ."""
  metrics = [h.metric for h in hypotheses if of_metric(h.metric).heldout]
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


def check_suites(hypotheses: Sequence[Hypothesis], arms: Sequence[Arm], evals: Path) -> None:
  """ConfigError if a metric is of a suite that an arm has not, or that asks it other items, or an
  accuracy where no task has one. evals: the folder of prepared items.
  """
  metric = suite_metric(hypotheses)
  if metric is None:
    return
  for arm in arms:
    c = arm.config.eval
    suite = None if c.suite == "none" else suite_of(c.suite, c.limit)
    if suite is None or suite.name != metric.split("/")[1]:
      raise ConfigError(
        f'{metric} is not measured in arm {arm.name}, whose [eval] suite is "{c.suite}"; give all '
        "arms the same [eval] suite and limit"
      )
    first = suite_of(arms[0].config.eval.suite, arms[0].config.eval.limit)
    if suite != first:
      raise ConfigError(
        f"{metric}: arm {arm.name} would be asked {_told(suite)}, {arms[0].name} {_told(first)}; "
        "give all arms the same [eval] suite and limit"
      )
  if metric.endswith("/acc") and not any(
    by_accuracy(read_manifest(find_task(evals, task))["tasks"][task]) for task in first.tasks
  ):
    raise ConfigError(
      f"{metric}: no task of {arms[0].config.eval.suite} is judged by an accuracy, all have one "
      f"answer; choose {metric.removesuffix('acc')}bpb"
    )


def _told(suite: Suite) -> str:
  of_each = f"the first {suite.limit} documents" if suite.limit else "all documents"
  return f"{of_each} of {', '.join(suite.tasks)}"


def check_one_suite(hypotheses: Sequence[Hypothesis], runs: Sequence[Run]) -> None:
  """RunError if a metric is of a suite and completed runs were asked other items."""
  metric = suite_metric(hypotheses)
  asked = {run.results.get(ITEMS): run.id for run in runs if run.status == "completed"}
  if metric is not None and len(asked) > 1:
    told = ", ".join(f"run {run} {items or 'none that are known'}" for items, run in asked.items())
    raise RunError(
      f"{metric}: the runs were asked other items ({told}), no verdict; keep the items of {metric} "
      "as they are, then the same command runs anew what was asked others"
    )


def _held_out(arm: Arm) -> dict[str, str]:
  return heldout_set(arm.data, arm.config.data.seq_len, arm.config.data.val_tokens)


def check_one_machine(
  hypotheses: Sequence[Hypothesis], runs: Sequence[Run], records: Reader
) -> None:
  """RunError if a metric depends on the device and runs were on several, or on several versions,
  also one run that was continued on another.
  """
  metrics = [h.metric for h in hypotheses if of_metric(h.metric).device_dependent]
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
