"""Runs that begin with a checkpoint of another run: one trunk, and a decay wherever it is wanted.

A branch is the same model, from the next sample on, under another schedule. Up to its checkpoint
the data are its trunk's; from there on it may read more sources, in other shares: a decay on other
text is a mixture with that text behind the trunk's sources, data.weights with a 0 for it, and a row
of data.weights_from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff, kind
from nmoe.data.history import History, read_before
from nmoe.data.prepared import CYCLE, open_data, shares
from nmoe.errors import ConfigError
from nmoe.records.manifests import digest, manifest, steps
from nmoe.records.reader import Branch, Run
from nmoe.records.root import Root
from nmoe.train.schedule import end_of, lr_factor, tokens_of
from stages.text import plain
from stages.workbench import Arm, Workbench

WEIGHTS = "data.weights"  # another, if it says the same of what was read
DATA = {WEIGHTS, "data.mixture", "data.weights_from", "data.holes"}


def branched(arm: Arm, checkpoints: Sequence[str], bench: Workbench) -> Arm:
  """The arm with runs that begin with these checkpoints, RUN or RUN@STEP, at the seeds of RUN.

  ConfigError, which names all that keeps one from going on: other identity keys, other data before
  the checkpoint, no such step, nothing left to train, two of one seed.
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
  named = {str(one): one for one in there}
  number = there[-1] if there and not step else named.get(step.lstrip("0") or step, -1)
  if number not in there:
    raise ConfigError(
      f"--from {trunk.id}@{step}: the run has checkpoints of steps {_listed(there)}; name one of "
      "them (train.checkpoint_every and train.keep_checkpoints say which are kept)"
    )
  written = manifest(folder / f"step_{number:08d}")
  then, now = configs.loads(written["config"], f"run {trunk.id}"), arm.at_seed(trunk.seed)
  differing = diff(then, now)
  pairs = {key: p for key, p in differing.items() if kind(key) == "identity" and key != WEIGHTS}
  if pairs:
    told = "; ".join(f"{key}: {then!r} there, {here!r} here" for key, (then, here) in pairs.items())
    raise ConfigError(
      f"--from {trunk.id}: a run goes on as the same model, but {told}; restore these, or train "
      "from the first step"
    )
  tokens = tokens_of(written)
  changed = {
    key: pair for key, pair in differing.items() if kind(key) == "schedule" or key == WEIGHTS
  }
  if trunk.data_digest != arm.data.name:
    changed["data.mixture"] = (trunk.data_digest, arm.data.name)
  if changed.keys() & DATA:
    _check_history(trunk, then, arm, now, tokens, bench)
  if end_of(number, tokens, now.schedule).step == number:
    raise ConfigError(
      f"--from {trunk.id}@{number}: it was trained on {tokens:,} tokens, and "
      f"schedule.total_tokens = {now.schedule.total_tokens:,} leaves no whole batch of "
      f"{now.schedule.batch_tokens:,}; raise it: it counts those tokens too"
    )
  return Branch(trunk.id, number, tokens, digest(written), changed)


def _check_history(
  trunk: Run, then: Config, arm: Arm, now: Config, tokens: int, bench: Workbench
) -> None:
  """ConfigError unless the arm's data and weights are the trunk's up to `tokens` tokens."""
  theirs = open_data(Root(bench.root).data / trunk.data_digest, verify=False)
  ours = open_data(arm.data, verify=False)
  before, wanted = read_before(theirs, then, tokens), read_before(ours, now, tokens)
  if before == wanted:
    return
  weights = dict(zip((s.name for s in theirs.sources), then.data.weights, strict=False))
  told = ", ".join(f"{name} {share:.6g}" for name, share in shares(theirs, weights or None).items())
  raise ConfigError(
    f"--from {trunk.id}: it has read {tokens:,} tokens of {_sources(before)}, this would have read "
    f"{_sources(wanted)}: keep its sources, new ones behind them, with data.weights ({told}, 0 for "
    f"new ones), its data.weights_from and data.holes up to there; what changes is a row of "
    f"data.weights_from, [{tokens}, ...] or later"
  )


def _sources(history: History) -> str:
  """For people: the sources of each phase with their shares."""
  said = []
  for first, of in history.phases:
    each = (f"{name} ({digest[:8]}) {n / CYCLE:.4g}" for name, digest, _, n in of)
    said.append(f"from sample {first} on {', '.join(each)}")
  return "; ".join(said) + f" without samples {list(history.holes)}" * bool(history.holes)


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
