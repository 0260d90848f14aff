"""The learning rate schedule: warm-up, sustain, decay, counted in tokens.

arXiv 2404.06395 section 4.2 (WSD) and 2405.18392 section 3 (the 1 - sqrt decay).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from nmoe.config import file as configs
from nmoe.config.sections import Config, ScheduleConfig
from nmoe.wording import counted


class End(NamedTuple):
  """The last step of a run, and the tokens that it has trained on by then."""

  step: int
  tokens: int


def end_of(step: int, tokens: int, config: ScheduleConfig) -> End:
  """Where a run ends that has trained on `tokens` tokens in `step` steps, of whatever batches.

  Whole batches are trained: total_tokens, or less by a part of one. A run behind its end is at it.
  """
  left = max(0, config.total_tokens - tokens) // config.batch_tokens
  return End(step + left, tokens + left * config.batch_tokens)


def tokens_of(manifest: dict[str, Any]) -> int:
  """The tokens that a checkpoint was trained on.

  Before they stood in its manifest, all steps of a run were of one batch_tokens.
  """
  if "tokens" in manifest:
    return manifest["tokens"]
  return manifest["step"] * configs.loads(manifest["config"]).schedule.batch_tokens


def lr_factor(tokens: int, config: ScheduleConfig, end: int | None = None) -> float:
  """The factor on the peak learning rate of the step that starts after `tokens` tokens.

  A step stands at the middle of its own tokens, t = tokens + batch_tokens / 2, so that neither the
  first nor the last step has a rate of zero, and linear phases of whole batches sum to their area.
  t / warmup_tokens while t < warmup_tokens; 1 up to total_tokens - decay_tokens; then, with x the
  share of decay_tokens behind t, final_ratio + (1 - final_ratio) · g(x): g is 1 - x ("linear")
  or 1 - sqrt(x) ("sqrt"). Beyond its end a schedule with a decay stays at final_ratio. `end`: the
  tokens after the last step (`end_of`); None: those of the last whole batch in total_tokens, since
  tokens short of a batch are not trained.
  """
  t = tokens + config.batch_tokens / 2
  if t < config.warmup_tokens:
    return t / config.warmup_tokens
  start = (config.trained_tokens if end is None else end) - config.decay_tokens
  if config.decay_tokens == 0 or t <= start:
    return 1.0
  x = min(1.0, (t - start) / config.decay_tokens)
  g = 1 - x if config.decay == "linear" else 1 - math.sqrt(x)
  return config.final_ratio + (1 - config.final_ratio) * g


@dataclass(frozen=True)
class Phase:
  """A part of the schedule: the steps whose middle lies in it, and the factors at its ends.

  tokens: of its length in the configuration; the steps' own may be up to half a batch off.
  """

  name: str
  tokens: int
  steps: int
  first: float
  last: float


def rate_phases(config: ScheduleConfig) -> tuple[Phase, ...]:
  """Warm-up, sustain, decay; those without a step are left out."""
  steps = config.total_tokens // config.batch_tokens
  warmup, decay = (_steps(n, config) for n in (config.warmup_tokens, config.decay_tokens))
  sustained = config.trained_tokens - config.warmup_tokens - config.decay_tokens
  found, begin = [], 0
  for name, tokens, count in (
    ("warm-up", config.warmup_tokens, warmup),
    ("sustain", sustained, steps - warmup - decay),
    ("decay", config.decay_tokens, decay),
  ):
    if count:
      ends = (lr_factor(step * config.batch_tokens, config) for step in (begin, begin + count - 1))
      found.append(Phase(name, tokens, count, *ends))
      begin += count
  return tuple(found)


def _steps(tokens: int, config: ScheduleConfig) -> int:
  """The steps whose middle lies in a phase of `tokens` at an end of the schedule."""
  return max(0, -(-(2 * tokens - config.batch_tokens) // (2 * config.batch_tokens)))


def remarks(config: Config) -> list[str]:
  """What of the keys in tokens and steps is rounded, or reached by no step."""
  s, found = config.schedule, []
  rest = s.total_tokens - s.trained_tokens
  if rest:
    found.append(
      f"schedule.total_tokens = {s.total_tokens:,} is {config.steps:,} · "
      f"{s.batch_tokens:,} and {counted(rest, 'token')} more, too few for a step; the nearest "
      f"totals are {s.trained_tokens:,} and {s.trained_tokens + s.batch_tokens:,}"
    )
  for key, tokens in (
    ("schedule.warmup_tokens", s.warmup_tokens),
    ("schedule.decay_tokens", s.decay_tokens),
    ("precision.finish_tokens", config.precision.finish_tokens),
  ):
    if tokens % s.batch_tokens:
      found.append(
        f"{key} = {tokens:,} is {tokens / s.batch_tokens:.2f} batches of {s.batch_tokens:,}: no "
        "step ends there"
      )
  d = config.data
  if d.val_tokens % d.seq_len:
    windows = max(1, d.val_tokens // d.seq_len)
    found.append(
      f"data.val_tokens = {d.val_tokens:,} is rounded to {windows * d.seq_len:,}, "
      f"{counted(windows, 'window')} of seq_len {d.seq_len:,}"
    )
  for key in ("eval_every", "checkpoint_every", "flight_every", "routing_every"):
    every = getattr(config.train, key)
    if every > config.steps:
      found.append(f"train.{key} = {every:,} is never reached in {counted(config.steps, 'step')}")
  return found
