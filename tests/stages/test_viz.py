"""The dashboard's server: what it answers, whom it refuses, and that it leaves the root alone."""

import hashlib
import json
import math
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from importlib import resources
from itertools import product
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import anyio
import numpy as np
import pytest
from roots import KILLED, SPILLED, start_run, tree_hash, write
from starlette.testclient import TestClient

from nmoe.config import file as configs
from nmoe.errors import RunError
from nmoe.evals.measure import Items, write_items
from nmoe.evals.requests import read_task
from nmoe.evals.sources import prepare
from nmoe.records import goodput, live
from nmoe.records.attempts import Attempts
from nmoe.records.experiments import Experiments
from nmoe.records.live import Live
from nmoe.records.metrics import Metrics
from nmoe.records.reader import ArmRecord, Hypothesis
from nmoe.records.root import Root
from stages.judge.intervals import student_t
from stages.viz.answers import _marked
from stages.viz.columns import joined
from stages.viz.guard import COOKIE
from stages.viz.server import PAGES, Server, listening, serve

TOKEN = "0123456789abcdef0123456789abcdef"
TOML = """[experiment]
name = "x"
statement = "It learns."
[target]
arch = "cpu"
[moe]
top_k = {k}
[train]
seed = {seed}
"""


def make(root, seeds=(0, 1, 2), steps=range(1, 41)):
  """An ablation of two arms whose values are known: variant = baseline − 0.1 − 0.01 · seed."""
  records = Experiments(root)
  claim = Hypothesis("Top-2 learns faster.", "val/bpb", "lower", 0.05)
  experiment = records.create("topk", "ablate", [claim])
  ids = {}
  for arm, seed in product(("baseline", "variant"), seeds):
    shift = -0.1 - 0.01 * seed if arm == "variant" else 0.0
    toml = TOML.format(k=2 if arm == "variant" else 1, seed=seed)
    run = start_run(records, experiment.id, arm, seed, toml=toml, fingerprint=arm)
    writer = Metrics(root, run.id)
    for step in steps:
      values = {"train/loss": 3.0 + seed + shift, "val/bpb": 2.0 / step + shift}
      writer.add(step, step * 100, values | {"train/tokens_per_s": 50.0, "time/step_s": 1e-9})
    writer.flush()
    records.update_run(run.id, status="completed", results={"val/bpb": 1.0 + seed + shift})
    ids[arm, seed] = run.id
  records.conclude(experiment.id, "confirmed", {"reason": "by far"})
  other = records.create("again", "ablate", [claim])
  records.link(other.id, experiment.id, "repeats", "on another machine")
  records.close()
  return ids


@pytest.fixture
def root(tmp_path):
  (tmp_path / "root").mkdir()
  return tmp_path / "root"


@pytest.fixture
def ids(root):
  return make(root)


@pytest.fixture
def client(root, ids, tmp_path):
  return client_of(root, tmp_path)


def client_of(root, tmp_path, host="127.0.0.1", token="", base="http://127.0.0.1:8790"):
  app = Server(Live(root, tmp_path / "cache"), every_s=0.05).app(host, token)
  return TestClient(app, base_url=base, follow_redirects=False)


def unpacked(body):
  """[(tag, x, {run: y}, {run: last})], as the page reads it."""
  (length,) = struct.unpack_from("<I", body)
  header = json.loads(body[4 : 4 + length])
  at = 4 + length
  assert at % 8 == 0
  xs, panels = [], []
  for panel in header:
    xs.append(np.frombuffer(body, "<f8", panel["length"], at))
    at += 8 * panel["length"]
  for panel, x in zip(header, xs, strict=True):
    ys, last = {}, {}
    for curve in panel["curves"]:
      key = curve["run"]
      ys[key], last[key] = np.frombuffer(body, "<f4", len(x), at), curve["last"]
      at += 4 * len(x)
    panels.append((panel["tag"], x, ys, last))
  assert at == len(body)
  return panels


def series(client, **query):
  answer = client.get("/api/series", params=query)
  assert answer.status_code == 200, answer.text
  return unpacked(answer.content)


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


def test_a_comparison_is_paired_by_seed_and_has_students_band(client, ids):
  names = {arm: ",".join(v for (a, _), v in ids.items() if a == arm) for arm, _ in ids}
  seen = client.get("/api/compare", params={"a": names["baseline"], "b": names["variant"]}).json()
  (row,) = (row for row in seen["rows"] if row["key"] == "val/bpb")
  d = np.array([-0.10, -0.11, -0.12])
  half = student_t(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
  assert row["difference"]["mean_difference"] == pytest.approx(-0.11)
  assert row["difference"]["low"] == pytest.approx(-0.11 - half)
  curve = seen["curves"]["val/bpb"]
  assert curve["steps"] == list(range(1, 41)) and len(curve["seeds"]) == 3
  np.testing.assert_allclose(curve["high"], -0.11 + half)
  assert seen["curves"]["val/loss"] is None and seen["seeds"] == [0, 1, 2]
  assert "error" in seen["changes"], "this TOML is half a configuration"


def test_a_difference_names_the_pairs_that_logged_it(client, root, ids):
  """Not the seeds of all pairs: one whose metrics are gone has no curve."""
  Root(root).metrics(ids["variant", 0], 0).unlink()
  sides = (",".join(ids[arm, seed] for seed in range(3)) for arm in ("baseline", "variant"))
  answer = client.get("/api/compare", params=dict(zip("ab", sides, strict=True))).json()
  curve = answer["curves"]["val/bpb"]
  assert answer["seeds"] == [0, 1, 2] and curve["of"] == [1, 2]
  np.testing.assert_allclose([of[-1] for of in curve["seeds"]], [-0.11, -0.12], atol=1e-6)


def test_an_experiment_tells_its_verdict_arms_and_evidence(client, ids):
  seen = client.get("/api/experiment/topk-1").json()
  assert (seen["verdict"], seen["reason"]) == ("confirmed", "by far")
  assert [arm["name"] for arm in seen["arms"]] == ["baseline", "variant"]
  assert [run["seed"] for run in seen["arms"][1]["runs"]] == [0, 1, 2]
  (result,) = seen["results"]
  assert result["rows"][0]["difference"]["n"] == 3
  assert [(k["from_id"], k["relation"], k["to_id"]) for k in seen["graph"]["links"]] == [
    ("again-1", "repeats", "topk-1")
  ]
  assert {node["id"] for node in seen["graph"]["nodes"]} == {"topk-1", "again-1"}
  assert seen["report"] is False and client.get("/report/topk-1").status_code == 404


def test_the_production_page_tells_what_the_report_and_status_tell(client, root, ids):
  run = ids["baseline", 0]
  empty = client.get(f"/api/prod/{run}").json()
  assert empty["attempts"] == empty["spans"] == [] and empty["goodput"] is None
  assert not any(row["production"] for row in client.get("/api/runs").json()["runs"])
  history = Attempts(root)
  number = history.begin(run, engine="slurm", job_id="77", nodes=["a"], commit="c", step=0)
  history.started(run, number, 0, "a", {"startup": {"model": 1e-4}})
  writer = Metrics(root, run)
  values = {"checkpoint/stall_s": 1e-5, "time/eval_s": 2e-5, "train/loss": 1.0}
  writer.add(41, 4100, values | {"train/tokens_per_s": 50.0})
  writer.flush()
  history.end(run, number, outcome="crashed", exit_status=1, step=41)
  history.close()
  seen = client.get(f"/api/prod/{run}").json()
  known = goodput.production(root, run)
  assert seen["seconds"] == known.seconds and sum(known.seconds.values()) == pytest.approx(
    known.wall_s
  )
  told = {name: getattr(known, name) for name in ("wall_s", "goodput", "ettr", "step", "tokens")}
  assert {name: seen[name] for name in told} == told and seen["step"] == 41
  assert [span["bucket"] for span in seen["spans"]] == [span.bucket for span in known.spans]
  (attempt,) = seen["attempts"]
  assert (attempt["engine"], attempt["outcome"], attempt["last_step"]) == ("slurm", "crashed", 41)
  (row,) = [r for r in client.get("/api/runs").json()["runs"] if r["production"]]
  assert row["id"] == run and seen["tokens_per_s"] == 50


def test_a_broken_heartbeat_is_refused_in_words(client, root, ids):
  run = ids["baseline", 0]
  Root(root).heartbeat(run).parent.mkdir(parents=True)
  Root(root).heartbeat(run).write_text('{"entry": {"step"')
  answer = client.get(f"/api/prod/{run}")
  assert answer.status_code == 503 and "heartbeat.json: no heartbeat" in answer.text


def test_a_restart_says_how_far_back_it_went(tmp_path, root):
  run = make(root, seeds=(0,), steps=range(1, 8))["baseline", 0]
  writer = Metrics(root, run)
  assert writer.rewind(4) == 3
  started = {"startup/first_step_s": 1.0, "startup/rewound_steps": 3.0}
  for step in (5, 6):
    writer.add(step, step * 100, {"train/loss": 1.0} | (started if step == 5 else {}))
  writer.flush()
  client = client_of(root, tmp_path)
  for page in ("run", "prod"):
    (start,) = client.get(f"/api/{page}/{run}").json()["starts"]
    assert (start["step"], start["tokens"], start["rewound"]) == (4, 400, 3), page


def items_file(root, run, step, right):
  """A task "t" of documents of two choices each; `right` says which the run gets right."""
  n = len(right)
  gold = np.tile([True, False], n)
  better = np.repeat(right, 2) == gold  # the more probable choice
  nats = np.where(better, 1.0, 2.0)
  of, one = np.repeat(np.arange(n), 2), np.ones(2 * n, np.int64)
  items = Items(of, np.tile([0, 1], n), gold, nats, one, one, one, better)
  write_items(Root(root).eval_items(run, step, "mine"), {"t": items})


def test_items_that_flipped_are_counted_by_seed(client, root, ids, tmp_path):
  a = {0: [1, 1, 0, 0, 1], 1: [1, 0, 0, 0, 1]}
  b = {0: [1, 0, 1, 0, 1], 1: [1, 1, 1, 0, 1]}
  for arm, of in (("baseline", a), ("variant", b)):
    for seed, right in of.items():
      for step, answers in ((10, right[::-1]), (20, right)):
        items_file(root, ids[arm, seed], step, np.array(answers, bool))
  lines = [
    {"task": "t", "name": f"{i}", "context": f"question {i}", "choices": ["yes", "no"], "gold": 0}
    for i in range(5)
  ]
  (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
  asked = read_task(prepare(tmp_path / "t.jsonl", root), "t", 0)
  sides = {arm: ",".join(ids[arm, seed] for seed in (0, 1)) for arm in ("baseline", "variant")}
  query = {"a": sides["baseline"], "b": sides["variant"]}
  seen = client.get("/api/flips", params=query).json()
  assert (seen["suite"], seen["step"], seen["seeds"]) == ("mine", 20, 2)
  (task,) = seen["tasks"]
  assert (task["gained"], task["lost"], task["documents"]) == (3, 1, 5)
  d = np.array(list(b.values())) - np.array(list(a.values()))
  assert task["mean"] == pytest.approx(d.mean())
  first = task["items"][0]
  assert (first["document"], first["gained"], first["lost"]) == (2, 2, 0)
  assert (first["context"], first["answer"]) == (asked[2].contexts[0], "yes")
  assert [i["document"] for i in task["items"]] == [2], "item 1 flipped both ways"
  query["b"] = ids["variant", 2]
  assert "no seed is on both sides" in client.get("/api/flips", params=query).json()["missing"]
  query["a"] = ids["baseline", 2]
  assert "no suite" in client.get("/api/flips", params=query).json()["missing"]


def test_a_sweep_has_lines_parabolas_and_optima(root, tmp_path):
  """Losses on known parabolas: the optimum and curvature come back, of the control as well."""
  records = Experiments(root)
  claim = Hypothesis("It holds.", "val/loss", "none", 0.0)
  truth = {("joint", "base"): 0.25, ("joint", "w2"): 0.5, ("off", "w2"): -1.0}
  points = [
    {"group": g, "scale": s, "ratio": 2.0 if s == "w2" else 1.0, "log2_rate": float(x)}
    for g, s in truth
    for x in range(-2, 3)
  ]
  arms = [ArmRecord(f"{p['group']} {p['scale']} {p['log2_rate']:+g}", p, "") for p in points]
  experiment = records.create("lr", "proxy", [claim], arms)
  for arm in arms:
    at = truth[arm.point["group"], arm.point["scale"]]
    for seed in (0, 1):
      run = start_run(records, experiment.id, arm.name, seed).id
      loss = 3.0 + seed + 0.05 * (arm.point["log2_rate"] - at) ** 2
      records.update_run(run, status="completed", results={"val/loss": loss})
  records.close()
  client = client_of(root, tmp_path)
  seen = client.get(f"/api/sweep/{experiment.id}").json()
  assert (seen["axis"], seen["hue"], seen["panel"]) == ("log2_rate", "scale", "group")
  assert {(line["panel"], line["hue"]) for line in seen["lines"]} == set(truth)
  for line in seen["lines"]:
    fit = line["fit"]
    assert fit["curvature"] == pytest.approx(0.05)
    for seed in ("0", "1"):
      assert fit["optima"][seed] == pytest.approx(truth[line["panel"], line["hue"]])
      assert fit["levels"][seed] == pytest.approx(3.0 + int(seed))
    assert [p["x"] for p in line["points"]] == [-2, -1, 0, 1, 2]
  other = client.get(f"/api/sweep/{experiment.id}?axis=ratio&hue=group&metric=nonsense").json()
  assert (other["axis"], other["hue"], other["metric"]) == ("ratio", "group", "val/loss")


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


def test_the_report_is_served_in_a_sandbox_and_not_through_a_link(client, root):
  folder = Root(root).report("topk-1")
  folder.mkdir(parents=True)
  (folder / "index.html").write_text("<title>the report</title>")
  answer = client.get("/report/topk-1")
  policy = answer.headers["content-security-policy"]
  assert "the report" in answer.text and policy.startswith("sandbox allow-scripts;")
  assert client.get("/api/experiment/topk-1").json()["report"] is True
  (folder / "index.html").unlink()
  (root.parent / "secret.html").write_text("secret")
  (folder / "index.html").symlink_to(root.parent / "secret.html")
  assert client.get("/report/topk-1").status_code == 404


@pytest.mark.parametrize(
  "path",
  [
    "/api/run/..%2f..%2fetc%2fpasswd",
    "/api/run/../../etc/passwd",
    "/api/run/nothing",
    "/report/..%2f..",
    "/static/..%2fserver.py",
    "/static/server.py",
    "/static/%2e%2e/server.py",
    "/api/experiment/topk",
    "/api/series?tag=x",
    "/api/series?run=..&tag=x",
    "/api/experts?run=.",
    "/etc/passwd",
  ],
)
def test_no_request_leads_to_a_path(client, path):
  assert client.get(path).status_code == 404


@pytest.mark.parametrize("query", ["px=0", "px=1e9", "px=-1", "px=٣", "x=speed", "from=a"])
def test_wrong_numbers_are_refused(client, ids, query):
  path = f"/api/series?run={ids['baseline', 0]}&tag=val/bpb&{query}"
  answer = client.get(path)
  assert answer.status_code == 400 and "must be" in answer.text


def test_only_its_own_name_is_answered(client):
  for host in ("127.0.0.1:8790", "localhost:8790", "[::1]:8790", "localhost"):
    assert client.get("/api/runs", headers={"host": host}).status_code == 200, host
  for host in ("evil.example:8790", "127.0.0.1.evil.example", "", "10.0.0.1:8790"):
    answer = client.get("/api/runs", headers={"host": host})
    assert answer.status_code == 421 and "topk" not in answer.text, host
  assert client.post("/api/runs").status_code == 405


def test_where_others_can_reach_it_a_token_is_asked_for(root, ids, tmp_path):
  client = client_of(root, tmp_path, host="0.0.0.0", token=TOKEN, base="http://10.0.0.7:8790")
  for path in (*PAGES, "/api/runs", "/static/index.html", "/api/runs?token=wrong"):
    assert client.get(path).status_code == 403, path
  entered = client.get(f"/compare?a=1&token={TOKEN}&b=2")
  assert (entered.status_code, entered.headers["location"]) == (303, "/compare?a=1&b=2")
  cookie = entered.headers["set-cookie"]
  assert cookie.startswith(f"{COOKIE}={TOKEN};")
  assert "HttpOnly" in cookie and "SameSite=strict" in cookie
  assert client.get("/api/runs").status_code == 200, "the cookie lets in"
  assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 421


def test_an_address_is_announced_once_it_is_one(root, tmp_path):
  """A port that is taken and a host of another machine are refused in words, before that."""
  told = []
  with listening("127.0.0.1", 0) as other:
    port = other.getsockname()[1]
    with pytest.raises(RunError, match=f"127.0.0.1 port {port}: .*in use; choose another --port"):
      serve(Live(root, tmp_path / "cache"), "127.0.0.1", port, told.append)
  with pytest.raises(RunError, match="cannot listen on 203.0.113.7 port 8790"):
    serve(Live(root, tmp_path / "cache"), "203.0.113.7", 8790, told.append)
  assert told == []


def test_the_end_of_the_server_is_quiet_though_a_page_is_open(root, ids, tmp_path):
  """Ctrl-C while a browser holds a stream: no word, and the streams end."""
  command = [sys.executable, "-m", "stages.cli", "viz", "--root", root, "--cache", tmp_path / "c"]
  with listening("127.0.0.1", 0) as other:
    port = other.getsockname()[1]
  server = subprocess.Popen([*command, "--port", str(port)], **TEXT)
  assert server.stdout.readline() == f"http://127.0.0.1:{port}/\n"
  for _ in range(100):
    with suppress(URLError):
      stream = urlopen(f"http://127.0.0.1:{port}/api/events", timeout=20)
      break
    time.sleep(0.1)
  assert stream.readline().startswith(b"data: ")
  server.send_signal(signal.SIGINT)
  _, error = server.communicate(timeout=20)
  assert (server.returncode, error) == (0, "") and stream.read() == b"\n"


TEXT = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_every_answer_carries_its_headers(client):
  for path in ("/", "/api/runs", "/static/index.html", "/nothing"):
    headers = client.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'self';"), path
    assert headers["x-content-type-options"] == "nosniff"


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


VENDORED = {  # uPlot 1.6.32 (MIT); htm 3.1.1 with Preact inside (Apache-2.0, MIT), as published
  "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
  "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
  "preact-htm.js": "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7",
}


def test_vendored_files_are_as_published_and_have_their_licences():
  folder = resources.files("stages.viz")
  for name, digest in VENDORED.items():
    assert hashlib.sha256((folder / "static" / name).read_bytes()).hexdigest() == digest, name
  texts = {path.name: path.read_text() for path in (folder / "licenses").iterdir()}
  assert texts.keys() == {"uPlot", "htm", "preact"}
  assert "MIT License" in texts["uPlot"] and "Apache License" in texts["htm"]
  assert "Jason Miller" in texts["preact"]


def test_pages_load_nothing_from_elsewhere():
  for path in (resources.files("stages.viz") / "static").iterdir():
    if path.name not in VENDORED:
      text = path.read_text().replace("http://www.w3.org/2000/svg", "")
      assert "http:" not in text and "https:" not in text, path.name


def test_a_configuration_marks_what_is_given():
  toml = configs.to_toml(configs.load("configs/moonlet/cpu.toml", env={}))
  marked = {row["key"]: row for row in _marked(toml)}
  assert marked["moe.num_experts"]["given"] and marked["moe.num_experts"]["kind"] == "identity"
  assert not marked["train.seed"]["given"] and marked["train.micro_batch"]["value"] == "16"
