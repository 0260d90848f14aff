"""What the checks and benches run: a few steps of a configuration, under a claim of their own.

It needs no torch, so that what cannot run is refused at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from nmoe.config import file as configs
from nmoe.config.cut import few_steps
from nmoe.config.sections import Config
from nmoe.errors import ConfigError
from nmoe.records.reader import Hypothesis


def shortened(
  config: Config, steps: int, phase: int = 0, checkpoint_every: int = 0, keep: int = 1
) -> Config:
  """The configuration with `steps` steps, each logged, and no evaluation before the last, of at
  most as many held-out tokens as a step has.

  phase: steps of warm-up, and of decay; 0: full rates. checkpoint_every, keep: as in [train].
  """
  batch = config.schedule.batch_tokens
  return configs.changed(
    config,
    {
      **few_steps(config, steps, batch),
      "data.val_tokens": min(config.data.val_tokens, batch),
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


def comparable(path: Path, ranks: Sequence[int], steps: int) -> dict[int, Config]:
  """The few steps that `nmoe check ep` trains at each number of ranks."""
  config = shortened(configs.load(path), steps)
  return {r: at_ranks(config, r) for r in ranks}


def resumable(path: Path, steps: int, ranks: Sequence[int] = ()) -> list[Config]:
  """The three attempts of the run that `nmoe check resume` kills."""
  return attempts(killable(configs.load(path), steps, ranks), ranks)


def at_ranks(config: Config, ranks: int) -> Config:
  """The configuration over `ranks` ranks of this host: the same global batches, micro-batches at
  most as large in all. ConfigError with the numbers that fit if this one doesn't.

  Where rdep.group is set, experts lie over the largest divisor of it that divides the ranks.
  """
  sequences, experts = config.sequences, config.moe.num_experts
  group = {r: math.gcd(config.rdep.group, r) for r in (ranks, *range(1, sequences + 1))}
  if ranks < 1 or experts % group[ranks] or sequences % ranks:
    fitting = [r for r in range(1, sequences + 1) if not (experts % group[r] or sequences % r)]
    raise ConfigError(
      f"{ranks} ranks, or {group[ranks]} with one set of experts, do not divide {sequences} "
      f"sequences and num_experts {experts}; choose from {', '.join(map(str, fitting))}"
    )
  micro = max(1, config.train.micro_batch * config.launch.ranks // ranks)
  return configs.changed(
    config,
    {
      "launch.engine": "local",
      "launch.ranks": ranks,
      "launch.ranks_per_node": 0,
      "rdep.group": group[ranks],
      "train.micro_batch": math.gcd(micro, sequences // ranks),
      "train.cuda_graph": config.train.cuda_graph and ranks == 1,  # others may share a GPU
    },
  )


def on_this_host(config: Config) -> Config:
  """The configuration over the ranks that a host of it has, whoever starts its hosts."""
  if config.nodes > 1:
    return at_ranks(config, config.node_ranks)
  return configs.changed(config, {"launch.engine": "local"})


def attempts(config: Config, ranks: Sequence[int]) -> list[Config]:
  """The configuration from the start, after the first kill and after the second.

  ConfigError if a number of ranks does not fit it, or if there are more numbers than attempts.
  """
  if len(ranks) > 3:
    raise ConfigError(
      f"{len(ranks)} numbers of ranks ({', '.join(map(str, ranks))}): a run that is killed twice "
      "has three attempts; give one to three numbers"
    )
  found = [at_ranks(config, r) for r in ranks] or [on_this_host(config)]
  return (found + 2 * found[-1:])[:3]


def killable(config: Config, steps: int, ranks: Sequence[int] = ()) -> Config:
  """The configuration with `steps` steps: warm-up and decay a quarter each, a checkpoint at every
  fourth part less one step, so that a kill costs some steps.

  If ranks change, at every step, and all are kept.
  """
  every, keep = (1, steps) if len(set(ranks)) > 1 else (max(1, steps // 4 - 1), 2)
  return shortened(config, steps, steps // 4, every, keep)
