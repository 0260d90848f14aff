"""The symmetric buffers that a configuration asks for; kernels.sizes says what lies where.

Does not import torch.
"""

from __future__ import annotations

import math

from kernels.sizes import BufferLayout
from nmoe.config.parameters import parameter_dtype
from nmoe.config.sections import Config

TRANSIENT = 2  # slots of received rows that one trip sends and reads (nmoe.distributed.rdep)


def row_slots(config: Config) -> int:
  """Buffers of received rows: one for each MoE layer, where x stays until its backward pass, and
  TRANSIENT for what is read in its own trip. One, from which rows are copied, where they are
  unpacked, padded or moved by puts.
  """
  r, m = config.rdep, config.model
  if r.payload != "bf16" or r.alignment > 1 or not r.peer_access:
    return 1
  return m.num_layers - m.num_dense_layers + TRANSIENT


def buffer_layout(config: Config, received: int | None = None) -> BufferLayout:
  """One rank's block, for `received` rows in a round: ⌈capacity · T·K⌉ where None.

  They are rounded up to the alignment, in each slot.
  """
  align = config.rdep.alignment
  if received is None:
    received = math.ceil(config.rdep.capacity * config.rows)
  return BufferLayout(
    ranks=config.expert_ranks,
    experts=config.moe.num_experts,
    capacity=max(math.ceil(received / align), 1) * align,
    rows=config.rows,
    dim=config.model.dim,
    dtype=parameter_dtype(config),
    payload=config.rdep.payload,
    slots=row_slots(config),
  )
