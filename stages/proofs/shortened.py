"""What the checks and benches run: a few steps of a configuration, under a claim of their own."""

from __future__ import annotations

import time
from pathlib import Path

from nmoe.config import file as configs
from nmoe.config.cut import few_steps
from nmoe.config.sections import Config
from nmoe.records.reader import Hypothesis


def shortened(
  config: Config, steps: int, phase: int = 0, checkpoint_every: int = 0, keep: int = 1
) -> Config:
  """The configuration with `steps` steps, each logged, and no evaluation before the last.

  phase: steps of warm-up, and of decay; 0: full rates. checkpoint_every, keep: as in [train].
  """
  batch = config.schedule.batch_tokens
  return configs.changed(
    config,
    {
      **few_steps(config, steps, batch),
      "schedule.warmup_tokens": phase * batch,
      "schedule.decay_tokens": phase * batch,
      "train.log_every": 1,
      "train.eval_every": 0,
      "train.checkpoint_every": checkpoint_every,
      "train.keep_checkpoints": keep,
    },
  )


def named(kind: str, path: Path) -> str:
  """The name of an experiment that starts anew whenever it is asked for."""
  return f"{kind}-{path.stem}-{time.strftime('%H%M%S')}"


def claim(statement: str, config: Config) -> list[Hypothesis]:
  """What a check or bench states, in place of what the configuration's own experiment does."""
  return [Hypothesis(statement, config.experiment.metric, "none", 0.0)]
