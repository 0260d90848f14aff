"""The ranks of a run: what dense parameters, sums and control need of torch.distributed.

Dense and router parameters are replicated and their gradients summed over ranks; routed experts live on
one rank each and already hold the sum over all ranks' tokens. With one rank everything here is a no-op.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from nmoe.config import Config
from nmoe.model import parameter_group


@dataclass
class Parallel:
  rank: int = 0
  ranks: int = 1
  rdep: Any = None  # nmoe.rdep.Rdep when ranks > 1
  first_expert: int = 0  # global id of this rank's first routed expert

  def sum(self, x: Tensor) -> Tensor:
    """Σ over ranks, in place."""
    if self.ranks > 1:
      dist.all_reduce(x)
    return x

  def sum_squares(self, squared_3: Tensor) -> Tensor:
    """Squared gradient norms of the whole model: dense and router once, experts summed over ranks."""
    squared_3[2] = self.sum(squared_3[2:].clone())[0]
    return squared_3

  def reduce_gradients(self, model: nn.Module) -> None:
    """Sum the gradients of replicated parameters over ranks."""
    if self.ranks == 1:
      return
    for name, parameter in model.named_parameters():
      if parameter_group(name) != "expert":
        dist.all_reduce(parameter.grad)


def init(config: Config, rank: int, rendezvous: Path | None) -> Parallel:
  """Join the run's other ranks, who meet in the file `rendezvous`."""
  if config.launch.ranks == 1:
    return Parallel()
  dist.init_process_group(
    "gloo" if config.target.arch == "cpu" else "nccl",
    init_method=f"file://{rendezvous}",
    rank=rank,
    world_size=config.launch.ranks,
    timeout=timedelta(seconds=config.rdep.deadline_s),
  )
  num_local = config.moe.num_experts // config.launch.ranks
  return Parallel(rank, config.launch.ranks, None, rank * num_local)
