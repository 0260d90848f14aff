"""A small moonlet on the GPU: its gradients against float64, and its training steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import kernels.cuda
import kernels.reference
from gpu.oracle import relative
from nmoe.config import file as configs
from nmoe.config.plan import plan
from nmoe.config.sections import Config
from nmoe.model.decoder import Model
from nmoe.records.metrics import read
from stages.launch.display import Display
from stages.runs import Work
from stages.workbench import Arm, Workbench, hypothesis_of

pytestmark = pytest.mark.gpu
SMALL = Path(__file__).parents[2] / "configs" / "moonlet" / "small.toml"
PLANNED = 0.05  # how far a run's peak memory may be from what nmoe.config.plan says
WIDE = 65536  # more than a micro-batch has tokens: the embedding's gradient touches rows alone
GPUS = torch.cuda.device_count()
ROUNDING = 2.0**-9  # of one value to bf16, at most
PASSES = ("full_passes", "waiting_passes")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def small(steps: int, **values: object) -> Config:
  """small.toml over bytes, without evaluation."""
  config = configs.load(SMALL)
  return configs.changed(
    config,
    {
      "data.tokenizer": "byte",
      "model.vocab_size": 384,
      "schedule.total_tokens": steps * config.schedule.batch_tokens,
      "schedule.warmup_tokens": 0,
      "schedule.decay_tokens": 0,
      "train.eval_every": 0,
      **values,
    },
  )


def gradients(model: Model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
  out = model(tokens, tokens.roll(-1, 1))
  (out.loss_sum / tokens.numel() + out.balance_loss).backward()
  return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("forced_balance", [True, False])
def test_gradients_err_at_most_twice_as_much_as_the_reference_in_bf16(forced_balance: bool) -> None:
  config = small(1, **{"moe.forced_balance": forced_balance})
  tokens = torch.randint(0, 384, (2, 1024), generator=torch.Generator().manual_seed(0)).cuda()
  found = {}
  for name, ops, dtype in (
    ("cuda", kernels.cuda, torch.bfloat16),
    ("reference", kernels.reference, torch.bfloat16),
    ("exact", kernels.reference, torch.float64),
  ):
    with torch.device("cuda"):
      model = Model(config, ops)
    model.init_weights(0)
    found[name] = gradients(model.double() if dtype == torch.float64 else model, tokens)
  worse = {}
  for name, exact in found["exact"].items():
    ours, plain = relative(found["cuda"][name], exact), relative(found["reference"][name], exact)
    if ours > 2 * max(plain, ROUNDING):
      worse[name] = (ours, plain)
  assert not worse


def at_work(bench: Workbench, arms: list[Arm]) -> Work:
  config = arms[0].config
  planned = [bench.plan(arm) for arm in arms]
  claims = [hypothesis_of(config)]
  return Work(bench, bench.experiments.create(config.experiment.name, "research", claims, planned))


@pytest.mark.parametrize("vocab", [384, WIDE])
@pytest.mark.parametrize("graph", [False, True])
def test_the_host_waits_for_nothing_between_logs(graph: bool, vocab: int, tmp_path: Path) -> None:
  values = {"run.root": str(tmp_path), "train.log_every": 20, "train.cuda_graph": graph}
  values |= {"model.vocab_size": vocab, "train.micro_batch": 16}
  config = small(20, **values)
  with Workbench.open(str(tmp_path), Console()) as bench, Display(bench.console) as display:
    arm = bench.arm("small", config)
    run = at_work(bench, [arm]).repeat(arm, 0, display, tmp_path / "trace")
  assert run.status == "completed"
  events = json.loads((tmp_path / "trace" / "trace.json").read_text())["traceEvents"]
  steps = [e for e in events if e.get("cat") == "user_annotation" and "ProfilerStep" in e["name"]]
  assert len(steps) == 3
  thread, begin = steps[0]["tid"], min(e["ts"] for e in steps)
  end = max(e["ts"] + e["dur"] for e in steps)
  calls = [
    e["name"]
    for e in events
    if e.get("cat") == "cuda_runtime" and e["tid"] == thread and begin <= e["ts"] < end
  ]
  assert any("Launch" in name for name in calls)
  assert not [name for name in calls if name in WAITS]


ALONE = [(16, 384, 1, 1.5), (32, 384, 1, 1.5), (16, WIDE, 1, 1.5)]
TWO = [(8, 384, 2, 1.5), (16, WIDE, 2, 2.0), (16, WIDE, 2, 1.5)] if GPUS > 1 else []


@pytest.mark.parametrize(("micro_batch", "vocab", "ranks", "capacity"), ALONE + TWO)
def test_runs_are_equal_bit_for_bit_with_a_graph_and_without(
  micro_batch: int, vocab: int, ranks: int, capacity: float, tmp_path: Path
) -> None:
  """And each uses, evaluations included, the memory that was planned for it. Two ranks never run
  full at capacity 2; at 1.5 one does, of the wide model in the third step, which ends the graph:
  that run may use less, if it ends before an evaluation is beside it.
  """
  values = {"run.root": str(tmp_path), "train.log_every": 1, "train.micro_batch": micro_batch}
  values |= {"launch.ranks": ranks, "rdep.capacity": capacity}
  values |= {"train.eval_every": 6, "train.cuda_graph": False, "model.vocab_size": vocab}
  config = small(12, **values)
  with Workbench.open(str(tmp_path), Console()) as bench, Display(bench.console) as display:
    arms = [bench.arm("eager", config), bench.arm("eager", config)]
    arms.append(bench.arm("graph", configs.changed(config, {"train.cuda_graph": True})))
    work = at_work(bench, arms)
    runs = [work.repeat(arm, 0, display) for arm in arms]
  first, *others = found = [read(tmp_path, run.id) for run in runs]
  assert "time/graph_s" in others[-1]
  for tag in ("train/loss", "grad_norm/all", "val/loss"):
    assert len(first[tag][2]) == (2 if tag == "val/loss" else 12)
    for other in others:
      assert np.array_equal(first[tag][2], other[tag][2])
  planned = np.array([plan(arm.config).peak_bytes for arm in arms])
  used = np.array([series["memory/peak_bytes"][2].max() for series in found])
  retries = [series["memory/retries"][2].max() for series in found]
  assert (used / planned <= 1 + PLANNED).all() and not any(retries), (used / planned, retries)
  full = ranks > 1 and capacity < 2
  if ranks > 1:
    passes, *same = ([s[f"rdep/{name}"][2].tolist() for name in PASSES] for s in found)
    assert all(x == passes for x in same) and any(passes[0]) == full, passes
    if full and vocab == WIDE:
      assert [x > 0 for x in passes[0]] == [step >= 3 for step in range(1, 13)], passes
  seen = (used / planned)[:2] if full else used / planned  # of the last, the graph has ended
  assert (seen >= 1 - PLANNED).all(), used / planned
