"""The put path: its kernels compile, and its blocks carry what direct stores of rows carry."""

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
def test_puts_move_what_direct_stores_move(arch: str, tmp_path: Path) -> None:
  env = {**os.environ, **environment(arch, tmp_path), "PYTHONPATH": str(ROOT)}
  script = str(Path(__file__).with_name("puts_without_gpu.py"))
  done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]
