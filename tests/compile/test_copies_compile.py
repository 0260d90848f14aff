"""The quantized copies of weights in kernels.cuda, on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.arch import ARCHS, environment

pytestmark = pytest.mark.compile
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_weight_is_quantized_at_its_first_use_after_a_step(arch: str, tmp_path: Path) -> None:
  env = {**os.environ, **environment(arch, tmp_path), "PYTHONPATH": str(ROOT)}
  script = str(Path(__file__).with_name("copies_without_gpu.py"))
  done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]
