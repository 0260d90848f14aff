"""One rank of tests/gpu/test_rdep.py: checks RDEP and writes one JSON line.

`rdep_ranks.py WHAT RANKS RENDEZVOUS RANK`, WHAT one of stores, puts, missing and "missing in a
graph". Ranks share a GPU if there are fewer.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kernels.cuda as ops
import kernels.reference as reference
from gpu.oracle import FOUR, relative, roundings
from kernels.arch import ARCHS
from kernels.cuda import puts, symmetric
from kernels.ops import Recipe
from nmoe.config.file import loads
from nmoe.config.sections import Config
from nmoe.distributed.rdep import Rdep
from nmoe.errors import CommError

E, K, D, F = 16, 4, 512, 256
TOKENS = 768  # the most that a rank may hold
BF16 = Recipe()
DEADLINE_S = 60.0
BESIDE = 1 << 29  # bytes that NVSHMEM may take of a rank's GPU beside the heap

CASES = {  # routing, tokens of rank r as a share of TOKENS by r % 4, capacity
  "uniform": ("uniform", (1.0, 1.0, 1.0, 1.0), 1.5),
  "uneven": ("uniform", (0.5, 1.0, 0.0, 0.3), 1.5),
  "skewed in rounds": ("skewed", (1.0, 0.6, 1.0, 0.2), 0.3),
  "one expert in rounds": ("one", (0.1, 0.2, 0.3, 0.1), 0.1),
}

BASE = """
[target]
dtype = "bf16"
[model]
vocab_size = 32
num_layers = 3
dense_dim = 16
num_heads = 1
[data]
mixture = "none"
[optim]
dense_lr = 1e-3
router_lr = 1e-3
expert_lr = 1e-3
[train]
micro_batch = 1
[experiment]
name = "rdep"
statement = "test"
"""


def settings(num_ranks: int, capacity: float, deadline_s: float, what: str) -> Config:
  found = torch.cuda.get_device_capability()
  arch = next(a.name for a in ARCHS.values() if a.capability == found)
  sizes = f"""
[moe]
num_experts = {E}
top_k = {K}
expert_dim = {F}
[schedule]
total_tokens = {TOKENS * num_ranks}
batch_tokens = {TOKENS * num_ranks}
[launch]
ranks = {num_ranks}
[rdep]
capacity = {capacity}
deadline_s = {deadline_s}
peer_access = {str(what != "puts").lower()}
"""
  base = BASE.replace("[target]", f'[target]\narch = "{arch}"')
  base = base.replace("[model]", f"[model]\ndim = {D}").replace(
    "[data]", f"[data]\nseq_len = {TOKENS}"
  )
  return loads(base + sizes, env={})


def data(routing: str, num_tokens: int, seed: int) -> list[Tensor]:
  """x, expert, gate, dy of all ranks and all experts' weights, the same on every rank."""
  generator = torch.Generator().manual_seed(seed)
  normal = partial(torch.randn, generator=generator)
  weight = torch.ones(E)
  if routing == "skewed":
    weight[3] = 5 * (E - 1) / (E - 5)  # expert 3 gets five times the mean
  if routing == "one":
    expert_TK = torch.full((num_tokens, K), 5)
  else:
    expert_TK = torch.multinomial(weight.expand(num_tokens, -1), K, generator=generator)
  gate_TK = torch.rand(num_tokens, K, generator=generator)
  x, dy = normal(num_tokens, D).bfloat16(), normal(num_tokens, D).bfloat16()
  w13 = (normal(E, 2 * F, D) / math.sqrt(D)).bfloat16()
  w2 = (normal(E, D, F) / math.sqrt(F)).bfloat16()
  return [t.cuda() for t in (x, expert_TK.int(), gate_TK, dy, w13, w2)]


def shared(x_TD: Tensor) -> Tensor:
  return x_TD * 0.5


def on_ranks(rdep: Rdep, everything: list[Tensor], counts: list[int], layer: int) -> list[Tensor]:
  """y, dx, dgate, dw13, dw2 of this rank."""
  x, expert, gate, dy, w13, w2 = everything
  rows = slice(sum(counts[: rdep.rank]), sum(counts[: rdep.rank + 1]))
  held = slice(rdep.first, rdep.first + rdep.num_local)
  leaves = [t.clone().requires_grad_() for t in (x[rows], gate[rows], w13[held], w2[held])]
  y = rdep.experts(
    leaves[0], expert[rows].contiguous(), *leaves[1:], BF16, layer=layer, shared=shared
  )
  y.backward(dy[rows])
  return [y.detach(), *(t.grad for t in leaves)]


def alone(module, everything: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
  """The same on one rank: y, dx, dgate, dw13, dw2 of all tokens and experts."""
  x, expert, gate, dy, w13, w2 = everything
  gate = gate.to(torch.promote_types(dtype, torch.float32))
  leaves = [t.to(dtype).requires_grad_() for t in (x, w13, w2)]
  gate = gate.clone().requires_grad_()
  order = module.layout(expert, E)
  y = module.experts(leaves[0], gate, order, *leaves[1:], BF16) + shared(leaves[0])
  y.backward(dy.to(dtype))
  return [y.detach(), leaves[0].grad, gate.grad, leaves[1].grad, leaves[2].grad]


def mine(whole: list[Tensor], rdep: Rdep, counts: list[int]) -> list[Tensor]:
  rows = slice(sum(counts[: rdep.rank]), sum(counts[: rdep.rank + 1]))
  held = slice(rdep.first, rdep.first + rdep.num_local)
  return [t[rows] for t in whole[:3]] + [t[held] for t in whole[3:]]


def check_case(rdep: Rdep, name: str) -> dict[str, float]:
  """Six iterations over two layers and three data sets; the second three repeat the first."""
  routing, shares, _ = CASES[name]
  counts = [int(TOKENS * shares[r % 4]) for r in range(rdep.num_ranks)]
  found, worst = [], {}
  for i in range(6):
    everything = data(routing, sum(counts), i % 3)
    found.append(on_ranks(rdep, everything, counts, layer=i % 2))
    if i >= 3:
      for a, b in zip(found[i], found[i - 3], strict=True):
        assert torch.equal(a, b), f"{name}: iteration {i} differs from {i - 3}"
      continue
    exact = mine(alone(reference, everything, torch.float64), rdep, counts)
    single = mine(alone(ops, everything, torch.bfloat16), rdep, counts)
    labels = ("y", "dx", "dgate", "dw13", "dw2")
    for label, a, one, want in zip(labels, found[i], single, exact, strict=True):
      error = roundings(a, want) if a.numel() else 0.0
      assert error < FOUR, f"{name}, {label}: {error:.2f} roundings from float64"
      worst[label] = max(worst.get(label, 0.0), error)
      deviation = relative(a, one.double()) if a.numel() else 0.0
      worst[f"{label} to one rank"] = max(worst.get(f"{label} to one rank", 0.0), deviation)
  return worst | {"rounds": max(rdep.rounds.values())}


def check_replays(rdep: Rdep) -> None:
  """A layer in a CUDA graph, replayed for other tokens, behind a pass that is not in it, gives the
  bits of the same calls queued one by one.
  """
  counts = [TOKENS] * rdep.num_ranks
  static = data("uniform", sum(counts), 0)
  on_ranks(rdep, static, counts, layer=0)
  torch.cuda.synchronize()
  dist.barrier()
  graph, rdep.one_round = torch.cuda.CUDAGraph(), True
  with torch.cuda.graph(graph, capture_error_mode="thread_local"), rdep.captured():
    results = on_ranks(rdep, static, counts, layer=0)
  rdep.one_round = False
  for seed in (1, 2, 1):
    given = data("uniform", sum(counts), seed)
    wanted = [t.clone() for t in on_ranks(rdep, given, counts, layer=0)]
    with torch.no_grad():  # an odd number of trips between
      rdep.experts(given[0][:8], given[1][:8], given[2][:8], *held_by(rdep, given), BF16, layer=1)
    for into, of in zip(static, given, strict=True):
      into.copy_(of)
    with rdep.replayed():
      graph.replay()
    assert not rdep.exchange.overflowed()
    for label, a, b in zip(("y", "dx", "dgate", "dw13", "dw2"), results, wanted, strict=True):
      assert torch.equal(a, b), f"{label} of a replay, seed {seed}"


def held_by(rdep: Rdep, everything: list[Tensor]) -> list[Tensor]:
  held = slice(rdep.first, rdep.first + rdep.num_local)
  return [w[held] for w in everything[4:]]


def kernels_of_a_layer(rdep: Rdep) -> dict[str, float]:
  """Device microseconds by kernel of one forward and backward; NCCL must not be among them."""
  counts = [TOKENS] * rdep.num_ranks
  everything = data("uniform", sum(counts), 0)
  dist.barrier()
  with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
    on_ranks(rdep, everything, counts, layer=0)
    torch.cuda.synchronize()
  found = {e.key: e.device_time_total for e in trace.key_averages() if e.device_time_total > 0}
  assert not [name for name in found if "nccl" in name.lower()]
  ours = [name for name in found if "exchange" in name or "puts" in name]
  assert ours, f"no kernel of the exchange among {list(found)}"
  return dict(sorted(found.items(), key=lambda item: -item[1])[:20])


def taken() -> int:
  """Bytes that all processes have of this rank's GPU, while no rank does anything."""
  torch.cuda.synchronize()
  dist.barrier()
  free, total = torch.cuda.mem_get_info()
  dist.barrier()
  return total - free


def missing_rank(rdep: Rdep, deadline_s: float, replayed: bool) -> str:
  """The last rank stays away: the others must stop within the deadline and say why.

  replayed: they wait in a CUDA graph, which they have captured together.
  """
  counts = [TOKENS] * rdep.num_ranks
  everything = data("uniform", sum(counts), 0)
  on_ranks(rdep, everything, counts, layer=0)
  torch.cuda.synchronize()
  if replayed:
    dist.barrier()
    graph, rdep.one_round = torch.cuda.CUDAGraph(), True
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), rdep.captured():
      on_ranks(rdep, everything, counts, layer=7)
  if rdep.rank == rdep.num_ranks - 1:
    time.sleep(4 * deadline_s)
    return "stayed away"
  begun = time.monotonic()
  try:
    with rdep.explained():
      if replayed:
        with rdep.replayed():
          graph.replay()
      else:
        on_ranks(rdep, everything, counts, layer=7)
      torch.cuda.synchronize()
  except CommError as error:
    waited = time.monotonic() - begun
    assert waited < deadline_s + 5, f"took {waited:.1f} s"
    assert f"layer 7, forward, round 0: counts of rank {rdep.num_ranks - 1}" in str(error), error
    return str(error)
  raise AssertionError("a missing rank went unnoticed")


def main() -> None:
  what, num_ranks, rendezvous, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
  torch.cuda.set_device(rank % torch.cuda.device_count())
  timeout, where = timedelta(seconds=180), f"file://{rendezvous}"
  dist.init_process_group(
    "gloo", init_method=where, rank=rank, world_size=num_ranks, timeout=timeout
  )
  group = dist.group.WORLD
  memory = puts if what == "puts" else symmetric
  report: dict = {"rank": rank, "ranks": num_ranks}
  begun = time.monotonic()
  if what in ("missing", "missing in a graph"):
    deadline_s = 5.0
    rdep = Rdep(settings(num_ranks, 1.5, deadline_s, what), ops, group, symmetric)
    report["post-mortem"] = missing_rank(rdep, deadline_s, what != "missing")
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the context is lost: nothing can be given back
  torch.zeros(1, device="cuda")  # CUDA's own memory
  for name, (_, _, capacity) in CASES.items():
    before = taken()
    rdep = Rdep(settings(num_ranks, capacity, DEADLINE_S, what), ops, group, memory)
    if "beside" not in report:  # the first joins the ranks
      devices = torch.cuda.device_count()
      sharing = sum(r % devices == rank % devices for r in range(num_ranks))
      report["beside"] = (taken() - before) / sharing - rdep.heap.nbytes
      assert report["beside"] < BESIDE, f"{report['beside'] / 2**20:.0f} MiB beside the heap"
    report[name] = check_case(rdep, name)
    sys.stderr.write(f"rank {rank}: {name} holds, {time.monotonic() - begun:.0f} s\n")
    if name == "uniform":
      report["kernels"] = kernels_of_a_layer(rdep)
      check_replays(rdep)
    torch.cuda.synchronize()
    dist.barrier()
    rdep.close()
  sys.stdout.write(json.dumps(report) + "\n")
  dist.destroy_process_group()


if __name__ == "__main__":
  main()
