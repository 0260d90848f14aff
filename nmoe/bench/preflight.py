"""One rank of `nmoe prod check`: is this machine fit to train for weeks?

Each rank multiplies the same matrices again and again: the rate shows a slow processor, and the
bits of the product, the same on all ranks from the first time to the last, a faulty one.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.bench.recorded import recorded
from nmoe.config.sections import Config
from nmoe.distributed import parallel
from nmoe.distributed.parallel import Parallel
from nmoe.machine.target import Target, select
from nmoe.records.root import Root
from nmoe.train.startup import parser

BURN_S = 3.0
SIZE = {"cpu": 512, "cuda": 8192}  # of the square matrices


def burn(device: torch.device, seconds: float) -> tuple[float, str, str]:
  """(TFLOP/s, digest of the first product, digest of the last one) of `seconds` of products."""
  size, generator = SIZE[device.type], torch.Generator().manual_seed(0)
  dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
  a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
  first, products, begun = digest(a @ b), 0, time.perf_counter()
  while time.perf_counter() - begun < seconds:
    for _ in range(8):
      last = a @ b
    if device.type == "cuda":
      torch.cuda.synchronize(device)
    products += 8
  rate = 2 * size**3 * products / (time.perf_counter() - begun)
  return rate / 1e12, first, digest(last)


def digest(x: Tensor) -> str:
  return hashlib.sha256(x.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def locks_hold(path: Path, ranks: Parallel) -> bool:
  """Whether a lock that rank 0 holds on a file keeps this rank out. Collective."""
  if ranks.ranks == 1:
    return True
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    if ranks.rank == 0:
      fcntl.flock(file, fcntl.LOCK_EX)
    dist.barrier(ranks.control)
    kept_out = ranks.rank == 0
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      kept_out = True
    dist.barrier(ranks.control)
  path.unlink(missing_ok=True)
  return kept_out


def report(target: Target, ranks: Parallel, root: Path, run: str) -> dict[str, Any]:
  """What this rank says."""
  tflops, first, last = burn(target.device, BURN_S)
  return {
    "rank": ranks.rank,
    "host": socket.gethostname(),
    "processor": target.name,
    "tflops": tflops,
    "bits": first,
    "steady": first == last,
    "locks": locks_hold(Root(root).lock(f"{run}-preflight"), ranks),
    "free_bytes": shutil.disk_usage(root).free,
  }


def measure(options: argparse.Namespace, config: Config) -> dict[str, Any]:
  rank, local_ranks = options.rank, options.local_ranks
  local_rank = rank if options.local_rank is None else options.local_rank
  target = select(config, local_rank, local_ranks)
  ranks = parallel.init(config, target, rank, options.rendezvous, local_ranks)
  mine = report(target, ranks, options.root, options.run)
  told = [mine]
  if ranks.ranks > 1:
    told = [{}] * ranks.ranks
    dist.all_gather_object(told, mine, ranks.control)
  ranks.close()
  return {"ranks": told}


if __name__ == "__main__":
  sys.exit(recorded(parser("nmoe.bench.preflight").parse_args(), measure))
