"""The rows of experts moved apart by a gather.

A scatter would do, but torch's deterministic one (`index_copy_` on a GPU) sorts its indices first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gather(NamedTuple):
  """What lies at each place after a move."""

  source: Tensor  # int64 [size], where it was; 0 if there is nothing
  inside: Tensor  # bool [size], whether there is something


def gather(begin_E1: Tensor, place_E1: Tensor, size: int) -> Gather:
  """Expert e's rows begin[e] : begin[e + 1] go to place[e] and on; int32 [E + 1] both.

  place[e + 1] - place[e] is at least the number of e's rows. Rows beyond begin[-1] go nowhere.
  """
  at = torch.arange(size, device=begin_E1.device, dtype=torch.int32)
  expert = torch.searchsorted(place_E1[1:], at, right=True)  # E beyond the last one's place
  row = at - place_E1[expert] + begin_E1[expert]
  end_E1 = torch.cat([begin_E1[1:], begin_E1[-1:]])
  inside = row < end_E1[expert]
  return Gather(torch.where(inside, row, 0).long(), inside)


def moved(x: Tensor, to: Gather, dim: int = 0) -> Tensor:
  """x with its slices along `dim` at their places, and zeros where nothing is."""
  shape = list(x.shape)
  shape[dim] = len(to.source)
  if x.shape[dim] == 0:
    return x.new_zeros(shape)
  inside = to.inside.view([-1 if d == dim else 1 for d in range(x.ndim)])
  return torch.where(inside, x.index_select(dim, to.source), 0)
