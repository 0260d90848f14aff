from pathlib import Path

import pytest
import torch

from nmoe.train.profiler import Profiler


@pytest.mark.parametrize("total", [2, 3, 4, 20])
def test_a_run_of_any_length_leaves_a_trace(tmp_path: Path, total: int) -> None:
  profiler = Profiler(tmp_path, total)
  for _ in range(total):
    torch.ones(4, 4) @ torch.ones(4, 4)
    profiler.step()
  assert "aten::mm" in (tmp_path / "trace.json").read_text()
  assert (tmp_path / "kernels.json").read_text() == "{}"
