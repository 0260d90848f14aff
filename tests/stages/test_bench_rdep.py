"""`nmoe bench rdep` over two real ranks: its numbers, its oracle, and what it refuses."""

import io
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from labs import write_files, write_variant
from rich.console import Console

from kernels import reference
from kernels.ops import Recipe
from kernels.reference import symmetric
from nmoe.bench.layer import NAMES, Bench, temporarily
from nmoe.config import file as configs
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.rdep import Rdep
from nmoe.errors import CommError, ConfigError, RunError
from nmoe.machine.target import Target
from nmoe.records.experiments import Reader
from stages.proofs import bench_rdep

TOKENS, TOP_K, DIM = 48, 2, 32
MOVES = ["peer copy", "dispatch", "return"]
RETURNS = [
  "down-projection, return",
  "down-projection with return",
  "dx, return",
  "dx with return",
]
LAYERS = ["layer, RDEP", "layer, all_to_all_single"]
ALONE = ["layer, RDEP, products with return", "communication alone", "computation alone"]


@pytest.fixture
def file(tmp_path):
  return write_variant(write_files(tmp_path), "shared", "[moe]\nnum_shared = 1\n")


def test_a_measurement(file, tmp_path):
  said, out = io.StringIO(), tmp_path / "rdep.json"
  console = Console(file=said, width=160)
  found = bench_rdep.rdep(file, 2, TOKENS, None, console, out, repeats=2)
  assert json.loads(out.read_text()) == found
  with closing(Reader(tmp_path / "root")) as records:
    (experiment,) = records.list()
    (run,) = records.runs(experiment.id)
  assert (experiment.stage, experiment.verdict) == ("bench", "measured")
  assert run.status == "completed" and run.results.items() <= experiment.conclusion.items()
  assert run.results["rows"] == found["rows"] and f"ranks = {found['ranks']}" in run.toml
  rows = found["rows"]
  names = [row["what"] for row in rows]
  assert names == MOVES + RETURNS + LAYERS + ALONE + MOVES[1:] + LAYERS
  assert {row["tokens"] for row in rows} == {TOKENS}  # fewer than the latency's 128
  moved = [row["gb_s"] * row["ms"] * 1e6 for row in rows[:3]]
  assert moved == pytest.approx([moved[0]] * 3)
  assert 0 < moved[0] < TOKENS * TOP_K * DIM * 4
  ms = {row["what"]: row["ms"] for row in reversed(rows)}
  assert found["dispatch_of_copy"] == pytest.approx(ms["peer copy"] / ms["dispatch"])
  assert found["return_of_copy"] == pytest.approx(ms["peer copy"] / ms["return"])
  assert found["speedup"] == pytest.approx(ms[LAYERS[1]] / ms[LAYERS[0]])
  assert found["over_longer_part"] == pytest.approx(
    ms["layer, RDEP"] / max(ms["communication alone"], ms["computation alone"])
  )
  assert found["fused_return"] == {
    what: pytest.approx(ms[f"{what}, return"] / ms[f"{what} with return"])
    for what in ("down-projection", "dx")
  }
  assert all(row["ms_p10"] <= row["ms"] <= row["ms_p90"] for row in rows)
  assert found["deviation"].keys() == set(NAMES)
  assert found["shape"] == {"T": TOKENS, "D": DIM, "F": 32, "E": 4, "K": TOP_K, "shared": 1}
  words = said.getvalue()
  assert found["device"] in words and found["commit"][:12] in words
  assert f"{found['speedup']:.2f} x all_to_all_single (gloo)" in words


def a_bench(group, toml: str) -> Bench:
  config = configs.loads(toml, env={})
  target = Target("cpu", "cpu", torch.device("cpu"), reference, 1.0, symmetric)
  rdep = Rdep(config, reference, group, symmetric)
  return Bench(config, target, Parallel(group.rank(), group.size(), rdep, rdep.first, group))


def gradients(group, toml: str) -> dict[str, list[np.ndarray]]:
  """A rank's inputs and weights, and what both layers compute of them."""
  bench = a_bench(group, toml)
  d = bench.inputs(TOKENS)[0]
  given = [d.x_TD, d.expert_TK, d.gate_TK, d.dy_TD, bench.w13, bench.w2, *bench.shared.args]
  found = {"given": given}
  found["RDEP"] = bench.gradients(bench.by_rdep, d)
  found["all to all"] = bench.gradients(bench.by_all_to_all, d)
  return {name: [t.numpy().copy() for t in tensors] for name, tensors in found.items()}


def resolved(file, **values) -> str:
  config = bench_rdep.layer_config(configs.load(file, env={}), file, 2, TOKENS, None)
  return configs.to_toml(
    configs.changed(config, {k.replace("__", "."): v for k, v in values.items()})
  )


def test_both_layers_compute_the_definition(file):
  """In float64, on one rank, over all tokens and experts."""
  found = ranks.run(gradients, 2, resolved(file))
  given = [[torch.from_numpy(a) for a in f["given"]] for f in found]
  x, expert, gate, dy, w13, w2 = (torch.cat(parts) for parts in list(zip(*given, strict=True))[:6])
  leaves = [t.double().requires_grad_() for t in (x, gate, w13, w2)]
  layout = reference.layout(expert, 4)
  y = reference.experts(leaves[0], leaves[1], layout, *leaves[2:], Recipe())
  rows = leaves[0].split(TOKENS)
  shared = [
    reference.mlp(part, g[6].double(), g[7].double(), Recipe())
    for part, g in zip(rows, given, strict=True)
  ]
  y = y + torch.cat(shared)
  y.backward(dy.double())
  wanted = [y.detach(), *(leaf.grad for leaf in leaves)]
  for layer in ("RDEP", "all to all"):
    for i, (name, want) in enumerate(zip(NAMES, wanted, strict=True)):
      got = np.concatenate([f[layer][i] for f in found])
      assert np.linalg.norm(got - want.numpy()) < 1e-5 * np.linalg.norm(want.numpy()), name


def disagreement(group, toml: str) -> str:
  """What the bench says when its yardstick is another layer, and when it is the same."""
  bench = a_bench(group, toml)
  d = bench.inputs(TOKENS)[0]
  assert max(bench.deviation(d).values()) <= 1e-5
  layer = bench.by_all_to_all
  bench.by_all_to_all = lambda d, x, gate, *weights: layer(d, x, gate * 1.01, *weights)
  try:
    bench.deviation(d)
  except CommError as error:
    return str(error)
  return ""


def test_another_yardstick_is_noticed(file):
  for said in ranks.run(disagreement, 2, resolved(file)):
    assert "RDEP and all_to_all_single disagree" in said
    assert "'dgate': 0.009" in said


def test_a_rank_that_fails_is_quoted(file):
  small = write_variant(file, "small", "[rdep]\ncapacity = 0.2\n")
  with pytest.raises(RunError, match=r"(?s)failed.*: a rank receives .* raise rdep.capacity"):
    bench_rdep.rdep(small, 2, TOKENS, None, Console(quiet=True))


def test_shapes(file):
  config = configs.load(file, env={})
  made = bench_rdep.layer_config(config, file, 2, 8192, "deepseek")
  assert (made.model.dim, made.moe.top_k, made.moe.num_experts) == (7168, 8, 256)
  assert (made.moe.expert_dim, made.moe.num_shared) == (2048, 1)
  assert (made.launch.ranks, made.data.seq_len, made.train.micro_batch) == (2, 8192, 1)
  default = bench_rdep.layer_config(config, file, 2, None, None)
  assert (default.data.seq_len, default.model.dim) == (8 * 64, DIM)


@pytest.mark.parametrize("shape", bench_rdep.SHAPES)
def test_every_shape_is_a_layer_of_a_configuration(shape):
  """In the file that the runbook measures them with, over all of a node's GPUs."""
  path = Path(__file__).parents[2] / "configs" / "moonlet" / "shallow-h200.toml"
  for number in (2, 4, 8):
    made = bench_rdep.layer_config(configs.load(path, env={}), path, number, 8192, shape)
    assert made.moe.num_experts % number == 0 and made.launch.ranks == number


def test_a_layer_without_shared_experts(tmp_path):
  """As Qwen3's."""
  file = write_variant(write_files(tmp_path), "alone", "[moe]\nnum_shared = 0\n")
  found = bench_rdep.rdep(file, 2, TOKENS, None, Console(quiet=True), repeats=2)
  assert found["shape"]["shared"] == 0 and max(found["deviation"].values()) < 1e-5


def test_what_cannot_be_measured(file):
  config = configs.load(file, env={})
  with pytest.raises(ConfigError, match="one rank sends nothing; measure 2 or more: --ranks 2"):
    bench_rdep.layer_config(config, file, None, None, None)
  with pytest.raises(ConfigError, match="--shape huge is unknown; choose from moonlight, deepseek"):
    bench_rdep.layer_config(config, file, 2, None, "huge")
  gpu = {"target.arch": "sm_90a", "target.dtype": "bf16"}
  far = configs.changed(config, gpu | {"rdep.peer_access": False})
  with pytest.raises(ConfigError, match="set rdep.peer_access = true"):
    bench_rdep.layer_config(far, file, 2, None, None)
  packed = configs.changed(config, {"target.dtype": "bf16", "rdep.payload": "mxfp8"})
  with pytest.raises(ConfigError, match='rdep.payload is "mxfp8"; set it to "bf16"'):
    bench_rdep.layer_config(packed, file, 2, None, None)


def test_what_is_set_for_a_variant_is_undone_even_if_it_fails():
  thing = SimpleNamespace(fused=True, blocks=8)
  with pytest.raises(CommError), temporarily(thing, fused=False, blocks=4):
    assert (thing.fused, thing.blocks) == (False, 4)
    raise CommError("late")
  assert (thing.fused, thing.blocks) == (True, 8)
