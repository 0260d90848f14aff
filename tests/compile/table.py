"""The table of all kernels: `PYTHONPATH=. python tests/compile/table.py` writes kernels.csv."""

from __future__ import annotations

import csv
import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from kernels.arch import ARCHS
from kernels.shapes import Shapes
from kernels.tools.build import build

TABLE = Path(__file__).parent / "kernels.csv"
COLUMNS = "arch job kernel registers shared stores loads mma".split()

MOONLET = Shapes(
  batch=8,
  seq_len=4096,
  dim=2048,
  vocab_size=201088,
  num_heads=16,
  qk_nope_dim=128,
  qk_rope_dim=64,
  v_dim=128,
  kv_lora_rank=512,
  q_lora_rank=0,
  dense_dim=11264,
  num_experts=64,
  ranks=1,
  expert_dim=1408,
  num_shared=2,
  top_k=6,
  num_groups=1,
  topk_groups=1,
  score="sigmoid",
  normalize=True,
  route_scale=2.446,
  loss_chunk=4096,
  dtype="bf16",
  emulate_blockscale=False,
  moments="fp32",
  muon=True,
  payload="bf16",
)
GROUPED = replace(
  MOONLET, num_experts=256, top_k=8, num_groups=8, topk_groups=4, ranks=8, moments="bf16"
)


def shapes(arch: str) -> list[Shapes]:
  """One GPU, eight ranks with expert groups, both block-scaled formats, packed rows of eight."""
  scaled = replace(
    MOONLET,
    dense_dim=MOONLET.num_shared * MOONLET.expert_dim,
    emulate_blockscale=arch != "sm_100a",
  )
  formats = [replace(scaled, dtype=dtype) for dtype in ("fp8", "nvfp4")]
  packed = [replace(GROUPED, payload=payload) for payload in ("mxfp8", "nvfp4")]
  return [MOONLET, GROUPED, *formats, *packed]


def rows(arch: str, cache: Path) -> list[dict[str, str]]:
  """Compile everything for an architecture: one row per kernel, in the order of compilation."""
  records = build(shapes(arch), arch, cache, os.environ, inspect=True)
  seen, table = Counter(), []
  for record in records:
    key = record["job"], record["kernel"]
    seen[key] += 1
    number = f" #{seen[key]}" if seen[key] > 1 else ""
    mma = " ".join(sorted({name.split(".")[0] for name in record["mma"]}))
    fixed = {"arch": arch, "kernel": record["kernel"] + number, "mma": mma}
    table.append({name: str(fixed.get(name, record.get(name))) for name in COLUMNS})
  return table


def compiled(cache: Path) -> list[dict[str, str]]:
  """All rows as compiled now into an empty cache; the architectures compile side by side."""
  with ThreadPoolExecutor() as pool:
    return [row for part in pool.map(partial(rows, cache=cache), ARCHS) for row in part]


def read() -> list[dict[str, str]]:
  """The committed table."""
  with TABLE.open(newline="") as file:
    return list(csv.DictReader(file))


def write() -> None:
  """Replace the committed table by what is compiled now."""
  with tempfile.TemporaryDirectory() as cache:
    now = compiled(Path(cache))
  with TABLE.open("w", newline="") as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(now)


if __name__ == "__main__":
  write()
