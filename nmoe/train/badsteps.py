"""What a production run does about a step that is not finite, or whose loss is a spike.

The ranks restart from the newest checkpoint and come to the step again, which the same machine and
data compute to the same bits. If it is another this time, the first was the hardware's: an event
names the rank. If it is the same, prod.bad_step decides: "stop" ends the run; "skip" leaves out the
step's update; "rewind" goes back by an interval and leaves out the samples from there to the step.
What is left out stands in the run's configuration (train.skip_steps, data.holes), so that
manifests, the record and the loader's function of n agree.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nmoe.config import file as configs
from nmoe.config.amend import amended, following
from nmoe.config.sections import Config
from nmoe.data.holes import skipped, with_hole
from nmoe.errors import RunError
from nmoe.records.attempts import Attempts, Event
from nmoe.records.manifests import manifest
from nmoe.records.reader import Amendment, Run
from nmoe.records.root import Root
from nmoe.train.schedule import tokens_of

VERDICTS = ("hardware", "diverged", "skip", "rewind")
Values = list[list[str]]  # of each rank: loss and norm of all ranks, sum of its own gradients


class BadStepError(RunError):
  """A step of a production run was bad; `values` on rank 0."""

  def __init__(self, message: str, step: int, values: Sequence[Sequence[float]]):
    super().__init__(message)
    self.step = step
    self.values: Values = [[x.hex() for x in row] for row in values]


@dataclass(frozen=True)
class Replay:
  """A bad step that is computed again, and the ranks whose own gradients were not finite."""

  step: int
  ranks: list[int]

  @property
  def rank(self) -> int:
    """The one at fault; -1: not known."""
    return self.ranks[0] if len(self.ranks) == 1 else -1


def pending(events: Sequence[Event]) -> Replay | None:
  """The bad step of which it is not known yet whether it repeats."""
  last = next((e for e in reversed(events) if e.kind in ("bad step", *VERDICTS)), None)
  if last is None or last.kind != "bad step":
    return None
  return Replay(last.step, suspects(last.detail["values"]))


def suspects(values: Values) -> list[int]:
  """The ranks whose own gradients were not finite."""
  return [r for r, row in enumerate(values) if not math.isfinite(float.fromhex(row[-1]))]


def decide(records: Attempts, root: Path, run: Run, attempt: int, bad: BadStepError) -> bool:
  """Record the bad step and what follows from it; whether the run ends with it."""
  before = pending(records.events(run.id))
  seen = [e for e in records.events(run.id) if e.kind == "bad step" and e.step == bad.step]

  def event(kind: str, rank: int = 0, **detail: object) -> None:
    records.event(run.id, attempt, kind, step=bad.step, rank=rank, detail=detail)

  event("bad step", error=str(bad), values=bad.values)
  if before is None or before.step != bad.step:
    return False
  if seen[-1].detail["values"] != bad.values:
    event("hardware", before.rank, values=[seen[-1].detail["values"], bad.values])
    return False
  config = configs.loads(run.toml, f"run {run.id}", env={})
  prod = config.prod
  done = sum(e.kind in ("skip", "rewind") for e in records.events(run.id))
  if prod.bad_step == "stop" or done >= prod.max_bad_steps:
    event("diverged", error=f"{bad}; computed again it is the same")
    return True
  if prod.bad_step == "skip":
    changed = {"train.skip_steps": (*config.train.skip_steps, bad.step)}
    event("skip")
  else:
    step = _back(root, run.id, bad.step - config.train.checkpoint_every)
    tokens = _tokens(root, run.id, step)
    later = tokens_after(config, run.amendments, step, tokens, bad.step)
    first, stop = (t // config.data.seq_len for t in (tokens, later))
    changed = {"data.holes": with_hole(config.data.holes, first, stop)}
    samples = [int(n) for n in skipped([first, stop - 1], config.data.holes)]
    event("rewind", to=step, samples=samples)
  records.update_run(run.id, toml=configs.to_toml(configs.changed(config, changed)))
  return False


def _tokens(root: Path, run_id: str, step: int) -> int:
  """That a run has trained on by a checkpoint; 0: it begins anew."""
  folder = Root(root).checkpoints(run_id) / f"step_{step:08d}"
  return tokens_of(manifest(folder)) if step else 0


def tokens_after(
  config: Config, amendments: Sequence[Amendment], step: int, tokens: int, last: int
) -> int:
  """What a run has trained on by step `last`, from the tokens by `step` on: an amendment may change
  the batch on the way.
  """
  while step < last:
    batch = amended(config, amendments, tokens).schedule.batch_tokens
    until, count = following(amendments, tokens), last - step
    if until:
      count = min(count, -((tokens - until) // batch))
    step, tokens = step + count, tokens + count * batch
  return tokens


def _back(root: Path, run_id: str, limit: int) -> int:
  """Put the checkpoints after step `limit` aside; the step of the newest that is left, or 0."""
  left = 0
  for step in Root(root).checkpoint_steps(run_id):
    folder = Root(root).checkpoints(run_id) / f"step_{step:08d}"
    if step <= limit:
      left = step
    else:
      aside = folder.with_name(f"{folder.name}.rewound-{limit}")
      shutil.rmtree(aside, ignore_errors=True)  # of an earlier rewind to the same step
      folder.rename(aside)
  return left
