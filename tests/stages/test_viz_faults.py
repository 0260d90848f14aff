"""The dashboard's server where a run's files or the records are spoilt: the others are shown."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dashboard import client_of, make, series
from roots import KILLED, SPILLED, tree_hash

from nmoe.records.metrics import Metrics
from nmoe.records.root import Root


def killed_in_a_flush(root, run):
  path = Root(root).metrics(run, 0)
  assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -signal.SIGKILL
  assert Path(f"{path}.wal").exists()


def truncated(root, run):
  path = Root(root).metrics(run, 0)
  path.write_bytes(path.read_bytes()[:9000])


def missing(root, run):
  Root(root).metrics(run, 0).unlink()


def rewound(root, run):
  assert Metrics(root, run).rewind(7) == 33


def hot_journal(root, run):
  path = Root(root).experiments_db
  assert subprocess.run([sys.executable, "-c", SPILLED, path]).returncode == -signal.SIGKILL
  assert Path(f"{path}-journal").exists()


@pytest.mark.parametrize("seen_before", [True, False], ids=["live", "cold"])
@pytest.mark.parametrize(
  "fault, left",
  [(killed_in_a_flush, 40), (truncated, 0), (missing, 0), (rewound, 7), (hot_journal, 40)],
)
def test_a_fault_of_one_run_leaves_pages_and_other_runs(
  root, ids, tmp_path, fault, left, seen_before
):
  """Every page's question is answered after the fault, and what other runs logged is as before."""
  client = client_of(root, tmp_path)
  hurt, other = ids["baseline", 0], ids["variant", 1]
  query = {"run": [hurt, other], "tag": "val/bpb", "x": "step"}
  (before,) = series(client_of(root, tmp_path / "apart"), **query)
  if seen_before:
    series(client, **query)
  fault(root, hurt)
  tree = tree_hash(root)
  paths = ["runs", f"run/{hurt}", f"prod/{hurt}", f"compare?a={hurt}&b={other}"]
  paths += [
    "experiment/topk-1",
    f"troubles?run={hurt}&run={other}",
    f"experts?run={hurt}&layer=0",
    f"flips?a={hurt}&b={other}",
  ]
  for path in paths:
    assert client.get(f"/api/{path}").status_code == 200, path
  (after,) = series(client, **query)
  np.testing.assert_array_equal(kept(after, other), kept(before, other))
  shown = kept(after, hurt)
  if fault is truncated and seen_before:
    left = 40  # what was read before is shown
  np.testing.assert_array_equal(shown, kept(before, hurt)[:left])
  told = {truncated: "cannot be read", missing: "is gone" if seen_before else "is missing: it was"}
  troubles = client.get(f"/api/troubles?run={hurt}&run={other}").json()
  assert troubles.keys() == ({hurt} if fault in told else set())
  assert told.get(fault, "") in troubles.get(hurt, "")
  notice = client.get("/api/runs").json()["notice"]
  assert ("awaits recovery" in notice) == (fault is hot_journal)
  assert tree_hash(root) == tree


def kept(panel, run):
  """The values of a curve of `unpacked` where it has some."""
  values = panel[2].get(run, np.empty(0))
  return values[np.isfinite(values)]


def test_a_root_without_records_and_one_with_a_corrupt_run(root, tmp_path):
  empty = client_of(tmp_path / "nothing", tmp_path).get("/api/runs").json()
  assert empty["runs"] == [] and "no records" in empty["notice"]
  ids = make(root)
  path = Root(root).metrics(ids["baseline", 0], 0)
  path.write_bytes(path.read_bytes()[:6000])
  client = client_of(root, tmp_path)
  (bpb,) = series(client, run=[ids["baseline", 0], ids["baseline", 1]], tag="val/bpb")
  assert list(bpb[2]) == [ids["baseline", 1]]
  troubles = client.get(f"/api/troubles?run={ids['baseline', 0]}").json()
  assert "cannot be read" in troubles[ids["baseline", 0]]
