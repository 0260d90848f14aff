"""What a run on this rank consists of: the state that checkpoints save, and all else it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nmoe.config.sections import Config
from nmoe.data.prepared import PreparedData
from nmoe.distributed.parallel import Parallel
from nmoe.machine.target import Target
from nmoe.model.decoder import Model
from nmoe.records import checkpoint
from nmoe.records.metrics import Metrics
from nmoe.train.badsteps import BadStepError, Replay
from nmoe.train.evaluations import Evaluations
from nmoe.train.guard import Guard
from nmoe.train.optim import Optimizer
from nmoe.train.profiler import Profiler
from nmoe.train.progress import Progress
from nmoe.train.retention import permanent
from nmoe.train.startup import StartUp
from nmoe.train.watchdog import Watchdog


@dataclass
class TrainState:
  """All that a checkpoint saves. tokens: trained on in `step` steps, of whatever batches.

  They are the data position: sample tokens / seq_len comes next, and the loader is a pure function
  of its number. The schedule counts them too.
  """

  model: Model
  optimizer: Optimizer
  step: int = 0
  tokens: int = 0
  more: dict[str, Tensor] = field(default_factory=dict)  # of the guard against spikes

  def tensors(self) -> dict[str, Tensor]:
    return {**self.model.state_dict(), **self.optimizer.state_dict(), **self.more}


def nothing(*_: object, **__: object) -> None:
  """What a run without attempts records of events."""


@dataclass(kw_only=True)
class Session:
  """What the loop reads and writes but does not save."""

  config: Config
  target: Target
  parallel: Parallel
  data: PreparedData
  metrics: Metrics
  checkpoints: checkpoint.Writer
  evaluations: Evaluations
  meta: dict[str, Any]  # written into every checkpoint's manifest
  profiler: Profiler  # its `step` is called after every step
  startup: StartUp = field(default_factory=StartUp)
  progress: Progress = field(default_factory=Progress)
  guard: Guard | None = None  # of a production run; None: parts_of makes one
  until: int = 0  # tokens: then it saves and leaves, for an amendment; 0: no amendment follows
  watchdog: Watchdog = field(default_factory=Watchdog)
  replay: Replay | None = None  # on rank 0: a bad step that is computed again
  judge: Callable[[BadStepError], bool] = lambda bad: False  # on rank 0: does the run end with it?
  event: Callable[..., None] = nothing  # records one of a production run: kind, step=, detail=
  look: Callable[[int], str | None] = nothing  # has hosts look at their GPUs; where they write it
  first: Path | None = None  # a folder for the state before and after the first step
  stop: bool = False  # set by SIGTERM or a vanished parent: checkpoint and leave

  def leaves(self, tokens: int) -> bool:
    """Whether this rank is not to begin another step, after so many tokens."""
    return self.stop or self.amends(tokens)

  def amends(self, tokens: int) -> bool:
    """Whether an amendment holds for the step that comes next, which this run does not know."""
    return 0 < self.until <= tokens

  def kept(self, tokens: int) -> str:
    """Why a production run keeps its state after so many tokens for good; "" if it does not."""
    return permanent(tokens, self.config) if self.progress.attempt else ""
