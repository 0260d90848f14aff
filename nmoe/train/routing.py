"""The routing recorder: which experts each source's tokens went to and what gates weigh, sampled.

During a sampled step every router has a hook that sees its choices, over all micro-batches of rank
0; otherwise none has one, and nothing is measured. It changes no result. Beside the loads of every
log (`nmoe.records.metrics`) it leaves rows of MoE layers by expert, named

  gate           Σ of the gates of the tokens that went to an expert, over the mean of experts
  source NAME    tokens of that source of the mixture that went to an expert
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kernels.ops import Routing
from nmoe.data.loader import Loader
from nmoe.model.decoder import Model


class RoutingRecorder:
  """Measures the steps that are multiples of `every`; 0: none.

  loader: whose samples rank 0 gets, the first `local` of each batch.
  """

  def __init__(self, model: Model, loader: Loader, every: int, *, local: int):
    self.routers, self.loader, self.every = model.routers, loader, every
    self.local = local
    self.sources = [source.name for source in loader.data.sources]
    self.hooks: list[torch.utils.hooks.RemovableHandle] = []
    self._begin()

  def start(self, step: int, first: int) -> None:
    """Before the first forward pass of `step`, counted from 1, whose batch begins at sample
    `first`.
    """
    if self.every and step % self.every == 0:
      ids = np.arange(first, first + self.local, dtype=np.uint64)
      self.source_B = torch.from_numpy(self.loader.locate(ids)[0].astype(np.int64))
      self.hooks = [
        router.register_forward_hook(partial(self._see, layer))
        for layer, router in enumerate(self.routers)
      ]

  def stop(self) -> dict[str, np.ndarray]:
    """Name -> [MoE layers, E] float32 of the step that ends; {} if it was not measured."""
    for hook in self.hooks:
      hook.remove()
    self.hooks = []
    if not self.gates:
      return {}
    gate_LE = torch.stack([self.gates[layer] for layer in sorted(self.gates)])
    gate_LE = (gate_LE / gate_LE.mean(1, keepdim=True).clamp(min=1e-12)).float().cpu()
    count_LSE = torch.stack([self.counts[layer] for layer in sorted(self.counts)]).cpu()
    of = {f"source {name}": count_LSE[:, i] for i, name in enumerate(self.sources)}
    self._begin()
    return {"gate": gate_LE.numpy()} | {k: v.float().numpy() for k, v in of.items()}

  def mark(self) -> tuple[dict, dict, dict]:
    """What passes have shown so far."""
    return dict(self.gates), dict(self.counts), dict(self.sequence)

  def forget(self, mark: tuple[dict, dict, dict]) -> None:
    """What passes have shown since; they run again."""
    self.gates, self.counts, self.sequence = mark

  def _begin(self) -> None:
    self.gates: dict[int, Tensor] = {}  # of each layer, fp64 [E], on the device
    self.counts: dict[int, Tensor] = {}  # int64 [sources, E]
    self.sequence: dict[int, int] = {}  # that each layer sees next

  @torch.no_grad()
  def _see(self, layer: int, router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
    expert_TK, gate_TK = routing.expert_TK.long(), routing.gate_TK.double()
    num_experts, sources = routing.score_TE.shape[1], len(self.sources)
    length = self.loader.seq_len
    first = self.sequence.get(layer, 0)
    self.sequence[layer] = last = first + len(expert_TK) // length
    source_T = self.source_B[first:last].repeat_interleave(length).to(expert_TK.device)
    place_N = (source_T[:, None] * num_experts + expert_TK).flatten()
    gate_E = gate_TK.new_zeros(num_experts)
    count_N = torch.zeros(sources * num_experts, dtype=torch.int64, device=place_N.device)
    gate_E.index_add_(0, expert_TK.flatten(), gate_TK.flatten())
    count_N.index_add_(0, place_N, torch.ones_like(place_N))
    self.gates[layer] = self.gates.get(layer, 0) + gate_E
    self.counts[layer] = self.counts.get(layer, 0) + count_N.view(sources, num_experts)
