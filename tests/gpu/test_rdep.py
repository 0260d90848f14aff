"""RDEP over NVSHMEM with 2 and 4 ranks, on one GPU or more, against one rank and float64.

Under pytest, or `python tests/gpu/test_rdep.py [RANKS …]`, which prints what each rank reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from kernels.arch import ARCHS, environment

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
WAIT_S = 400  # for each rank
MISSING = ("missing", "missing in a graph")


def start(num_ranks: int, what: str, heard: bool = False) -> list[dict]:
  """The ranks' reports; fails with their output if one of them does. heard: what they say goes on
  to standard error meanwhile.
  """
  found = torch.cuda.get_device_capability()
  arch = next(a.name for a in ARCHS.values() if a.capability == found)
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
  env = {**os.environ, **environment(arch, Path.home() / ".cache" / "nmoe" / "kernels")}
  env["PYTHONPATH"] = path
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "rdep_ranks.py"), what]
    command += [str(num_ranks), str(Path(folder, "rendezvous"))]
    children = [
      subprocess.Popen(
        [*command, str(rank)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=None if heard else subprocess.STDOUT,
        text=True,
      )
      for rank in range(num_ranks)
    ]
    try:
      said = [child.communicate(timeout=WAIT_S)[0] for child in children]
    finally:
      for child in children:
        child.kill()
  failed = [text for text, child in zip(said, children, strict=True) if child.returncode]
  assert not failed, "\n".join(text[-4000:] for text in failed)
  return [json.loads(line) for text in said for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("num_ranks", "what"), [(2, "stores"), (4, "stores"), (2, "puts")])
def test_ranks_compute_what_one_rank_computes(num_ranks: int, what: str) -> None:
  assert len(start(num_ranks, what)) == num_ranks


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_rank_stops_the_others_with_a_post_mortem(what: str) -> None:
  reports = start(2, what)
  assert sorted(r["post-mortem"] == "stayed away" for r in reports) == [False, True]


if __name__ == "__main__":
  for ranks in map(int, sys.argv[1:] or ("2",)):
    for what in ("stores", "puts"):
      for report in start(ranks, what, True):
        sys.stdout.write(json.dumps({"path": what, **report}, indent=1) + "\n")
  for missing in MISSING:
    for report in start(2, missing, True):
      sys.stdout.write(json.dumps({"path": missing, **report}) + "\n")
