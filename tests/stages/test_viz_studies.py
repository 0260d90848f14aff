"""The dashboard's server: comparisons, experiments, sweeps and production runs."""

import json
import math

import numpy as np
import pytest
from dashboard import client_of, make
from roots import start_run

from nmoe.evals.measure import Items, write_items
from nmoe.evals.requests import read_task
from nmoe.evals.sources import prepare
from nmoe.records import goodput
from nmoe.records.attempts import Attempts
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics
from nmoe.records.reader import ArmRecord, Hypothesis
from nmoe.records.root import Root
from stages.judge.intervals import student_t


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
