from pathlib import Path

import pytest
import torch

from nmoe.train.profiler import Profiler


@pytest.mark.parametrize("total", [2, 3, 4, 20])
def test_a_run_of_any_length_leaves_a_trace(tmp_path: Path, total: int) -> None:
  """It says before it begins to write that it does: no step takes so long."""
  entered = []
  profiler = Profiler(tmp_path, total, lambda state: entered.append((state, _written(tmp_path))))
  for _ in range(total):
    torch.ones(4, 4) @ torch.ones(4, 4)
    profiler.step()
  assert entered == [("profiling", [])] and len(_written(tmp_path)) == 2
  assert "aten::mm" in (tmp_path / "trace.json").read_text()
  assert (tmp_path / "kernels.json").read_text() == "{}"


def _written(folder: Path) -> list[str]:
  return [path.name for path in folder.iterdir()]
