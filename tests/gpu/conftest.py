"""These tests run on a GPU of a known architecture; without one only those ANYWHERE are collected,
whose questions the cpu answers.
"""

import os
from pathlib import Path

import torch

from kernels.arch import ARCHS, environment

ON_GPU = torch.cuda.is_available()
ANYWHERE = {"test_launch.py", "test_recompute_steps.py"}
tests = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = [] if ON_GPU else sorted(tests - ANYWHERE)

if ON_GPU:
  found = torch.cuda.get_device_capability()
  arch = next(arch.name for arch in ARCHS.values() if arch.capability == found)
  torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (
    False  # as nmoe.machine.target does
  )
  os.environ.update(environment(arch, Path.home() / ".cache" / "nmoe" / "kernels"))
