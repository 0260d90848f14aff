"""The gate of a production launch: what must be known before it spends anything.

Experiments that the configuration cites must be confirmed, of stage proxy or ablate, and agree with
it in identity keys, but for its size. `check ep`, `check resume` and `prod check` of this very
configuration and code must have passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff, kind
from nmoe.errors import NmoeError
from nmoe.records.reader import Experiment, Reader, Run

STAGES = ("proxy", "ablate")
SIZE = (
  "model.",
  "moe.num_experts",
  "moe.expert_dim",
  "moe.top_k",
  "data.",
)  # may differ, by prefix
ASIDE = ("train.seed", "target.", "experiment.")
CHECKS = {  # the start of a check's name -> the command that makes it; of several ranks or any
  "check-resume": "nmoe check resume {path}",
  "check-ep": "nmoe check ep {path}",
  "prod-check": "nmoe prod check {path}",
}


@dataclass(frozen=True)
class Evidence:
  """One thing that a launch rests on; `lack` says what is missing and what to do, "" if nothing."""

  what: str
  experiment: str  # its id, "" if there is none
  lack: str = ""


def evidence(config: Config, path: Path, records: Reader, code_version: str) -> list[Evidence]:
  """All that a launch of the configuration rests on, what is missing among it."""
  found = [_cited(config, name, records) for name in config.prod.evidence]
  if not found:
    found.append(
      Evidence("evidence", "", 'prod.evidence cites no experiment; add one: evidence = ["NAME"]')
    )
  for name, command in CHECKS.items():
    if name != "check-ep" or config.launch.ranks > 1:
      found.append(_checked(config, name, command.format(path=path), records, code_version))
  return found


def _cited(config: Config, name: str, records: Reader) -> Evidence:
  try:
    cited = records.find(name)
  except NmoeError as error:
    return Evidence(name, "", f"{error}; run it, or take it off prod.evidence")
  if cited.stage not in STAGES:
    return Evidence(name, cited.id, f"is of stage {cited.stage}; cite one of {' or '.join(STAGES)}")
  if cited.verdict != "confirmed":
    verdict = cited.verdict or f"not concluded ({cited.status})"
    return Evidence(name, cited.id, f"is {verdict}; only what was confirmed can be cited")
  runs = records.runs(cited.id)
  apart = [_apart(config, run) for run in runs]
  if all(apart):
    return Evidence(name, cited.id, f"no arm of it has this configuration's {apart[0]}")
  return Evidence(name, cited.id)


def _apart(config: Config, run: Run) -> str:
  """The identity keys in which a run differs from the configuration, but for its size."""
  other = configs.loads(run.toml, f"run {run.id}", env={})
  keys = [key for key in diff(config, other) if kind(key) == "identity"]
  return ", ".join(key for key in keys if not key.startswith((*SIZE, *ASIDE)))


def _checked(
  config: Config, name: str, command: str, records: Reader, code_version: str
) -> Evidence:
  stale = ""
  for experiment in _checks(name, records):
    runs = records.runs(experiment.id)
    if not runs or not all(_same_model(config, run) for run in runs):
      continue
    if experiment.verdict != "confirmed":
      return Evidence(name, experiment.id, f"did not pass; run `{command}`")
    if any(run.code_version != code_version for run in runs):
      stale = stale or experiment.id
      continue
    return Evidence(name, experiment.id)
  if stale:
    return Evidence(name, stale, f"passed with other code; run `{command}` with this code")
  return Evidence(name, "", f"was not run for this configuration; run `{command}`")


def _checks(name: str, records: Reader) -> Iterator[Experiment]:
  """The concluded checks of a kind, newest first."""
  for experiment in records.list():
    if experiment.stage == "check" and experiment.name.startswith(name) and experiment.verdict:
      yield experiment


def _same_model(config: Config, run: Run) -> bool:
  other = configs.loads(run.toml, f"run {run.id}", env={})
  return not any(kind(key) == "identity" for key in diff(config, other))
