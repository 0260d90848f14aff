"""`nmoe bench rdep` over two ranks of this machine's GPUs, or of its one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from kernels.arch import ARCHS
from stages.proofs import bench_rdep

pytestmark = pytest.mark.gpu
CONFIG = Path(__file__).parents[2] / "configs" / "moonlet" / "small.toml"


def test_two_ranks(monkeypatch, tmp_path) -> None:
  found = torch.cuda.get_device_capability()
  arch = next(a.name for a in ARCHS.values() if a.capability == found)
  monkeypatch.setenv("NMOE_TARGET__ARCH", f'"{arch}"')
  monkeypatch.setenv("NMOE_ROOT", str(tmp_path))
  console = Console(width=120)
  measured = bench_rdep.rdep(CONFIG, 2, 2048, None, console, tmp_path / "rdep.json", repeats=4)
  assert max(measured["deviation"].values()) < 2e-2
  dispatches = [row for row in measured["rows"] if row["what"] == "dispatch"]
  assert {row["sms"] for row in dispatches} == {4, 8, 16, 32, 64, 128}
  assert measured["backend"] == ("nccl" if torch.cuda.device_count() > 1 else "gloo")
  assert measured["dispatch_of_copy"] > 0 and measured["speedup"] > 0
