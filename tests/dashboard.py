"""An ablation whose values are known, and a client of the dashboard that shows it."""

import json
import struct
from itertools import product

import numpy as np
from roots import start_run
from starlette.testclient import TestClient

from nmoe.records.experiments import Experiments
from nmoe.records.live import Live
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Hypothesis
from stages.viz.server import Server

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
