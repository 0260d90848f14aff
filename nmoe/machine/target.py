"""The machine that a run computes on: checked and chosen once, before anything is allocated.

The only place that asks what hardware there is, and the only one that imports by name, so that a
machine without the CUDA packages never imports them. There is no fallback: a machine that is not
what [target] asks for is a TargetError. `python -m nmoe.machine.target` prints each architecture's
check.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType

import torch

from kernels.arch import ARCHS
from kernels.exchange import Memory
from kernels.ops import Ops
from nmoe.config.plan import peak_flops
from nmoe.config.sections import Config
from nmoe.errors import TargetError
from nmoe.machine import driver
from nmoe.machine.versions import installed, pip_line, requirements

MOST_THREADS = 8  # unless launch.threads asks: more wait for one another in products this small


@dataclass(frozen=True)
class Target:
  arch: str
  name: str  # of the processor, e.g. "NVIDIA B200"
  device: torch.device
  ops: Ops
  peak_flops: float  # dense FLOP/s of a rank: the data sheet's, on a CPU what a product reached
  symmetric: Memory | None = None  # RDEP's memory and row movers; None with one rank


def select(config: Config, rank: int = 0, local_ranks: int | None = None) -> Target:
  """The machine as [target] asks for it, with torch's determinism and threads set.

  rank: this process's number among the local_ranks of its host, None for all of the run; it picks
  the GPU, modulo those visible. Raises TargetError: what was found, what is wanted, and
  the line to change or the command to run.
  """
  t = config.target
  name = examine(t.arch, config.launch.ranks)
  package = "kernels.reference" if t.arch == "cpu" else "kernels.cuda"
  ops = _import(package)
  symmetric = _import(f"{package}.{_memory(config)}") if config.launch.ranks > 1 else None
  device = torch.device("cpu")
  if t.arch != "cpu":
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
  torch.use_deterministic_algorithms(t.deterministic)
  torch.utils.deterministic.fill_uninitialized_memory = False
  torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
  cores = len(os.sched_getaffinity(0))
  share = cores // (local_ranks or config.launch.ranks)
  torch.set_num_threads(config.launch.threads or min(MOST_THREADS, max(1, share)))
  peak = peak_flops(config, name) or _measured_peak()
  return Target(t.arch, name, device, ops, peak, symmetric)


def examine(arch: str, ranks: int = 1) -> str:
  """The name of this machine's processor if it is an `arch` with the packages that `ranks` need.

  Raises TargetError otherwise. Looks only: nothing is allocated and no CUDA context is made.
  """
  if arch == "cpu":
    return driver.cpu_name()
  where = driver.needs(arch)
  if not torch.cuda.is_available():
    raise TargetError(
      f"{where}; torch {torch.__version__} finds no CUDA device. {driver.remedy('cpu')}"
    )
  name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
  if capability != ARCHS[arch].capability:
    raise TargetError(driver.other(arch, name, capability))
  _check_packages(where, ranks)
  return name


def _check_packages(where: str, ranks: int) -> None:
  """TargetError unless the [cuda] extra is there in the pinned versions (NVSHMEM from 2 ranks)."""
  extra = [r for r in requirements() if r.extra == "cuda"]
  needed = [r for r in extra if ranks > 1 or "nvshmem" not in r.name]
  wrong = [r for r in needed if not r.allows(installed(r.name))]
  if wrong:
    others = ", ".join(f"{r.name} {installed(r.name) or 'not installed'}" for r in wrong)
    raise TargetError(
      f"{where} and {', '.join(r.line for r in needed)}; found {others}. Run: {pip_line(wrong)}"
    )


def _import(package: str) -> ModuleType:
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise TargetError(
      f"{package} cannot be imported: {error}. Run `nmoe doctor CONFIG` for what is missing"
    ) from error


def _memory(config: Config) -> str:
  """The module of RDEP's memory: direct stores, or puts without peer access."""
  return "symmetric" if config.rdep.peer_access else "puts"


def _measured_peak(size: int = 768, tries: int = 5) -> float:
  """FLOP/s of the best of a few fp32 products [size, size] on this rank's CPU threads."""
  a = torch.ones(size, size)
  a @ a
  seconds = []
  for _ in range(tries):
    begin = perf_counter()
    a @ a
    seconds.append(perf_counter() - begin)
  return 2 * size**3 / min(seconds)


def main() -> None:
  """Write JSON: arch -> {"name": ...} or {"error": ...}."""
  answers = {}
  for arch in ("cpu", *ARCHS):
    try:
      answers[arch] = {"name": examine(arch)}
    except TargetError as error:
      answers[arch] = {"error": str(error)}
  sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
  main()
