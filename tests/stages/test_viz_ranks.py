"""The page of ranks: a planted straggler and its phase, from rank 0's file alone."""

import json
import struct

import numpy as np
import pytest
from dashboard import make
from starlette.testclient import TestClient

from nmoe.records.live import Live
from nmoe.records.metrics import Metrics
from nmoe.records.root import Root
from nmoe.train.stragglers import TOLD, tags
from stages.viz.ranks import gain
from stages.viz.server import Server

STEPS = range(1, 61)
SECONDS = {"load": 0.1, "forward": 1.0, "backward": 2.0, "clip": 0.1, "step": 0.3, "log": 0.05}
AFTER = {"load": "forward", "forward": "backward", "step": "log"}  # where the others then wait


def told(ranks, late=None, phase="", by=0.0, step=1):
  """What ranks tell at a log: `late` is late in `phase`, and the others wait in the phase after."""
  noise = np.random.default_rng(step)
  rows = []
  for rank in range(ranks):
    of = {name: s * (1 + 0.01 * noise.random()) for name, s in SECONDS.items()}
    if late is not None:
      of[phase if rank == late else AFTER[phase]] += by
    values = {f"time/{name}_s": s for name, s in of.items()}
    values |= {"rdep/rows": 1000.0 + 500 * (rank == 1), "rdep/rounds": 1.0 + (rank == 1)}
    rows.append([values.get(tag, 0.0) for tag in TOLD])
  return tags(rows)


def written(root, run, ranks, steps=STEPS, **straggler):
  writer = Metrics(root, run)
  for step in steps:
    writer.add(step, 100 * step, told(ranks, step=step, **straggler))
  writer.flush()


@pytest.fixture
def run(tmp_path):
  return make(tmp_path / "root", seeds=(0,))["baseline", 0]


def asked(tmp_path, run, px=300):
  """The header, x by kind, and the three maps [ranks, n], as the page reads them."""
  app = Server(Live(tmp_path / "root", tmp_path / "cache")).app()
  answer = TestClient(app, base_url="http://127.0.0.1").get(f"/api/ranks?run={run}&px={px}")
  assert answer.status_code == 200
  (length,) = struct.unpack_from("<I", answer.content)
  header = json.loads(answer.content[4 : 4 + length])
  n, at = header["n"], 4 + length
  x = np.frombuffer(answer.content, "<f8", 3 * n, at).reshape(3, n)
  maps = np.frombuffer(answer.content, "<f4", offset=at + 24 * n)
  return header, x, maps.reshape(3, header["ranks"], n) if n else maps


@pytest.mark.parametrize("ranks", [2, 4, 9])
@pytest.mark.parametrize("phase", AFTER)
def test_a_straggler_is_told_with_its_phase_though_the_others_wait_for_it(
  tmp_path, run, ranks, phase
):
  written(tmp_path / "root", run, ranks, late=ranks - 1, phase=phase, by=0.5)
  header, x, (late, where, _) = asked(tmp_path, run)
  found = header["phases"][header["late"]]
  assert (found["name"], found["rank"], header["ranks"]) == (phase, ranks - 1, ranks)
  whole = 0.5 if ranks > 2 else 0.25  # of two, the median lies between them
  assert found["above"] == pytest.approx(whole, abs=0.03)
  assert (np.array(x[0]) == list(STEPS)).all() and x[1][-1] == 6000
  assert late[-1].min() > 5 * (late[1:-1].max() if ranks > 2 else 0)
  assert {header["names"][int(i)] for i in where[-1]} == {phase}


def test_rows_and_means_are_those_of_numpy(tmp_path, run):
  """Of 60 logs in 7 parts: parts as equal as can be, the mean of each."""
  written(tmp_path / "root", run, 4)
  header, x, (late, _, even) = asked(tmp_path, run, px=7)
  logs = [told(4, step=step) for step in STEPS]
  part = np.arange(60) * 7 // 60
  step_s = np.array([[of[f"rank/{r}/step_s"] for of in logs] for r in range(4)])
  np.testing.assert_allclose(
    header["each"]["step_s"], np.stack([step_s[:, part == i].mean(1) for i in range(7)]).mean(0)
  )
  np.testing.assert_array_equal(x[0], [STEPS[np.flatnonzero(part == i)[-1]] for i in range(7)])
  np.testing.assert_allclose(even[:, 0], np.array([1000, 1500, 1000, 1000]) / 1125, rtol=1e-6)
  assert header["rounds"] == 2 and late.max() < 0.02


def test_balanced_routing_gives_what_the_fullest_rank_costs():
  assert gain(np.array([1000.0, 1500, 1000, 1000]), 0.6) == pytest.approx(
    1 / (0.4 + 0.6 * 1125 / 1500) - 1
  )
  assert gain(np.ones(4), 0.6) == 0 and gain(np.ones(4), None) is None


def test_no_other_file_is_opened(tmp_path, run):
  written(tmp_path / "root", run, 4)
  for rank in range(1, 4):
    Root(tmp_path / "root").metrics(run, rank).write_bytes(b"none of the page's business")
  header, *_ = asked(tmp_path, run)
  assert header["ranks"] == 4


def test_a_run_of_one_rank_and_one_of_a_grown_world(tmp_path, run):
  assert asked(tmp_path, run)[0] == {"n": 0, "ranks": 0}
  written(tmp_path / "root", run, 2)
  written(tmp_path / "root", run, 3, steps=range(61, 71))
  header, _, (late, _, _) = asked(tmp_path, run)
  assert (header["ranks"], header["n"]) == (3, 70) and np.isfinite(late).all()
