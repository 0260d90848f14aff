"""The run that a launch goes on with. One of the same name that other code or other keys began, and
that lives or has checkpoints, is neither left behind nor taken over in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from nmoe import files
from nmoe.config import file as configs
from nmoe.config.amend import KEYS
from nmoe.config.file import changed
from nmoe.config.sections import Config, diff, fingerprint, kind
from nmoe.errors import ConfigError
from nmoe.records.attempts import Attempts, History
from nmoe.records.reader import Run
from nmoe.records.root import Root
from stages.prod.attempt import newest_step
from stages.workbench import Arm, Workbench


def known(bench: Workbench, arm: Arm, accept_code: bool) -> Run | None:
  """The newest completed run of this computation, else the newest that has no outcome; None: a new
  one begins.

  accept_code: one that differs in its code only goes on under this code, or is done. ConfigError if
  another run of this name lives, or stands at a checkpoint and would be left there, or if other
  code has completed this computation.
  """
  config = arm.config
  key = fingerprint(config, arm.data.name), arm.data.name, config.train.seed
  with closing(History(bench.root)) as records:
    same = [records.run(run.id) for run in bench.experiments.of_any_code(*key)]
    left = _left(records, config)
  mine = [run for run in same if run.code_version == bench.code_version]
  finished = next((run for run in mine if run.finished), None)
  if finished is not None and finished.status == "completed":
    return finished
  found = next((run for run in mine if not run.finished), None)
  if found is None and left is None:
    return _completed(bench, same, accept_code)
  if left is None or (found is not None and (left.id == found.id or not left.live)):
    return found
  apart = _apart(decided(left, config), left, arm.data.name)
  if apart or (left.code_version != bench.code_version and not accept_code):
    raise ConfigError(_refusal(bench, left, apart))
  return left


def _completed(bench: Workbench, same: Sequence[Run], accept_code: bool) -> Run | None:
  """The newest run that other code has completed, if it is accepted; None: there is none."""
  done = next((run for run in same if run.status == "completed"), None)
  if done is not None and not accept_code:
    raise ConfigError(
      f"run {done.id} ({done.origin}) is completed: {_codes(bench, done)}; launch --accept-code "
      "takes it as done, --anew trains it once more from step 0"
    )
  return done


def decided(run: Run, config: Config) -> Config:
  """The configuration with what the run itself left out of it (nmoe.train.badsteps)."""
  own = configs.loads(run.toml, f"run {run.id}", env={})
  return changed(config, {"train.skip_steps": own.train.skip_steps, "data.holes": own.data.holes})


def take_over(bench: Workbench, run: Run) -> None:
  """Record, if the run was under other code, that it goes on under this one, with the difference to
  the commit.
  """
  if run.code_version == bench.code_version:
    return
  patch = Root(bench.root).prod(run.id) / f"code_{bench.code_version}.patch"
  patch.parent.mkdir(parents=True, exist_ok=True)
  files.replace(patch, bench.patch)
  detail = {"code": bench.code_version, "before": run.code_version, "commit": bench.commit}
  with closing(Attempts(bench.root)) as records:
    records.artifact(run.id, patch)
    records.event(run.id, 0, "code", step=newest_step(bench.root, run.id), detail=detail)


def _left(records: History, config: Config) -> Run | None:
  """Of the launches of this name: the run that lives, else the newest that stands at a checkpoint
  without an outcome.
  """
  launches = (e for e in records.list() if (e.stage, e.name) == ("prod", config.experiment.name))
  runs = [run for e in launches for run in reversed(records.runs(e.id)) if not run.finished]
  stand = (run for run in runs if newest_step(records.root, run.id))
  found = next((run for run in runs if run.live), None) or next(stand, None)
  return records.run(found.id) if found is not None else None


def _apart(config: Config, run: Run, data: str) -> list[str]:
  """What of a run's computation is another in this configuration, in words."""
  own = configs.loads(run.toml, f"run {run.id}", env={})
  told = [
    f"{key} was {was!r}, is {now!r}"
    for key, (now, was) in diff(config, own).items()
    if kind(key) != "free"
  ]
  return told + ["its data were others"] * (run.data_digest != data)


def _refusal(bench: Workbench, run: Run, apart: list[str]) -> str:
  step = newest_step(bench.root, run.id)
  code = _codes(bench, run)
  if run.live:
    told = f"run {run.id} ({run.origin}) is {run.status}: {'; '.join(apart) or code}; "
    amend = f"`nmoe prod amend {run.id}` changes a live run, " * _amendable(apart)
    return f"{told}{amend}`nmoe prod stop {run.id}` ends it"
  told = f"run {run.id} ({run.origin}) stands at step {step} and would be left there: "
  if apart:
    amend = f" (`nmoe prod amend {run.id}` changes it)" * _amendable(apart)
    remedy = f"set back what differs{amend}"
    return f"{told}{'; '.join(apart)}; {remedy} to go on with it, or launch --anew from step 0"
  return (
    f"{told}{code}; launch --accept-code to go on with it under this code, which its record keeps, "
    "or --anew from step 0"
  )


def _codes(bench: Workbench, run: Run) -> str:
  return (
    f"its code was {run.code_version} (commit {run.commit[:10]}), this is "
    f"{bench.code_version} (commit {bench.commit[:10]})"
  )


def _amendable(apart: list[str]) -> bool:
  """Whether one of the differences is of a key that amendments change."""
  return any(one.split(" ")[0] in KEYS for one in apart)
