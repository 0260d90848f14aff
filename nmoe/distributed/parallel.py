"""The ranks of a run: what dense parameters, sums and control need of torch.distributed.

Dense and router parameters are on every rank. Routed experts lie over the G ranks of an RDEP group
(rdep.group): rank r is in group r // G and holds the experts r mod G, like R / G - 1 other ranks.
Of what several ranks hold each row has one owner (nmoe.config.parameters), to which the gradients
are summed and from which the updated weights come. Losses are divided by the global number of
tokens before backward, so sums are right and nothing is averaged. With one rank everything here is
a no-op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nmoe.config.parameters import Span
from nmoe.config.sections import Config
from nmoe.distributed.buckets import Arriving, Shared, copy, shared
from nmoe.distributed.meeting import Meeting
from nmoe.distributed.rdep import Passes, Rdep
from nmoe.distributed.streams import beside, join
from nmoe.errors import CommError, ConfigError
from nmoe.machine.target import Target
from nmoe.wording import counted

SAVE_S = 900.0  # a rank may wait this long for the others' part of a checkpoint
LATER = timedelta(seconds=10)  # NCCL's deadline, after RDEP's, which says who is late at what


@dataclass
class Parallel:
  """This process among the ranks. Methods are collective, and alike on all ranks; not `forget`."""

  rank: int = 0
  ranks: int = 1
  rdep: Rdep | None = None  # None with one rank
  first_expert: int = 0  # global id of this rank's first routed expert
  control: dist.ProcessGroup | None = None  # gloo, for host values
  saving: dist.ProcessGroup | None = None  # gloo, for the thread that writes checkpoints
  shared: tuple[Shared, ...] = ()  # every parameter, with more than one rank
  side: torch.cuda.Stream | None = None  # on which final gradients travel; None on the cpu
  reduced: set[tuple[int, int]] = field(default_factory=set)  # (part, bucket) so far in this step
  graph: torch.cuda.CUDAGraph | None = None  # of a step's passes
  captured: set[tuple[int, int]] = field(default_factory=set)  # those that its replay reduces
  arriving: list[Arriving] = field(default_factory=list)  # of `send_weights`, in the order of use
  own: Tensor | None = None  # fp32 0-d: the sum of this rank's own gradients; None: nobody asks

  @property
  def owned(self) -> dict[str, Span] | None:
    """The rows of each parameter that this rank updates; None, with one rank: all."""
    if self.ranks == 1:
      return None
    return {name: rows for part in self.shared for name, rows in part.owned.items()}

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

  def gather(self, values: Sequence[float]) -> list[list[float]]:
    """On rank 0 the values of each rank, which give equally many; [] on others, and of one rank
    alone.
    """
    if self.ranks == 1:
      return []
    mine = torch.tensor(values, dtype=torch.float64)
    told = [torch.empty_like(mine) for _ in range(self.ranks)] if self.rank == 0 else None
    dist.gather(mine, told, group=self.control)
    return [] if told is None else [row.tolist() for row in told]

  def run(self, forward: Callable[[], Passes], forget: Callable[[], None], *, last: bool) -> Passes:
    """forward(), a forward pass of a step, `last` if it is the step's; see `Rdep.run`."""
    return forward() if self.rdep is None else self.rdep.run(forward, forget, last=last)

  def attempt(self, passes: Callable[[], Passes]) -> tuple[bool, Passes | None]:
    """passes(), the forward and backward passes of a step, if they fitted; see `Rdep.attempt`."""
    if self.rdep is None:
      return True, passes()
    done, results = self.rdep.attempt(passes)
    if not done:
      join(self.side)  # with sums that read the gradients
    return done, results

  @property
  def apart(self) -> bool:
    """Whether some ranks may repeat a step's passes without the others: of several RDEP groups."""
    return self.rdep is not None and self.rdep.num_ranks < self.ranks

  @contextmanager
  def capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Inside, passes of a step are captured in this CUDA graph; see `Rdep.captured`."""
    self.graph = graph
    if self.rdep is None:
      yield
      return
    with self.rdep.captured():
      yield
      if self.reduced:
        join(self.side)  # a capture ends with all that it began
    self.captured, self.reduced = self.reduced, set()

  @contextmanager
  def replay(self) -> Iterator[None]:
    """Inside, the passes captured last are queued once more, after all weights have arrived."""
    if self.rdep is None:
      yield
      return
    self.arrive()
    with self.rdep.replayed():
      yield
    self.reduced = set(self.captured)

  def forget(self) -> None:
    """End the graph, if there is one, and give its memory back, once its last replay is over."""
    if self.graph is None:
      return
    torch.cuda.synchronize()
    self.graph.reset()
    self.graph, self.captured = None, set()
    if self.rdep is not None:
      self.rdep.capture, self.rdep.counts = None, {}  # which hold its memory

  def reduce_final(self, model: nn.Module) -> Callable[[int], None] | None:
    """What the model is to call in a step's last backward pass when the gradients of its blocks i,
    i + 1, … are final: their sums travel beside the rest of the pass. Every rank comes to the same
    buckets in the same order, and the sums are those of `reduce_gradients`.

    None where that is all done there: on one rank, and where the ranks are several RDEP groups, one
    of which may repeat a step's passes, as those of a graph, without the others.
    """
    if self.rdep is None or self.apart:
      return None
    params = dict(model.named_parameters())
    self.reduced = set()

    def reduce_from(block: int) -> None:
      ready = {
        (i, number)
        for i, part in enumerate(self.shared)
        for number, first in enumerate(part.block)
        if first >= block
      }
      if ready - self.reduced:  # a capture joins the stream only where it has work
        with beside(self.side):
          self._reduce(sorted(ready - self.reduced), params)

    return reduce_from

  @torch.no_grad()
  def reduce_gradients(self, model: nn.Module) -> None:
    """Make the gradients of the owned rows those of the global batch; the others are spent."""
    every = {(i, n) for i, part in enumerate(self.shared) for n in range(len(part.buckets))}
    self._reduce(sorted(every - self.reduced), dict(model.named_parameters()))
    join(self.side)
    self.reduced = set()

  def _reduce(self, which: list[tuple[int, int]], params: Mapping[str, nn.Parameter]) -> None:
    for i, number in which:
      part = self.shared[i]
      if self.own is not None and not self.reduced:
        self.own.zero_()
      grads = {p.name: params[p.name].grad for p in part.buckets[number]}
      part.reduce_bucket(number, grads, self.own)
      self.reduced.add((i, number))

  @torch.no_grad()
  def send_weights(self, model: nn.Module) -> None:
    """After the optimizer's step: begin to bring all rows of all parameters from their owners.

    They travel beside the next forward pass, whose blocks wait for their own (`Model.on_use`);
    whatever else reads weights calls `arrive` first.
    """
    weights = dict(model.named_parameters())
    order = sorted(
      (b, i, n) for i, part in enumerate(self.shared) for n, b in enumerate(part.block)
    )
    self.arriving = [self.shared[i].send_bucket(number, weights) for _, i, number in order]
    model.on_use = self.arrive

  @torch.no_grad()
  def arrive(self, block: int = sys.maxsize) -> None:
    """The weights of the blocks up to this one are there for what follows; by default, all are."""
    while self.arriving and self.arriving[0].block <= block:
      arrived = self.arriving.pop(0)
      arrived.work.wait()  # on a GPU the stream does, not the host
      copy(arrived.rows, arrived.told)

  @contextmanager
  def explained(self) -> Iterator[None]:
    """Around the step loop: errors of lost or late ranks become a CommError that says so."""
    with (
      collectives(self.rank, self.ranks),
      nullcontext() if self.rdep is None else self.rdep.explained(),
    ):
      yield

  def close(self) -> None:
    """Leave the run: the counterpart of `init`.

    A group's threads end with its last reference; one that outlives the interpreter may abort it.
    NCCL ends a group only when no graph has work of it any more.
    """
    self.arrive()
    self.forget()
    if self.ranks > 1:
      self.rdep.close()
      self.rdep, self.control, self.saving, self.shared = None, None, None, ()
      dist.destroy_process_group()


@contextmanager
def collectives(rank: int, ranks: int) -> Iterator[None]:
  """Around what waits for other ranks: torch's errors become a CommError."""
  try:
    yield
  except RuntimeError as error:
    told = isinstance(error, dist.DistError) or "gloo" in str(error) or "timeout" in str(error)
    if ranks == 1 or not told:
      raise
    raise CommError(
      f"rank {rank} of {ranks}: a collective failed ({str(error).splitlines()[0]}); "
      "another rank stopped or was late: see its log"
    ) from error


def init(
  config: Config, target: Target, meeting: Meeting, local_ranks: int | None = None
) -> Parallel:
  """Join the run's other ranks, who have met, and open all communicators.

  Gradients and weights travel over NCCL on GPUs, over gloo on the cpu and where ranks share a GPU
  (NCCL refuses that). A host has local_ranks ranks, None: there is one host.
  RDEP's heap is allocated here. Raises CommError, TargetError.
  """
  rank, ranks = meeting.rank, config.launch.ranks
  if ranks == 1:
    return Parallel()
  local_ranks = local_ranks or ranks
  alone = target.device.type == "cuda" and local_ranks <= torch.cuda.device_count()
  if target.device.type == "cuda" and not alone and local_ranks < ranks:
    here = f"{counted(local_ranks, 'rank')} on a host"
    raise ConfigError(
      f"{here} with {counted(torch.cuda.device_count(), 'GPU')}, {ranks} in all: on several hosts "
      "each rank needs a GPU of its own; lower launch.ranks_per_node"
    )
  if config.train.cuda_graph and not alone:
    raise ConfigError(
      f"{counted(local_ranks, 'rank')} on {counted(torch.cuda.device_count(), 'GPU')}: their sums "
      "go through the host, which a graph cannot capture; set train.cuda_graph = false"
    )
  timeout = timedelta(seconds=config.rdep.deadline_s)
  of_sums = timeout + LATER if alone else timeout
  with collectives(rank, ranks):
    meeting.store.set_timeout(timeout)
    dist.init_process_group(
      "nccl" if alone else "gloo",
      store=dist.PrefixStore("groups", meeting.store),
      rank=rank,
      world_size=ranks,
      timeout=of_sums,
      device_id=target.device if alone else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout) if alone else dist.group.WORLD
    saving = dist.new_group(backend="gloo", timeout=timedelta(seconds=SAVE_S))
    expert_ranks, replicas = expert_groups(config, control, timeout, of_sums)
  rdep = Rdep(config, target.ops, expert_ranks, target.symmetric)
  parts = shared(config, rank, replicas)
  side = torch.cuda.Stream(target.device) if target.device.type == "cuda" else None
  return Parallel(rank, ranks, rdep, rdep.first, control, saving, parts, side)


def expert_groups(
  config: Config, control: dist.ProcessGroup, timeout: timedelta, of_sums: timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
  """(this rank's RDEP group, by gloo; the ranks that hold its experts, or None if no other does).

  control: all ranks, by gloo. timeout: of the RDEP group; of_sums: of the replicas'. Collective.
  """
  ranks, group = config.launch.ranks, config.expert_ranks
  if group == ranks:
    return control, None
  rdep = [list(range(first, first + group)) for first in range(0, ranks, group)]
  replicas = [list(range(first, ranks, group)) for first in range(group)]
  return (
    dist.new_subgroups_by_enumeration(rdep, timeout=timeout, backend="gloo")[0],
    dist.new_subgroups_by_enumeration(replicas, timeout=of_sums)[0],
  )
