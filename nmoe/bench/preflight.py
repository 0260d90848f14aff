"""One rank of `nmoe prod check`: is this machine fit to train for weeks?

Each rank multiplies the same matrices again and again: the rate shows a slow processor, and the
bits of the product, the same on all ranks from the first time to the last, a faulty one. Then all
sum a buffer, as gradients are, write to the root, and try locks that rank 0 holds.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import socket
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nmoe.bench.recorded import recorded
from nmoe.config.sections import Config
from nmoe.distributed import parallel
from nmoe.distributed.hosts import select_alike
from nmoe.distributed.meeting import Meeting
from nmoe.distributed.parallel import Parallel
from nmoe.machine.target import Target
from nmoe.records.root import Root
from nmoe.train.startup import parser

BURN_S = 3.0
BUFFER = {"cpu": 1 << 24, "cuda": 1 << 30}  # bytes that the ranks sum
SUMS = 5
WRITTEN = 1 << 26  # bytes that each rank writes
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


def sqlite_locks_hold(path: Path, ranks: Parallel) -> bool:
  """Whether a transaction of rank 0 keeps this rank from writing: SQLite's locks (fcntl) are others
  than flock's. Collective.
  """
  if ranks.ranks == 1:
    return True
  path.parent.mkdir(parents=True, exist_ok=True)
  if ranks.rank == 0:
    with closing(sqlite3.connect(path, isolation_level=None)) as held:
      held.execute("CREATE TABLE IF NOT EXISTS t (x)")
      held.execute("BEGIN EXCLUSIVE")
      dist.barrier(ranks.control)
      dist.barrier(ranks.control)
    path.unlink(missing_ok=True)
    return True
  dist.barrier(ranks.control)
  kept_out = False
  with closing(sqlite3.connect(path, isolation_level=None, timeout=0.0)) as other:
    try:
      other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
      kept_out = True
  dist.barrier(ranks.control)
  return kept_out


def sum_rate(device: torch.device, ranks: Parallel) -> float:
  """GB/s of an all-reduce, by 2 (R - 1) / R of its bytes (NCCL's bus bandwidth); 0 on one rank."""
  if ranks.ranks == 1:
    return 0.0
  x = torch.zeros(BUFFER[device.type] // 4, device=device)
  ranks.sum(x)
  if device.type == "cuda":
    torch.cuda.synchronize(device)
  begun = time.perf_counter()
  for _ in range(SUMS):
    ranks.sum(x)
  if device.type == "cuda":
    torch.cuda.synchronize(device)
  seconds = (time.perf_counter() - begun) / SUMS
  return 2 * (ranks.ranks - 1) / ranks.ranks * x.nbytes / seconds / 1e9


def write_rate(root: Path, rank: int) -> float:
  """GB/s of a file that this rank writes and flushes to the disk, as all do at once."""
  path, block = root / f".preflight-{rank}", bytes(1 << 20)
  begun = time.perf_counter()
  try:
    with path.open("wb") as file:
      for _ in range(WRITTEN >> 20):
        file.write(block)
      file.flush()
      os.fsync(file.fileno())
    return WRITTEN / (time.perf_counter() - begun) / 1e9
  finally:
    path.unlink(missing_ok=True)


def report(target: Target, ranks: Parallel, root: Path, run: str) -> dict[str, Any]:
  """What this rank says."""
  tflops, first, last = burn(target.device, BURN_S)
  sum_gb_s, write_gb_s = sum_rate(target.device, ranks), write_rate(root, ranks.rank)
  held = (  # both on every rank: each is collective
    locks_hold(Root(root).lock(f"{run}-preflight"), ranks),
    sqlite_locks_hold(Root(root).prod(run) / "preflight.db", ranks),
  )
  return {
    "rank": ranks.rank,
    "host": socket.gethostname(),
    "processor": target.name,
    "tflops": tflops,
    "bits": first,
    "steady": first == last,
    "sum_gb_s": sum_gb_s,
    "write_gb_s": write_gb_s,
    "locks": all(held),
    "free_bytes": shutil.disk_usage(root).free,
  }


def measure(options: argparse.Namespace, config: Config, meeting: Meeting) -> dict[str, Any]:
  local_ranks = options.local_ranks
  target = select_alike(config, meeting, options.local_rank, local_ranks)
  ranks = parallel.init(config, target, meeting, local_ranks)
  mine = report(target, ranks, options.root, options.run)
  told = [mine]
  if ranks.ranks > 1:
    told = [{}] * ranks.ranks
    dist.all_gather_object(told, mine, ranks.control)
  ranks.close()
  return {"ranks": told}


if __name__ == "__main__":
  sys.exit(recorded(parser("nmoe.bench.preflight").parse_args(), measure))
