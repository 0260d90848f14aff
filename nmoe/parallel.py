"""The ranks of a run: what dense parameters, sums and control need of torch.distributed.

Dense and router parameters are replicated and their gradients summed over ranks; routed experts
live on one rank each and already hold the sum over all ranks' tokens. Losses are divided by the
global number of tokens before backward, so sums are right and nothing is averaged. With one rank
everything here is a no-op.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nmoe.config import Config
from nmoe.errors import CommError
from nmoe.model import parameter_group
from nmoe.rdep import Rdep
from nmoe.target import Target

SAVE_S = 900.0  # a rank may wait this long for the others' part of a checkpoint
BUCKET = 16 * 2**20  # gradient elements summed by one call: 64 MiB of fp32


@dataclass
class Parallel:
  """This process among the ranks. Every method is collective, and the same on all ranks."""

  rank: int = 0
  ranks: int = 1
  rdep: Rdep | None = None  # None with one rank
  first_expert: int = 0  # global id of this rank's first routed expert
  control: dist.ProcessGroup | None = None  # gloo, for host values
  saving: dist.ProcessGroup | None = None  # gloo, for the thread that writes checkpoints

  def sum(self, x: Tensor) -> Tensor:
    """Σ over ranks, in place; the same bits on every rank."""
    if self.ranks > 1:
      dist.all_reduce(x)
    return x

  def any(self, flag: bool) -> bool:
    """Whether the flag is set on some rank: what all must decide alike. Host values only."""
    if self.ranks == 1:
      return flag
    told = torch.tensor(int(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX, self.control)
    return bool(told)

  def sum_squares(self, squared_3: Tensor) -> Tensor:
    """Squared gradient norms (dense, router, expert) of one rank -> those of the whole model.

    To be called after `reduce_gradients`: each parameter then counts once, dense and router ones
    because every rank holds the same sum, experts by the sum over ranks.
    """
    squared_3[2] = self.sum(squared_3[2:].clone())[0]
    return squared_3

  @torch.no_grad()
  def reduce_gradients(self, model: nn.Module) -> None:
    """Sum the gradients of replicated parameters over ranks, in fp32, rounded once."""
    if self.ranks == 1:
      return
    for grads in _buckets(model):
      flat = torch.cat([grad.flatten().float() for grad in grads])
      dist.all_reduce(flat)
      parts = flat.split([grad.numel() for grad in grads])
      for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))

  @contextmanager
  def explained(self) -> Iterator[None]:
    """Around the step loop: errors of lost or late ranks become a CommError that says so."""
    try:
      with nullcontext() if self.rdep is None else self.rdep.explained():
        yield
    except RuntimeError as error:
      if self.ranks == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        raise
      raise CommError(
        f"rank {self.rank} of {self.ranks}: a collective failed ({str(error).splitlines()[0]}); "
        "another rank stopped or was late: see its log"
      ) from error

  def close(self) -> None:
    """Leave the run: the counterpart of `init`."""
    if self.ranks > 1:
      self.rdep.close()
      dist.destroy_process_group()


def init(config: Config, target: Target, rank: int, rendezvous: Path | None) -> Parallel:
  """Join the run's other ranks, who meet in the file `rendezvous`, and open all communicators.

  Dense gradients travel over NCCL on GPUs, over gloo on the cpu and where ranks share a GPU (NCCL
  refuses that). RDEP's heap is allocated here. Raises CommError.
  """
  ranks = config.launch.ranks
  if ranks == 1:
    return Parallel()
  alone = target.device.type == "cuda" and ranks <= torch.cuda.device_count()
  timeout = timedelta(seconds=config.rdep.deadline_s)
  dist.init_process_group(
    "nccl" if alone else "gloo",
    init_method=f"file://{rendezvous}",
    rank=rank,
    world_size=ranks,
    timeout=timeout,
    device_id=target.device if alone else None,
  )
  control = dist.new_group(backend="gloo", timeout=timeout) if alone else dist.group.WORLD
  saving = dist.new_group(backend="gloo", timeout=timedelta(seconds=SAVE_S))
  rdep = Rdep(config, target.ops, control, target.symmetric)
  return Parallel(rank, ranks, rdep, rdep.first, control, saving)


def _buckets(model: nn.Module) -> Iterator[list[Tensor]]:
  """The gradients of replicated parameters, in parameter order, in groups of about BUCKET."""
  bucket, size = [], 0
  for name, parameter in model.named_parameters():
    if parameter_group(name) == "expert":
      continue
    assert parameter.grad is not None, f"{name} has no gradient to sum over ranks"
    bucket.append(parameter.grad)
    size += parameter.grad.numel()
    if size >= BUCKET:
      yield bucket
      bucket, size = [], 0
  if bucket:
    yield bucket
