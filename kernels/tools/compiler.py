"""Compile every kernel that a configuration runs, on a machine with or without a GPU.

The operations themselves are called, forward and backward, on meta tensors of the run's shapes:
what they would launch is compiled, put into the architecture's cache folder and not launched. So
the list of kernels can't drift from what training uses.

Run as `python -m kernels.tools.compiler` by kernels.tools.build; the process must have the
environment of kernels.arch.environment. With CUTE_DSL_KEEP=cubin in it, the machine code is
inspected as well. Operations are shared among worker processes, forked when all is imported; the
cache lets one of them compile a kernel that several need.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cutlass.cute as cute
import quack.cache.async_compile as async_compile
import torch
from torch.library import CustomOpDef

from kernels.cuda import jit
from kernels.cuda.jobs import jobs
from kernels.shapes import Shapes
from kernels.tools.inspect import Inspection, inspect


class _NotLaunched:
  """A compiled function whose call does nothing while `compile_only` holds."""

  def __init__(self, function: Callable):
    self._function = function

  def __call__(self, *args, **kwargs):
    return None if jit.compiling() else self._function(*args, **kwargs)

  def __getattr__(self, name: str):
    return getattr(self._function, name)


class _Module:
  """A loaded object file whose functions are `_NotLaunched`."""

  def __init__(self, module):
    self._module = module

  def __getitem__(self, name: str) -> _NotLaunched:
    return _NotLaunched(self._module[name])

  def __getattr__(self, name: str) -> _NotLaunched:
    return _NotLaunched(getattr(self._module, name))


class _Compile:
  """cute.compile, keeping what it compiled."""

  def __init__(self, compile_fn: Callable, compiled: list):
    self._compile, self._compiled = compile_fn, compiled

  def __getattr__(self, name: str):
    return getattr(self._compile, name)

  def __getitem__(self, key):
    return _Compile(self._compile[key], self._compiled)

  def __call__(self, *args, **kwargs) -> _NotLaunched:
    start = time.monotonic()
    function = self._compile(*args, **kwargs)
    self._compiled.append((function, time.monotonic() - start))
    return _NotLaunched(function)


def _substitutes(compiled: list) -> Iterator[tuple[object, str, object]]:
  """(owner, attribute, value) of all that would ask the driver, launch or refuse meta tensors."""
  num_sms = jit.ARCH.num_sms
  major, minor = jit.ARCH.capability
  properties = SimpleNamespace(multi_processor_count=num_sms, major=major, minor=minor)
  load = cute.runtime.load_module
  yield cute, "compile", _Compile(cute.compile, compiled)
  yield cute.runtime, "load_module", lambda *args, **kwargs: _Module(load(*args, **kwargs))
  yield torch.cuda, "get_device_properties", lambda *args: properties
  yield torch.cuda, "current_device", lambda: 0
  answers = {
    "get_max_active_clusters": lambda cluster_size, **_: num_sms // cluster_size,
    "get_device_multiprocessor_count": lambda *args: num_sms,
  }
  for module in [m for name, m in sys.modules.items() if name.startswith("quack")]:
    for name, value in list(vars(module).items()):
      if name in answers:
        yield module, name, answers[name]
      elif isinstance(value, CustomOpDef) and value._namespace == "quack":
        yield module, name, value._init_fn
        yield torch.ops.quack, value._name, value._init_fn


@contextmanager
def compile_only() -> Iterator[list]:
  """Inside, kernels.cuda takes meta tensors and launches nothing. Yields the growing list of
  (function, s).
  """
  compiled: list = []
  with ExitStack() as stack:
    stack.enter_context(jit.compile_mode())
    for owner, name, value in list(_substitutes(compiled)):
      stack.callback(setattr, owner, name, getattr(owner, name))
      setattr(owner, name, value)
    yield compiled


def build(shapes: Iterable[Shapes], workers: int) -> list[Inspection]:
  """Compile all kernels of runs of these shapes for the process's architecture, into its cache.

  Returns one record per kernel that wasn't cached, with the machine code's figures where cubins are
  kept. Of several workers' failures the first is raised, after all operations were tried.
  """
  async_compile._install_gpu_blind_device_attrs()
  todo = list(itertools.chain.from_iterable(map(jobs, shapes)))
  with compile_only() as compiled:
    run = partial(_run, todo, compiled)
    if workers == 1:
      found = itertools.chain.from_iterable(map(run, range(len(todo))))
      return inspect(list(found), jit.ARCH.name)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(todo)), fork, _remember, (run,)) as pool:
      return list(itertools.chain.from_iterable(pool.map(_work, range(len(todo)))))


def _run(todo: list[tuple[str, Callable]], compiled: list, index: int) -> list[tuple]:
  """(job, function, seconds) of what one operation compiles."""
  name, job = todo[index]
  compiled.clear()
  job()
  return [(name, function, seconds) for function, seconds in compiled]


def _remember(run: Callable[[int], list[tuple]]) -> None:
  """A worker's start: what it runs came with the fork, and only indices and records are sent."""
  _work.run = run


def _work(index: int) -> list[Inspection]:
  return inspect(_work.run(index), jit.ARCH.name)


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m kernels.tools.compiler")
  parser.add_argument("shapes", help="a list of Shapes, JSON")
  parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--records", type=Path, help="write the records here, JSON")
  parser.add_argument("--stamps", type=Path, nargs="+", default=[], help="made at the end, empty")
  given = parser.parse_args()
  records = build([Shapes(**one) for one in json.loads(given.shapes)], given.workers)
  if given.records:
    given.records.write_text(json.dumps([asdict(record) for record in records]))
  for stamp in given.stamps:
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()


if __name__ == "__main__":
  main()
