"""How everything here is timed: variants in turn, in runs long enough, on inputs that rotate.

One run is a number of calls in a row; its time per call is one sample. A run lasts about BURST_S: a
run of a single call would count what the host takes to queue its first kernels, and would end
before the board's power limit is felt. The variants take turns run by run, so that a drift of
clocks or of other tenants falls on all of them, and the first rounds are dropped. Call c of a run
works on input set c modulo their number: `num_sets` says how many the cache cannot hold.

Nothing here knows what is measured; a run is timed by `stopwatch`, or by the caller's own function
where it has phases or ranks (nmoe.bench.rdep).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

WARMUP, REPEATS, SETS = 5, 20, 3
BURST_S = 0.3
REST_BURST_S = 0.015  # of a run after a rest: the GPU stays cool
CYCLES_PER_S = 1.5e9  # of an idling GPU's clock, about
WHOLE = ""  # the one phase of a run that is not divided

Name = TypeVar("Name", bound=Hashable)
Variant = Callable[[int], object]  # of the number of an input set
Run = Callable[[Variant, int, int], Mapping[str, float]]  # see `stopwatch`


class Spread(NamedTuple):
  """Median and percentiles of samples, in their unit."""

  median: float
  p10: float
  p90: float


def spread(samples: Sequence[float]) -> Spread:
  """Linear between neighbours in order (Hyndman and Fan 1996, definition 7: numpy's default)."""
  ranks = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
  return Spread(*torch.tensor(samples, dtype=torch.float64).quantile(ranks).tolist())


def num_sets(nbytes: int, cache: int) -> int:
  """Input sets of so many bytes, of which all but one fill the cache; SETS at least."""
  return max(SETS, 1 + -(-cache // nbytes))


def stopwatch(device: torch.device, sets: int = SETS, rest_s: float = 0.0) -> Run:
  """run(variant, calls, first) -> seconds per call of `calls` calls in a row, as {WHOLE: s}.

  The calls work on input sets first, first + 1, ... By CUDA events, or by the wall clock of a CPU.
  Before them a GPU idles about rest_s, while the host fills its queue.
  """

  def on_gpu(variant: Variant, calls: int, first: int) -> Mapping[str, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if rest_s:
      torch.cuda._sleep(int(rest_s * CYCLES_PER_S))
    start.record()
    for call in range(calls):
      variant((first + call) % sets)
    end.record()
    end.synchronize()
    return {WHOLE: start.elapsed_time(end) / 1e3 / calls}

  def on_cpu(variant: Variant, calls: int, first: int) -> Mapping[str, float]:
    start = time.perf_counter()
    for call in range(calls):
      variant((first + call) % sets)
    return {WHOLE: (time.perf_counter() - start) / calls}

  return on_gpu if device.type == "cuda" else on_cpu


def interleaved(
  variants: Mapping[Name, Variant],
  run: Run,
  *,
  burst_s: float = BURST_S,
  warmup: int = WARMUP,
  repeats: int = REPEATS,
  slowest: Callable[[list[float]], list[float]] = list,
) -> dict[tuple[Name, str], list[float]]:
  """(variant, phase) -> milliseconds per call, one for each of `repeats` runs, in their order.

  run(variant, calls, first) times one run, by phases. With ranks, `slowest` gives the elementwise
  maximum over them: it decides the number of calls, so that all ranks make as many, and counts.
  """
  calls = {}
  for name, variant in variants.items():
    run(variant, 1, 0)
    seconds = sum(run(variant, SETS, 0).values())
    calls[name] = max(1, round(burst_s / max(slowest([seconds])[0], 1e-6)))
  samples: dict[tuple[Name, str], list[float]] = {}
  for number in range(warmup + repeats):
    for name, variant in variants.items():
      phases = run(variant, calls[name], number)
      for phase, seconds in zip(phases, slowest(list(phases.values())), strict=True):
        if number >= warmup:
          samples.setdefault((name, phase), []).append(1e3 * seconds)
  return samples
