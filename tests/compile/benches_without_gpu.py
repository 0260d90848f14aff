"""Every bench on meta tensors: its kernels compile, and each of its cases runs on each input set.

Started by test_without_gpu.py in the environment of an architecture. Nothing is launched.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.tools import bench, rates
from kernels.tools.benches import dense, moe, state
from kernels.tools.compiler import compile_only

ROWS = 1024  # that a sum of counts is said to be, which meta tensors do not know
SETS_SEEN = 3


class OnMeta(TorchFunctionMode):
  """What asks for the device "cuda" gets meta tensors."""

  def __torch_function__(self, function, types, args=(), kwargs=None):
    kwargs = dict(kwargs or {})
    if kwargs.get("device") == "cuda":
      kwargs["device"] = "meta"
    return function(*args, **kwargs)


def once(cases, unit, how, sets=SETS_SEEN):
  """In place of kernels.tools.rates.rows: run each case a few times, unmeasured."""
  ceiling = rates.Row("ceiling", {}, 1.0, 1.0, 1.0, 1.0, unit, 1.0)
  yield ceiling
  for case in cases:
    assert case.work > 0, case
    for i in range(min(sets, SETS_SEEN)):
      case.run(i)
    yield rates.Row(case.what, case.shape, 1.0, 1.0, 1.0, case.work, unit, 1.0)


def main() -> None:
  Tensor.__int__ = lambda self: ROWS
  torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda: None
  torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda: 0
  for module in (moe, dense, state):
    module.rows = once
  moe.num_sets = lambda nbytes: SETS_SEEN
  names = set()
  with compile_only(), OnMeta():
    for name, run in bench.BENCHES.items():
      if name == "attention":
        continue  # FlashAttention-4 refuses meta tensors; kernels.cuda.jobs compiles it
      found = [row.what for row in run(rates.How())]
      sys.stdout.write(f"{name}: {', '.join(found[1:])}\n")
      names.add(name)
  assert len(names) == len(bench.BENCHES) - 1


if __name__ == "__main__":
  main()
