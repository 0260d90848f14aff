"""`nmoe bench kernels` with a child that says what a GPU would."""

import io
import json
import subprocess

import pytest
from rich.console import Console

from nmoe.errors import ConfigError, RunError
from stages.proofs import bench_kernels

ROW = {
  "what": "combine",
  "shape": {"T": 8, "K": 2},
  "ms": 0.5,
  "ms_p10": 0.4,
  "ms_p90": 0.6,
  "rate": 4393.2,
  "unit": "GB/s",
  "share": 0.981,
  "extra_gib": None,
}


@pytest.fixture
def child(monkeypatch):
  """The commands and environments that are started; each answers with `answer`."""
  started = []

  def run(command, env, **_):
    started.append((command, env))
    text = "\n".join(map(json.dumps, ({"device": "a GPU"}, ROW)))
    return subprocess.CompletedProcess(command, run.status, text, "Traceback\nKernelError: no GPU")

  run.status, run.started = 0, started
  monkeypatch.setattr(bench_kernels.subprocess, "run", run)
  return run


def test_rows_in_a_table_and_a_file(child, tmp_path):
  said, out = io.StringIO(), tmp_path / "rows.json"
  console = Console(file=said, width=160)
  rows = bench_kernels.measure("sm_90a", tmp_path, ["combine"], 7, console, out)
  assert rows == [ROW] == json.loads(out.read_text())["rows"]
  words = said.getvalue()
  for part in ("device a GPU", "combine", "T 8 K 2", "0.500", "0.400–0.600", "4,393 GB/s", "0.98"):
    assert part in words
  command, env = child.started[0]
  assert command[1:] == ["-m", "kernels.tools.bench", "--repeats", "7", "combine"]
  assert env["CUTE_DSL_ARCH"] == "sm_90a" and env["QUACK_CACHE_DIR"].startswith(str(tmp_path))


def test_what_fails(child, tmp_path):
  console = Console(quiet=True)
  with pytest.raises(ConfigError, match="'cpu' has no kernels to measure; pass --arch sm_90a or"):
    bench_kernels.measure("cpu", tmp_path, [], 7, console)
  assert child.started == []
  child.status = 1
  with pytest.raises(RunError, match=r"(?s)-m kernels.tools.bench .* failed: .*no GPU"):
    bench_kernels.measure("sm_90a", tmp_path, [], 7, console)


def test_the_real_child_refuses_an_unknown_name(tmp_path):
  pytest.importorskip("quack")
  with pytest.raises(RunError, match="(?s)no bench is named nothing; choose from moe, grouped, "):
    bench_kernels.measure("sm_90a", tmp_path, ["nothing"], 1, Console(quiet=True))
