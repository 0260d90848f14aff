"""Run a function on n ranks: one process each, joined by a gloo group."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "ranks"])


class Outcome(NamedTuple):
  value: Any  # what the function returned, None if it didn't
  error: str  # its traceback, "" if it returned
  exitcode: int


def outcomes(function: Callable, ranks: int, *args: Any, timeout_s: float = 60.0) -> list[Outcome]:
  """function(group, *args) in `ranks` processes; what became of each, by rank.

  function and args are picklable, function at its module's top level. Results should hold numpy
  arrays or plain values: a tensor would be shared with a process that is gone. A rank still running
  after timeout_s is killed.
  """
  with tempfile.TemporaryDirectory() as folder:
    pipes = [_processes.Pipe(duplex=False) for _ in range(ranks)]
    children = [
      _processes.Process(
        target=_main, args=(function, args, rank, ranks, folder, timeout_s, pipes[rank][1])
      )
      for rank in range(ranks)
    ]
    for child in children:
      child.start()
    for _, theirs in pipes:
      theirs.close()
    told = [_receive(mine, timeout_s) for mine, _ in pipes]
    for child in children:
      child.join(1.0 if None in told else timeout_s)
      if child.is_alive():
        child.kill()
        child.join()
  lost = (None, "no result: killed or timed out")
  return [
    Outcome(*(lost if t is None else t), child.exitcode)
    for t, child in zip(told, children, strict=True)
  ]


def run(function: Callable, ranks: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
  """Like `outcomes`, for functions that must succeed: their values by rank, or the tracebacks."""
  found = outcomes(function, ranks, *args, timeout_s=timeout_s)
  failed = [f"rank {r}: {o.error}" for r, o in enumerate(found) if o.error or o.exitcode]
  assert not failed, "\n".join(failed)
  return [o.value for o in found]


def _receive(pipe: Connection, timeout_s: float) -> tuple[Any, str] | None:
  if not wait_for([pipe], timeout_s):
    return None
  try:
    return pipe.recv()
  except EOFError:
    return None


def _main(
  function: Callable,
  args: tuple,
  rank: int,
  ranks: int,
  folder: str,
  timeout_s: float,
  pipe: Connection,
) -> None:
  torch.set_num_threads(1)
  store = dist.FileStore(str(Path(folder) / "store"), ranks)
  dist.init_process_group(
    "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s)
  )
  try:
    pipe.send((function(dist.group.WORLD, *args), ""))
  except BaseException:
    pipe.send((None, traceback.format_exc()))
    raise
  if dist.is_initialized():
    dist.destroy_process_group()
