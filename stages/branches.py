"""Runs that begin with a checkpoint of another run: one trunk, and a decay wherever it is wanted.

A branch is the same model on the same data, from the next sample on, under another schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff, kind
from nmoe.errors import ConfigError
from nmoe.records.manifests import digest, manifest, steps
from nmoe.records.reader import Branch, Run
from nmoe.records.root import Root
from nmoe.train.schedule import end_of, lr_factor, tokens_of
from stages.text import plain
from stages.workbench import Arm, Workbench


def branched(arm: Arm, checkpoints: Sequence[str], bench: Workbench) -> Arm:
  """The arm with runs that begin with these checkpoints, RUN or RUN@STEP, at the seeds of RUN.

  ConfigError, which names all that keeps one from going on: other identity keys, other data, no
  such step, nothing left to train, two of one seed.
  """
  branches: dict[int, Branch] = {}
  for text in checkpoints:
    run_id, _, step = text.partition("@")
    trunk = bench.experiments.run(run_id)
    if trunk.seed in branches:
      raise ConfigError(f"--from {text}: two runs of seed {trunk.seed}; name one for each seed")
    branches[trunk.seed] = branch = _branch(arm, trunk, step, bench)
    _say(branch, trunk, arm.at_seed(trunk.seed), bench)
  return replace(arm, branches=branches)


def _branch(arm: Arm, trunk: Run, step: str, bench: Workbench) -> Branch:
  folder = Root(bench.root).checkpoints(trunk.id)
  there = steps(folder)
  number = there[-1] if there and not step else int(step) if step.isdecimal() else -1
  if number not in there:
    raise ConfigError(
      f"--from {trunk.id}@{step}: the run has checkpoints of steps {_listed(there)}; name one of "
      "them (train.checkpoint_every and train.keep_checkpoints say which are kept)"
    )
  written = manifest(folder / f"step_{number:08d}")
  now = arm.at_seed(trunk.seed)
  differing = diff(configs.loads(written["config"], f"run {trunk.id}"), now)
  pairs = {key: pair for key, pair in differing.items() if kind(key) == "identity"}
  if trunk.data_digest != arm.data.name:
    pairs["the prepared data"] = (trunk.data_digest, arm.data.name)
  if pairs:
    told = "; ".join(f"{key}: {then!r} there, {here!r} here" for key, (then, here) in pairs.items())
    raise ConfigError(
      f"--from {trunk.id}: a run goes on as the same model on the same data, but {told}; restore "
      "these, or train from the first step"
    )
  tokens = tokens_of(written)
  if end_of(number, tokens, now.schedule).step == number:
    raise ConfigError(
      f"--from {trunk.id}@{number}: it was trained on {tokens:,} tokens, and "
      f"schedule.total_tokens = {now.schedule.total_tokens:,} leaves no whole batch of "
      f"{now.schedule.batch_tokens:,}; raise it: it counts those tokens too"
    )
  changed = {key: pair for key, pair in differing.items() if kind(key) == "schedule"}
  return Branch(trunk.id, number, tokens, digest(written), changed)


def _listed(steps: Sequence[int]) -> str:
  return ", ".join(map(str, steps)) or "none"


def _say(branch: Branch, trunk: Run, now: Config, bench: Workbench) -> None:
  """What is another from the checkpoint on; what a reader of the record may miss."""
  say = [f"seed {trunk.seed}: from {branch}, {branch.tokens:,} tokens; {branch.changes}"]
  end = end_of(branch.step, branch.tokens, now.schedule).tokens
  then, here = (
    lr_factor(branch.tokens, schedule, until)
    for schedule, until in ((configs.loads(trunk.toml).schedule, None), (now.schedule, end))
  )
  if abs(then - here) > 1e-9:
    say.append(
      f"the learning rate goes on at {here:.3g} of its peak, in {trunk.id} it was {then:.3g}"
    )
  if trunk.code_version != bench.code_version:
    say.append(f"{trunk.id} was trained by code {trunk.code_version}, this is {bench.code_version}")
  for line in say:
    bench.console.print(plain(line), soft_wrap=True)
