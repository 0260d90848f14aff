"""The dashboard's server: runs, their curves and tags, live; it leaves the root alone."""

import json
import math

import anyio
import numpy as np
import pytest
from dashboard import series
from roots import tree_hash, write

from nmoe.config import file as configs
from nmoe.records import live
from nmoe.records.live import Live
from nmoe.records.metrics import Metrics
from stages.viz.answers import _marked
from stages.viz.columns import joined
from stages.viz.server import Server


def test_runs_stand_once_with_their_experiments_and_configurations(client, ids):
  seen = client.get("/api/runs").json()
  assert [run["id"] for run in seen["runs"]] == list(ids.values())[::-1]
  assert [e["id"] for e in seen["experiments"]] == ["again-1", "topk-1"]
  assert seen["experiments"][1]["verdict"] == "confirmed"
  by_id = {run["id"]: run for run in seen["runs"]}
  variant = by_id[ids["variant", 2]]
  assert dict(seen["configs"][variant["config"]])["moe.top_k"] == 2
  assert len(seen["configs"]) == 2 and variant["results"] == {"val/bpb": pytest.approx(2.88)}
  assert variant["memberships"] == [["topk-1", "variant"]] and 0 <= variant["age_s"] < 600


def test_series_are_the_logged_values_on_the_x_that_was_asked(client, root, ids):
  a, b = ids["baseline", 0], ids["variant", 1]
  query = dict(run=[a, b], tag=["val/bpb", "never", "train/loss"], px=100)
  bpb, never, loss = series(client, **query, x="tokens")
  np.testing.assert_array_equal(bpb[1], np.arange(1, 41) * 100.0)
  np.testing.assert_allclose(bpb[2][a], 2.0 / np.arange(1, 41), rtol=1e-6)
  np.testing.assert_allclose(bpb[2][b], 2.0 / np.arange(1, 41) - 0.11, rtol=1e-6)
  assert never[2] == {} and bpb[3][a] == [4000.0, 0.05]
  np.testing.assert_allclose(loss[2][b], 3.89, rtol=1e-6)
  (bpb,) = series(client, run=a, tag="val/bpb", x="step", **{"from": 10, "to": 12})
  np.testing.assert_array_equal(bpb[1], [10, 11, 12])
  (bpb,) = series(client, run=a, tag="val/bpb", x="time")
  assert bpb[1][0] == 0 and (np.diff(bpb[1]) > 0).all()


def test_a_new_line_is_in_the_next_answer_and_other_ranks_files_are_not_opened(client, root, ids):
  run = ids["baseline", 0]
  assert series(client, run=run, tag="val/bpb", x="step")[0][1][-1] == 40
  writer = Metrics(root, run)
  writer.add(41, 4100, {"val/bpb": 9.0})
  writer.flush()
  other = Metrics(root, run, rank=3)
  other.add(7, 700, {"val/bpb": 8.0})
  other.flush()
  (bpb,) = series(client, run=run, tag="val/bpb", x="step")
  assert bpb[1][-1] == 41 and bpb[2][run][-1] == 9 and bpb[2][run][6] == np.float32(2 / 7)
  assert client.get(f"/api/run/{run}").json()["ranks"] == [0, 3]


def test_a_table_its_sparks_and_ten_runs_open_every_file_once(client, ids, monkeypatch):
  opened, attach = [], live._attach
  monkeypatch.setattr(live, "_attach", lambda *of: (opened.append(of[1]), attach(*of)))
  panels = client.get("/api/runs").json()["panels"]
  series(client, run=list(ids.values()), tag=panels)
  apart = series(client, run=list(ids.values()), tag="train/loss", apart=1, px=40)
  assert [list(panel[2]) for panel in apart] == [[run] for run in ids.values()]
  np.testing.assert_allclose(apart[1][2][ids["baseline", 1]], 4.0)
  assert len(opened) == len(set(opened)) == len(ids)


def test_tags_are_those_that_one_of_the_named_runs_logged(client, root, ids):
  own = ids["baseline", 0]
  writer = Metrics(root, own)
  writer.add(41, 4100, {"moe/0/dead": 1.0})
  writer.flush()
  both = [("run", own), ("run", ids["variant", 0])]
  logged = ["time/step_s", "train/loss", "train/tokens_per_s", "val/bpb"]
  assert client.get("/api/tags", params=both).json() == {"tags": ["moe/0/dead", *logged]}
  assert client.get("/api/tags", params=both[1:]).json() == {"tags": logged}
  assert [client.get(f"/api/tags{of}").status_code for of in ("", "?run=x")] == [404, 404]


def test_many_points_keep_their_spikes_in_two_points_a_pixel():
  x = np.arange(100_000.0)
  y = np.sin(x / 9000)
  y[77_777] = 50.0
  y[123] = np.nan
  grid, (thin, short) = joined([(x, y), (x[:500], y[:500])], 300)
  assert len(grid) == len(thin) == 600 and (np.diff(grid) > 0).all()
  assert thin.max() == 50 and np.nanmin(thin) == np.nanmin(y)
  at = np.argmax(thin)
  assert abs(grid[at] - 77_777) <= 100_000 / 300
  for i in (0, 100, 299):  # each bin's extremes are those of its points
    end = (i + 1) * 99_999 / 300 + (i == 299)  # the last bin has the last point too
    inside = y[(x >= i * 99_999 / 300) & (x < end)]
    assert thin[2 * i] == np.nanmin(inside) and thin[2 * i + 1] == np.nanmax(inside)
  assert np.isfinite(short).sum() == 4


def test_few_points_of_different_x_are_joined_as_they_are():
  x, (a, b) = joined([(np.array([1.0, 3]), np.array([5.0, 6])), (np.array([2.0]), np.ones(1))], 9)
  np.testing.assert_array_equal(x, [1, 2, 3])
  np.testing.assert_array_equal(a, [5, math.nan, 6])
  np.testing.assert_array_equal(b, [math.nan, 1, math.nan])
  assert [len(part) for part in (joined([], 9)[0], *joined([(x[:0], x[:0])], 9)[1])] == [0, 0]


def test_events_name_the_runs_that_changed(root, ids, tmp_path):
  server = Server(Live(root, tmp_path / "cache"), every_s=0.01)

  async def first_two():
    changes = server._changes()
    first = await anext(changes)
    write(root, range(1), run=ids["variant", 1])
    second = await anext(changes)
    await changes.aclose()
    return [json.loads(line.removeprefix("data: ")) for line in (first, second)]

  assert anyio.run(first_two) == [
    {"records": True, "runs": []},
    {"records": False, "runs": [ids["variant", 1]]},
  ]


def test_a_session_writes_nothing_below_the_root(client, root, ids):
  before = tree_hash(root)
  some = ids["baseline", 0]
  client.get("/api/runs")
  series(client, run=list(ids.values()), tag=["val/bpb", "train/loss"])
  for path in (f"run/{some}", f"compare?a={some}&b={some}", f"prod/{some}", "experiment/topk-1"):
    assert client.get(f"/api/{path}").status_code == 200, path
  client.get(f"/api/experts?run={some}&layer=0")
  assert tree_hash(root) == before


def test_a_configuration_marks_what_is_given():
  toml = configs.to_toml(configs.load("configs/moonlet/cpu.toml", env={}))
  marked = {row["key"]: row for row in _marked(toml)}
  assert marked["moe.num_experts"]["given"] and marked["moe.num_experts"]["kind"] == "identity"
  assert not marked["train.seed"]["given"] and marked["train.micro_batch"]["value"] == "16"
