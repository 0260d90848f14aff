"""How fast the loader alone is: `python -m nmoe.bench.loader DATA SEQ_LEN SEED` prints tokens/s."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from nmoe.data.loader import Loader
from nmoe.data.prepared import open_data


def loader_rate(data: Path, seq_len: int, seed: int, seconds: float = 1.0) -> float:
  """Tokens per second of the loader over the prepared data in a folder, from a warm page cache."""
  loader = Loader(open_data(data), seq_len=seq_len, seed=seed)
  size = max(1, (1 << 20) // seq_len)
  loader.batch(0, size)
  begun, batches = time.perf_counter(), 0
  while time.perf_counter() - begun < seconds:
    loader.batch(batches, size)
    batches += 1
  return batches * size * seq_len / (time.perf_counter() - begun)


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m nmoe.bench.loader")
  parser.add_argument("data", type=Path)
  parser.add_argument("seq_len", type=int)
  parser.add_argument("seed", type=int)
  sys.stdout.write(f"{loader_rate(**vars(parser.parse_args()))}\n")


if __name__ == "__main__":
  main()
