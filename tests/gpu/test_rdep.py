"""RDEP over NVSHMEM with 2 and 4 ranks, on one GPU or more, against one rank and float64.

Under pytest, or `python tests/gpu/test_rdep.py [RANKS …]`, which prints what each rank reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.arch import ARCHS, environment

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def start(num_ranks: int, what: str, said: int | None = subprocess.PIPE) -> list[dict]:
  """The ranks' reports; fails with their output if one of them does. said: None shows what they
  say meanwhile.
  """
  found = torch.cuda.get_device_capability()
  arch = next(a.name for a in ARCHS.values() if a.capability == found)
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
  env = {**os.environ, **environment(arch, Path.home() / ".cache" / "nmoe" / "kernels")}
  command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
  command += ["--master-port", "0", str(ROOT / "tests" / "gpu" / "rdep_ranks.py"), what]
  env["PYTHONPATH"] = path
  out = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
  done = subprocess.run(command, env=env, timeout=400, **out)
  assert done.returncode == 0, f"{done.stdout[-3000:]}\n{(done.stderr or '')[-6000:]}"
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("num_ranks", "what"), [(2, "stores"), (4, "stores"), (2, "puts")])
def test_ranks_compute_what_one_rank_computes(num_ranks: int, what: str) -> None:
  assert len(start(num_ranks, what)) == num_ranks


def test_a_missing_rank_stops_the_others_with_a_post_mortem() -> None:
  reports = start(2, "missing")
  assert sorted(r["post-mortem"] == "stayed away" for r in reports) == [False, True]


if __name__ == "__main__":
  for ranks in map(int, sys.argv[1:] or ("2",)):
    for what in ("stores", "puts"):
      for report in start(ranks, what, None):
        sys.stdout.write(json.dumps({"path": what, **report}, indent=1) + "\n")
  for report in start(2, "missing", None):
    sys.stdout.write(json.dumps(report) + "\n")
