"""Held-out evaluation: mean loss in nats per token and bits per byte."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nmoe.data.loader import Validation, bits_per_byte
from nmoe.distributed.parallel import Parallel
from nmoe.model.decoder import Model


@torch.no_grad()
def evaluate(
  model: Model,
  validation: Validation,
  micro_batch: int,
  ranks: Parallel,
  alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """`val/loss` (nats per target token) and `val/bpb` over the frozen validation set, and where it
  has several sources `val/bpb/SOURCE` of each.

  Each rank takes its share of every batch. Bits per byte counts the targets that have bytes;
  separators are in the loss but not in it (nmoe.data.loader.bits_per_byte). The host
  synchronises at the end. alive: called before each batch.
  """
  device = model.embed.weight.device
  sums = torch.zeros(4, dtype=torch.float64, device=device)  # nats, targets, nats counted, bytes
  by_source = torch.zeros(len(validation.names), 2, dtype=torch.float64, device=device)
  for n, batch in enumerate(validation.batches(micro_batch, ranks.rank, ranks.ranks)):
    alive()
    tokens, targets, bytes_BS = (t.to(device) for t in batch)
    loss_T = model(tokens, targets).loss_T.double()
    bytes_T = bytes_BS.flatten()
    counted = loss_T * (bytes_T > 0)
    sums += torch.stack([loss_T.sum(), (targets >= 0).sum(), counted.sum(), bytes_T.sum()])
    first = (n * ranks.ranks + ranks.rank) * micro_batch
    source_B = torch.from_numpy(validation.source_W[first : first + micro_batch]).to(device)
    rows = torch.stack([counted.view(bytes_BS.shape).sum(1), bytes_BS.sum(1).double()], dim=1)
    by_source.index_add_(0, source_B, rows[: len(source_B)])
  nats, num_targets, nats_counted, num_bytes = ranks.sum(sums).tolist()
  found = {"val/loss": nats / num_targets, "val/bpb": bits_per_byte(nats_counted, num_bytes)}
  if len(validation.names) > 1:
    for name, pair in zip(validation.names, ranks.sum(by_source).tolist(), strict=True):
      found |= {f"val/bpb/{name}": bits_per_byte(*pair)} if pair[1] else {}
  return found
