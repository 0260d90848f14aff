"""Where RDEP's rows lie in their owners' buffers: a pure function of the counts, the same on all
ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
  """Places of rows in their owner's sorted rows. Rank r owns L = E/R neighbouring experts."""

  base_RE: Tensor  # int64: of rank r's first row for expert e
  edge_RL1: Tensor  # int64: of the first row of each of r's experts, aligned; then where r's rows
  # end, padding included

  @property
  def end_R(self) -> Tensor:
    return self.edge_RL1[..., -1]


def places(count_RE: Tensor, alignment: int) -> Places:
  """Expert-major, then source rank; experts start at multiples of `alignment`. count_RE: the tokens
  that rank r sends to expert e; or [..., R, E], of several layers.
  """
  ranks, count_RE = count_RE.shape[-2], count_RE.long()
  padded_RL = (-(-count_RE.sum(-2) // alignment) * alignment).unflatten(-1, (ranks, -1))
  edge_RL1 = torch.nn.functional.pad(padded_RL.cumsum(-1), (1, 0))
  before_RE = count_RE.cumsum(-2) - count_RE
  return Places(edge_RL1[..., :-1].flatten(-2).unsqueeze(-2) + before_RE, edge_RL1)
