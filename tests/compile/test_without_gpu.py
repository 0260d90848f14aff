"""What the host side of kernels.cuda does, on machines without a GPU: each script compiles its
kernels and does their work itself.

  benches every bench runs on meta tensors
  copies  a weight is quantized at its first use after a step
  puts    blocks that are put carry what direct stores of rows carry
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from kernels.arch import ARCHS, environment

pytestmark = pytest.mark.compile
ROOT = Path(__file__).parents[2]
SCRIPTS = ("benches", "copies", "puts")


@pytest.fixture(scope="module")
def done(compiled) -> dict[tuple[str, str], subprocess.CompletedProcess]:
  """Every script on every architecture, as many at once as there are cores."""

  def run(case: tuple[str, str]) -> subprocess.CompletedProcess:
    script, arch = case
    env = {**os.environ, **environment(arch, compiled.cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name(f"{script}_without_gpu.py"))]
    return subprocess.run(command, env=env, capture_output=True, text=True)

  cases = list(product(SCRIPTS, ARCHS))
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_host_side(done, script: str, arch: str) -> None:
  found = done[script, arch]
  assert found.returncode == 0, found.stderr[-4000:]
