"""One rank of `nmoe bench rdep`: RDEP against a peer copy, all_to_all_single, and its own parts.

`python -m nmoe.bench.rdep --root ROOT --run RUN_ID --rank R --rendezvous URL` measures the MoE
layer that the recorded run's configuration describes, with routing given, and rank 0 writes the
figures into the record. Here stand the questions; what is timed is in nmoe.bench.layer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from kernels.tools.timing import Variant, spread
from nmoe.bench.layer import Bench, Inputs
from nmoe.bench.recorded import recorded
from nmoe.config.sections import Config
from nmoe.distributed import parallel
from nmoe.distributed.meeting import Meeting
from nmoe.machine.target import select
from nmoe.train.startup import parser

LATENCY_TOKENS = 128
SMS = (4, 8, 16, 32, 64, 128)
GRAPH = "layer, RDEP, as a CUDA graph"
RETURNED = ("down-projection", "dx")  # the products whose rows go back


@dataclass(frozen=True)
class Row:
  """One measured quantity: milliseconds by median and percentiles over repeats."""

  what: str
  tokens: int
  ms: float
  ms_p10: float
  ms_p90: float
  gb_s: float | None = None  # of the bytes that leave the rank
  sms: int | None = None


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
  """Every comparison; the result of `nmoe bench rdep` without what its parent adds."""
  tokens = bench.config.data.seq_len
  full, few = bench.inputs(tokens), bench.inputs(min(tokens, LATENCY_TOKENS))
  with bench.ranks.explained():
    deviation = bench.deviation(full[0])
    rows = [*_movers(bench, full, repeats)]
    rows += _returns(bench, full, repeats)
    rows += _layers(bench, full, repeats, parts=True)
    rows += _trips(bench, few, bench.rdep.exchange.blocks, repeats)
    rows += _layers(bench, few, repeats, parts=False)
  ms = {row.what: row.ms for row in reversed(rows) if row.tokens == tokens}
  rate = {row.what: row.gb_s for row in reversed(rows) if row.tokens == tokens and row.gb_s}
  alone = max(ms["communication alone"], ms["computation alone"])
  e = bench.config.moe
  shape = {"T": tokens, "D": bench.config.model.dim, "F": e.expert_dim, "E": e.num_experts}
  return {
    "device": bench.target.name,
    "torch": torch.__version__,
    "ranks": bench.ranks.ranks,
    "devices": max(1, torch.cuda.device_count()) if bench.device.type == "cuda" else 1,
    "backend": dist.get_backend(),
    "dtype": str(bench.dtype).removeprefix("torch."),
    "shape": shape | {"K": e.top_k, "shared": e.num_shared},
    "deviation": deviation,
    "dispatch_of_copy": rate["dispatch"] / rate["peer copy"],
    "return_of_copy": rate["return"] / rate["peer copy"],
    "fused_return": {what: ms[f"{what}, return"] / ms[f"{what} with return"] for what in RETURNED},
    "speedup": ms["layer, all_to_all_single"] / ms["layer, RDEP"],
    "over_longer_part": ms["layer, RDEP"] / alone,
    "as_graph": ms[GRAPH] / ms["layer, RDEP"] if GRAPH in ms else None,
    "rows": [asdict(row) for row in rows],
  }


def _movers(bench: Bench, sets: list[Inputs], repeats: int) -> Iterator[Row]:
  """Dispatch and return beside a plain copy, first with the SMs that training uses."""
  blocks = bench.rdep.exchange.blocks
  choices = [blocks, *(n for n in SMS if n != blocks)] if blocks else [None]
  variants: dict[Any, Variant] = {n: partial(bench.trip, sets, n, None) for n in choices}
  ms = bench.interleaved({"peer copy": partial(bench.copy, sets), **variants}, repeats)
  size = _bytes_out(bench, sets)
  yield _row("peer copy", sets, ms["peer copy", "copy"], size)
  for n in choices:
    for phase in ("dispatch", "return"):
      yield _row(phase, sets, ms[n, phase], size, n)


def _returns(bench: Bench, sets: list[Inputs], repeats: int) -> Iterator[Row]:
  """The products whose rows travel back: apart from their return, and with it in one kernel."""
  variants: dict[Any, Variant] = {}
  for what, weight in zip(RETURNED, (bench.w2, bench.w13.mT), strict=True):
    blocks, products = bench.rdep.exchange.blocks, bench.products(sets, weight)
    variant = partial(bench.trip, sets, blocks, products)
    for name, fused in ((f"{what}, return", False), (f"{what} with return", True)):
      variants[name] = partial(bench.returned, fused, variant)
  ms = bench.interleaved(variants, repeats)
  for name in variants:
    yield _row(str(name), sets, ms[name, "return"])


def _trips(bench: Bench, sets: list[Inputs], sms: int | None, repeats: int) -> Iterator[Row]:
  ms = bench.interleaved({"trip": partial(bench.trip, sets, sms, None)}, repeats)
  for phase in ("dispatch", "return"):
    yield _row(phase, sets, ms["trip", phase], _bytes_out(bench, sets), sms)


def _layers(bench: Bench, sets: list[Inputs], repeats: int, *, parts: bool) -> Iterator[Row]:
  """Forward and backward of the layer, and of its parts by themselves."""
  variants: dict[Any, Variant] = {
    "layer, RDEP": partial(bench.layer, bench.by_rdep, sets),
    "layer, all_to_all_single": partial(bench.layer, bench.by_all_to_all, sets),
  }
  if bench.device.type == "cuda":
    variants[GRAPH] = bench.graphs(sets)
  if parts:
    variants["layer, RDEP, products with return"] = partial(
      bench.returned, True, variants["layer, RDEP"]
    )
    variants["communication alone"] = partial(bench.communication, sets)
    variants["computation alone"] = partial(bench.computation, sets)
  for (name, _), ms in bench.interleaved(variants, repeats).items():
    yield _row(str(name), sets, ms)


def _row(
  what: str,
  sets: list[Inputs],
  ms: Sequence[float],
  size: float | None = None,
  sms: int | None = None,
) -> Row:
  middle, low, high = spread(ms)
  rate = None if size is None else size / middle / 1e6
  return Row(what, sets[0].x_TD.shape[0], middle, low, high, rate, sms)


def _bytes_out(bench: Bench, sets: list[Inputs]) -> float:
  """Bytes of rows that leave a rank in one dispatch, or come back: the busiest rank's mean."""
  rows = sum(sum(d.sent_R) - d.sent_R[bench.rdep.rank] for d in sets) / len(sets)
  return bench.most([rows * sets[0].x_TD.shape[1] * sets[0].x_TD.itemsize])[0]


def execute(options: argparse.Namespace, config: Config, meeting: Meeting) -> dict[str, Any]:
  target = select(config, options.rank)
  ranks = parallel.init(config, target, meeting)
  measured = measure(Bench(config, target, ranks), options.repeats)
  ranks.close()
  return measured


if __name__ == "__main__":
  arguments = parser("nmoe.bench.rdep")
  arguments.add_argument("--repeats", type=int, required=True)
  sys.exit(recorded(arguments.parse_args(), execute))
