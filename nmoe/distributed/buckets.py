"""Buckets: gradients and weights of parameters that several ranks hold, on their way to and from
those that own their rows.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.config.parameters import BUCKET, Span, owned_rows, parameter_shapes
from nmoe.config.sections import Config

RENAMED = hasattr(dist, "all_gather_single")  # by torch 2.13, which warns of the names before
all_gather = dist.all_gather_single if RENAMED else dist.all_gather_into_tensor
reduce_scatter = dist.reduce_scatter_single if RENAMED else dist.reduce_scatter_tensor


class Piece(NamedTuple):
  """Consecutive elements of a parameter and their place in a bucket [N, C]."""

  name: str
  start: int
  stop: int
  owner: int
  at: int  # the first one's place in the owner's part

  def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[self.name].view(-1)[self.start : self.stop]

  def inside(self, bucket_NC: Tensor) -> Tensor:
    return bucket_NC[self.owner, self.at : self.at + self.stop - self.start]


def buckets(owned: Sequence[Mapping[str, Span]], row: Mapping[str, int]) -> list[list[Piece]]:
  """What each owner's rows [start, stop) are cut into: one after the other over the owner's parts.

  row: elements of a row, by parameter. A bucket has at most BUCKET elements.
  """
  width, found = -(-BUCKET // len(owned)), defaultdict(list)
  for owner, rows in enumerate(owned):
    place = 0
    for name, (first, last) in rows.items():
      start, stop = first * row[name], last * row[name]
      while start < stop:
        number, at = divmod(place, width)
        count = min(stop - start, width - at)
        found[number].append(Piece(name, start, start + count, owner, at))
        start, place = start + count, place + count
  return [found[number] for number in sorted(found)]


class Arriving(NamedTuple):
  """A bucket of weights on its way."""

  block: int  # the first one whose forward pass needs it
  work: dist.Work
  rows: list[Tensor]  # the others', in the parameters
  told: list[Tensor]  # what they become, once the work is done


class Shared:
  """Parameters of one dtype that all N members of a group hold, each row owned by one of them.

  owned: the rows of each member; row: elements of a row, by parameter. group: the members, in that
  order; None: all ranks. Collective.
  """

  def __init__(
    self,
    owned: Sequence[Mapping[str, Span]],
    row: Mapping[str, int],
    member: int,
    group: dist.ProcessGroup | None = None,
  ):
    self.members, self.member, self.group = len(owned), member, group
    self.owned = owned[member]
    self.buckets = buckets(owned, row) if self.members > 1 else []
    self.block = [min(_block(p.name) for p in pieces) for pieces in self.buckets]

  def reduce_bucket(
    self, number: int, grads: Mapping[str, Tensor], total: Tensor | None = None
  ) -> None:
    """Sum the owned rows of a bucket's gradients over the members, in fp32, rounded once. Other
    rows keep what they are. total: to it this rank's own part is added.
    """
    pieces = self.buckets[number]
    bucket_NC = self._bucket(pieces, grads, torch.float32)
    if bucket_NC.numel() > sum(p.stop - p.start for p in pieces):
      bucket_NC.zero_()  # what no piece fills is summed too
    copy([p.inside(bucket_NC) for p in pieces], [p.of(grads) for p in pieces])
    if total is not None:
      total += bucket_NC.sum()
    reduce_scatter(bucket_NC[self.member], bucket_NC.view(-1), group=self.group)
    mine = [p for p in pieces if p.owner == self.member]
    copy([p.of(grads) for p in mine], [p.inside(bucket_NC) for p in mine])

  def send_bucket(self, number: int, weights: Mapping[str, Tensor]) -> Arriving:
    """Begin to give every member the owners' rows of a bucket, bit for bit."""
    pieces = self.buckets[number]
    bucket_NC = self._bucket(pieces, weights, weights[pieces[0].name].dtype)
    mine = [p for p in pieces if p.owner == self.member]
    copy([p.inside(bucket_NC) for p in mine], [p.of(weights) for p in mine])
    work = all_gather(bucket_NC.view(-1), bucket_NC[self.member], group=self.group, async_op=True)
    others = [p for p in pieces if p.owner != self.member]
    rows, told = [p.of(weights) for p in others], [p.inside(bucket_NC) for p in others]
    return Arriving(self.block[number], work, rows, told)

  def _bucket(
    self, pieces: list[Piece], tensors: Mapping[str, Tensor], dtype: torch.dtype
  ) -> Tensor:
    width = max(p.at + p.stop - p.start for p in pieces)
    device = tensors[pieces[0].name].device
    return torch.empty(self.members, width, dtype=dtype, device=device)


def shared(
  config: Config, rank: int, replicas: dist.ProcessGroup | None = None
) -> tuple[Shared, ...]:
  """All parameters of a run over several ranks, by optimizer group.

  replicas: the ranks that hold the experts of `rank`; None: no other does.
  """
  row = {name: math.prod(shape[1:]) for name, shape in parameter_shapes(config).items()}
  place = {"expert": (rank // config.expert_ranks, replicas)}
  return tuple(
    Shared(owned, row, *place.get(kind, (rank, None))) for kind, owned in owned_rows(config).items()
  )


def _block(name: str) -> int:
  """The block that uses a parameter first, whose backward pass its gradient is final after: of
  the embedding one before them all, of the last norm and the head one behind.
  """
  if name.startswith("layers."):
    return int(name.split(".")[1])
  return -1 if name.startswith("embed.") else sys.maxsize


def copy(into: list[Tensor], of: list[Tensor]) -> None:
  if into:
    torch._foreach_copy_(into, of)
