"""Held-out evaluation: mean loss in nats per token and bits per byte."""

from __future__ import annotations

import torch

from nmoe.data.loader import Validation, bits_per_byte
from nmoe.distributed.parallel import Parallel
from nmoe.model.decoder import Model


@torch.no_grad()
def evaluate(
  model: Model, validation: Validation, micro_batch: int, ranks: Parallel
) -> dict[str, float]:
  """`val/loss` (nats per target token) and `val/bpb` over the frozen validation set.

  Each rank takes its share of every batch. Bits per byte counts the targets that have bytes;
  separators are in the loss but not in it (nmoe.data.loader.bits_per_byte). One host
  synchronisation, at the end.
  """
  device = model.embed.weight.device
  sums = torch.zeros(4, dtype=torch.float64, device=device)  # nats, targets, nats counted, bytes
  for batch in validation.batches(micro_batch, ranks.rank, ranks.ranks):
    tokens, targets, bytes_BS = (t.to(device) for t in batch)
    loss_T = model(tokens, targets).loss_T.double()
    bytes_T = bytes_BS.flatten()
    counted = loss_T * (bytes_T > 0)
    sums += torch.stack([loss_T.sum(), (targets >= 0).sum(), counted.sum(), bytes_T.sum()])
  nats, num_targets, nats_counted, num_bytes = ranks.sum(sums).tolist()
  return {"val/loss": nats / num_targets, "val/bpb": bits_per_byte(nats_counted, num_bytes)}
