"""The flight recorder: what block-scaled formats lose, measured on a sampled step.

During such a step every recipe has an observer (`kernels.ops.Recipe.observe`), which sees each
operand as it is quantized, in forward and backward, over all micro-batches. Otherwise no recipe has
one, and nothing is measured. Observing changes no result. Tags, where `product` is q, kv_a, kv_b, o
(q_a, q_b), dense, shared or experts, and `leg` is fprop_x, fprop_w, dgrad_dy, dgrad_w, wgrad_x or
wgrad_dy, after "w13." or "w2." for blocks of two matrices:

  flight/{layer}/{product}/{leg}/sqnr_db     signal over quantization noise, dB
  flight/{layer}/{product}/{leg}/saturated   share of elements beyond their block's largest value
  flight/{layer}/{product}/{leg}/underflow   share of blocks whose scale fell below its format
  flight/{layer}/experts/{leg}/sqnr_db_min, _median and _max       over the experts that have rows
  flight/{layer}/experts/{leg}/{expert}/sqnr_db                    of each, by its global id

Each rank logs its own tokens and experts. Memory: a few fp32 copies of the largest operand.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from kernels.flight import Flight, flight, flight_sums
from kernels.ops import Operand
from nmoe.model.decoder import Experts, Linear, Model

Leg = tuple[int, str, str]  # layer, product, leg


class FlightRecorder:
  """Measures the steps that are multiples of `every`; 0: none."""

  def __init__(self, model: Model, every: int):
    self.model, self.every = model, every
    self.sums: dict[Leg, Tensor] = {}  # fp64 [experts of this rank or 1, 6], on the device

  def start(self, step: int) -> None:
    """Before the first forward pass of `step`, counted from 1."""
    if self.every and step % self.every == 0:
      for (layer, product), module in self.model.quantized.items():
        observe = partial(self._observe, layer, product, not isinstance(module, Linear))
        module.recipe = replace(module.recipe, observe=observe)

  def stop(self) -> dict[str, float]:
    """The values of the step that ends; {} if it was not measured. Waits for the device once."""
    if not self.sums:
      return {}
    for module in self.model.quantized.values():
      module.recipe = replace(module.recipe, observe=None)
    rows = torch.cat(list(self.sums.values())).tolist()
    values: dict[str, float] = {}
    for (layer, product, leg), sums in self.sums.items():
      own, rows = rows[: len(sums)], rows[len(sums) :]
      values |= self._values(layer, product, leg, own)
    self.sums = {}
    return values

  def mark(self) -> dict[Leg, Tensor]:
    """What passes have shown so far."""
    return dict(self.sums)

  def forget(self, mark: dict[Leg, Tensor]) -> None:
    """What passes have shown since; they run again."""
    self.sums = mark

  def _observe(self, layer: int, product: str, two: bool, operand: Operand) -> None:
    leg = f"{('w13', 'w2')[operand.salt]}.{operand.leg}" if two else operand.leg
    sums, key = flight_sums(operand), (layer, product, leg)
    self.sums[key] = self.sums[key] + sums if key in self.sums else sums

  def _values(self, layer: int, product: str, leg: str, own: list[list[float]]) -> dict[str, float]:
    where = f"flight/{layer}/{product}/{leg}"
    whole: Flight = flight([sum(column) for column in zip(*own, strict=True)])
    values = {f"{where}/{name}": value for name, value in whole._asdict().items()}
    module = self.model.quantized[layer, product]
    if isinstance(module, Experts):
      each = {module.first + i: flight(sums).sqnr_db for i, sums in enumerate(own)}
      each = {expert: db for expert, db in each.items() if not math.isnan(db)}
      values |= {f"{where}/{expert}/sqnr_db": db for expert, db in each.items()}
      of = {"min": min, "median": median, "max": max}
      values |= {f"{where}/sqnr_db_{name}": f(each.values()) for name, f in of.items() if each}
    return values
