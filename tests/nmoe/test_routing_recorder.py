"""The routing recorder: its rows against a count by hand, nothing when off, the same training."""

import json

import duckdb
import numpy as np
import pytest
import torch
from labs import open_lab

from nmoe.data.loader import Loader
from nmoe.data.mixture import load_mixture
from nmoe.data.prepare import prepare
from nmoe.data.prepared import open_data
from nmoe.data.tokenizer import get
from nmoe.distributed.parallel import Parallel
from nmoe.records.root import Root
from nmoe.train.loop import build
from nmoe.train.routing import RoutingRecorder

SOURCE = """
[[source]]
name = "digits"
kind = "files"
paths = ["digits.jsonl"]
format = "jsonl"
weight = {weight}
"""


@pytest.fixture
def lab(tmp_path):
  """A lab whose mixture has two sources, three samples of text to one of digits."""
  with open_lab(tmp_path) as lab:
    lines = (json.dumps({"text": f"{i} " + "0123456789 " * 40}) for i in range(50))
    (tmp_path / "digits.jsonl").write_text("\n".join(lines))
    mixture = (tmp_path / "mixture.toml").read_text() + "weight = 0.75\n"
    (tmp_path / "two.toml").write_text(mixture + SOURCE.format(weight=0.25))
    lab.data = prepare(load_mixture(tmp_path / "two.toml"), get("byte"), lab.root)
    yield lab


def rows(lab, run, sql="SELECT step, layer, name, value FROM experts ORDER BY step, name, layer"):
  with duckdb.connect(str(Root(lab.root).metrics(run, 0)), read_only=True) as db:
    return db.execute(sql).fetchall()


def test_counts_by_source_and_gates_are_those_of_a_count_by_hand(lab):
  """Two micro-batches of 8 sequences, against routing asked of every router once more."""
  data = open_data(lab.data)
  loader = Loader(data, seq_len=64, seed=0)
  state = build(lab.config, lab.session("x").target, Parallel())
  recorder = RoutingRecorder(state.model, loader, 4, local=16)
  tokens = [torch.from_numpy(x) for x in loader.batch(7, 16)]
  seen = []
  (router,) = state.model.routers
  recorder.start(8, 16 * (8 - 1))
  handle = router.register_forward_hook(lambda _, args, routing: seen.append(routing))
  for x, y in zip(tokens[0].chunk(2), tokens[1].chunk(2), strict=True):
    state.model(x, y)
  handle.remove()
  found = recorder.stop()
  source_B, _, _ = loader.locate(np.arange(7 * 16, 8 * 16, dtype=np.uint64))
  count, gate = np.zeros((2, 4)), np.zeros(4)
  for micro, routing in enumerate(seen):
    pairs = zip(routing.expert_TK.tolist(), routing.gate_TK.tolist(), strict=True)
    for t, (experts, gates) in enumerate(pairs):
      for e, g in zip(experts, gates, strict=True):
        count[source_B[8 * micro + t // 64], e] += 1
        gate[e] += g
  assert count.sum(1).tolist() == [2 * 64 * 12, 2 * 64 * 4], "samples as the mixture weighs them"
  names = [f"source {name}" for name in recorder.sources]
  np.testing.assert_array_equal(np.stack([found[name][0] for name in names]), count)
  np.testing.assert_allclose(found["gate"][0], gate / gate.mean(), rtol=1e-5)
  assert not router._forward_hooks and recorder.stop() == {}
  recorder.start(9, 16 * (9 - 1))
  assert not router._forward_hooks, "step 9 is not sampled"


def test_a_run_samples_its_routing_and_trains_the_same_bits(lab):
  plain = lab.record()
  lab.attempt(plain)
  sampled = lab.record(train__routing_every=5)
  lab.attempt(sampled)
  assert lab.logged(plain)["train/loss"] == lab.logged(sampled)["train/loss"]
  names = {(step, name) for step, _, name, _ in rows(lab, sampled) if name != "bias"}
  kinds = ("gate", "source text", "source digits")
  assert names == {(step, name) for step in (5, 10) for name in kinds}
  loads = dict(rows(lab, sampled, "SELECT step, count FROM loads"))
  for step in (5, 10):
    by = [v for s, _, name, v in rows(lab, sampled) if s == step and name.startswith("source")]
    assert np.sum(by, axis=0).tolist() == loads[step], "the sources' tokens are the loads"
  assert {name for _, _, name, _ in rows(lab, plain)} == {"bias"}


def test_the_bias_of_every_expert_is_logged(lab):
  run = lab.record()
  lab.attempt(run)
  logged = [(step, value) for step, _, _, value in rows(lab, run)]
  assert [step for step, _ in logged] == list(range(1, 13))
  final = lab.state(run)["layers.1.moe.router.bias"]
  np.testing.assert_array_equal(np.float32(logged[-1][1]), final.numpy())
  ranges = [max(value) - min(value) for _, value in logged]
  np.testing.assert_allclose([v for _, v in lab.logged(run)["moe/0/bias_range"]], ranges, rtol=1e-6)
