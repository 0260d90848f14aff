"""What a run on this rank consists of: the state that checkpoints save, and all else it uses."""

from __future__ import annotations

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
from nmoe.train.evaluations import Evaluations
from nmoe.train.optim import Optimizer
from nmoe.train.profiler import Profiler
from nmoe.train.progress import Progress
from nmoe.train.startup import StartUp


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

  def tensors(self) -> dict[str, Tensor]:
    return {**self.model.state_dict(), **self.optimizer.state_dict()}


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
  first: Path | None = None  # a folder for the state before and after the first step
  stop: bool = False  # set by SIGTERM or a vanished parent: checkpoint and leave
