"""Whether a plan fits a device's memory, and the one line of a configuration that would make it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import get_args

from nmoe.config.file import changed
from nmoe.config.plan import GIB, Plan, plan
from nmoe.config.sections import Config, Recomputed, leaves
from nmoe.errors import ConfigError


@dataclass(frozen=True)
class Remedy:
  """The one line that makes a configuration fit."""

  key: str
  old: object
  new: object
  peak_bytes: int  # after the change


@dataclass(frozen=True)
class Misfit:
  needed: int
  available: int
  remedy: Remedy | None
  beside: str = ""  # who else takes of the memory

  def __str__(self) -> str:
    short = (
      f"the step needs {_gib(self.needed)} of memory and {_gib(self.available)} are there"
      f"{self.beside}: {_gib(self.needed - self.available)} too much"
    )
    if self.remedy is None:
      return f"{short}; no single line makes it fit: lower model.dim and model.num_layers"
    r = self.remedy
    old, new = (list(v) if isinstance(v, tuple) else v for v in (r.old, r.new))
    return f"{short}; set {r.key} = {new} (now {old}), which needs {_gib(r.peak_bytes)}"


# What two ranks had in use of an H200 each beside torch's tensors and RDEP's heap: 2.5 GiB at 12
# layers, 3.0 at 27, of which torch reserves more. And for how far peaks have been above today's
# plans, 0.9 % at most (configs/moonlight/RESULTS.md).
BESIDE, SLACK = 3.2 * GIB, 1.01


def room(total: int, config: Config) -> int:
  """Of a device's bytes those that a plan may count on. All of them with one rank, of which nothing
  of this kind is measured.
  """
  return total if config.launch.ranks == 1 else int((total - BESIDE) / SLACK)


def fits(needed: Plan, total: int, free: int | None = None) -> Misfit | None:
  """None if the plan's peak fits; else by how much it does not, and the cheapest line that helps.

  total: the device's bytes, of which a plan counts on `room`. free: those that nothing but what is
  planned has taken, if fewer than all are.

  In this order: smaller micro-batches, no CUDA graph, a smaller loss chunk, bf16 moments, a smaller
  RDEP capacity, recomputation, more ranks, fewer layers; of each the smallest change that fits.
  """
  free = total if free is None else free
  config, peak = needed.config, needed.peak_bytes
  available = min(free, room(total, config))
  if peak <= available:
    return None
  beside = " for it beside CUDA, NCCL and NVSHMEM" if available < free else ""
  for key, values in _candidates(config):
    for value in values:
      other = _with(config, key, value)
      if other is not None and other.peak_bytes <= min(free, room(total, other.config)):
        remedy = Remedy(key, leaves(config)[key], value, other.peak_bytes)
        return Misfit(peak, available, remedy, beside)
  return Misfit(peak, available, None, beside)


def _candidates(config: Config) -> Iterator[tuple[str, list]]:
  """Keys in order of what a change costs; values from the smallest change on."""
  c = config
  yield "train.micro_batch", list(range(c.train.micro_batch - 1, 0, -1))
  yield "train.cuda_graph", [False] if c.train.cuda_graph else []
  yield "train.loss_chunk", [n for n in (4096, 2048, 1024, 512) if n < c.train.loss_chunk]
  yield "optim.moments", ["bf16"] if c.optim.moments == "fp32" else []
  yield "rdep.capacity", [1.0] if c.rdep.capacity > 1 and c.expert_ranks > 1 else []
  names = get_args(Recomputed)
  parts = [[*p] for n in range(1, len(names) + 1) for p in combinations(names, n)]
  yield "train.recompute", [p for p in parts if {*p} > {*c.train.recompute}]
  ranks = [n for n in range(c.launch.ranks + 1, c.moe.num_experts + 1)]
  yield "launch.ranks", [n for n in ranks if c.moe.num_experts % n == 0]
  yield "model.num_layers", list(range(c.model.num_layers - 1, c.model.num_dense_layers, -1))


def _with(config: Config, key: str, value: object) -> Plan | None:
  """The plan of the changed configuration; None if it is not a valid one."""
  try:
    other = changed(config, {key: value})
  except ConfigError:
    return None
  return plan(other)


def _gib(count: float) -> str:
  return f"{count / GIB:.2f} GiB"
