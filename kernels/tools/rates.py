"""A kernel's rate beside what the device can do, both measured in the same interleaved runs.

The ceiling of TFLOP/s is the dense peak, an 8192³ bf16 product; of GB/s a device copy of 2 GiB.
Without a rest the runs follow each other and large products settle at the board's power limit, as
in training; with one the GPU idles before each run and clocks as high as it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.tools import timing
from kernels.tools.timing import SETS, WHOLE, Variant

PEAK = 8192
SCALE = {"TFLOP/s": 1e9, "GB/s": 1e6}  # of work over milliseconds


@dataclass(frozen=True)
class Row:
  """One measured case: ms, rate in TFLOP/s or GB/s, share of the ceiling."""

  what: str
  shape: dict
  ms: float
  ms_p10: float
  ms_p90: float
  rate: float
  unit: str
  share: float
  extra_gib: float | None = None


class Case(NamedTuple):
  """What is timed: run(i) works on input set i; work is its FLOPs, or the bytes it must move."""

  what: str
  run: Variant
  work: float
  shape: dict


class How(NamedTuple):
  """How cases are timed."""

  rest_s: float = 0.0  # of idling before each run
  repeats: int = timing.REPEATS

  @property
  def burst_s(self) -> float:
    return timing.REST_BURST_S if self.rest_s else timing.BURST_S


def normal(*shape: int, scale: float = 1.0, grad: bool = False, dtype=torch.bfloat16) -> Tensor:
  """Random normal values on the GPU."""
  return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_(grad)


def num_sets(nbytes: int) -> int:
  """Input sets of so many bytes that do not stay in this GPU's L2."""
  return timing.num_sets(nbytes, torch.cuda.get_device_properties(0).L2_cache_size)


def rows(cases: Sequence[Case], unit: str, how: How, sets: int = SETS) -> Iterator[Row]:
  """The ceiling of the unit, then the cases. sets: number of their input sets."""
  top = _dense_peak() if unit == "TFLOP/s" else _copy()
  all_cases = [top, *cases]
  variants = dict(enumerate(case.run for case in all_cases))
  run = timing.stopwatch(torch.device("cuda"), sets, how.rest_s)
  samples = timing.interleaved(variants, run, burst_s=how.burst_s, repeats=how.repeats)
  ceiling = None
  for number, case in enumerate(all_cases):
    spread = timing.spread(samples[number, WHOLE])
    rate = case.work / spread.median / SCALE[unit]
    ceiling = ceiling or rate
    yield Row(case.what, case.shape, *spread, rate, unit, rate / ceiling)


def _dense_peak() -> Case:
  """The product whose rate is called the dense peak."""
  pairs = [(normal(PEAK, PEAK), normal(PEAK, PEAK)) for _ in range(SETS)]
  shape = dict.fromkeys("MNK", PEAK)
  return Case("dense 8192³", lambda i: _product(*pairs[i % SETS]), 2.0 * PEAK**3, shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
  return a @ b


def _copy() -> Case:
  """A device copy, read and written: its rate bounds what a memory-bound kernel can do."""
  source, target = (torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda") for _ in range(2))
  return Case("copy", lambda _: target.copy_(source), 2.0**32, {"GiB": 2})
