"""Speed of the cuda kernels: python -m kernels.tools.bench [--rest MS] [--repeats N] [NAME ...].

The process needs the environment of kernels.arch.environment. Every number is a median of
interleaved runs (kernels.tools.timing), beside the ceiling of its unit measured in the same runs
(kernels.tools.rates). One JSON line per row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

from kernels.tools import timing
from kernels.tools.benches import dense, moe, state
from kernels.tools.rates import How, Row

BENCHES = moe.BENCHES | dense.BENCHES | state.BENCHES


def report(found: Iterator[Row]) -> None:
  """One JSON line per row on standard output."""
  for row in found:
    sys.stdout.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def arguments(about: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=about.partition(":")[0])
  parser.add_argument("--rest", type=float, default=0.0, metavar="MS", help="idle before each run")
  parser.add_argument("--repeats", type=int, default=timing.REPEATS, help="runs of each variant")
  return parser


def how(options: argparse.Namespace) -> How:
  return How(options.rest / 1e3, options.repeats)


def main() -> None:
  """Run the named benches, or all."""
  parser = arguments(__doc__)
  parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}")
  options = parser.parse_args()
  if unknown := sorted(set(options.names) - BENCHES.keys()):
    parser.error(f"no bench is named {', '.join(unknown)}; choose from {', '.join(BENCHES)}")
  where = {
    "device": torch.cuda.get_device_properties(0).name,
    "torch": torch.__version__,
    "cudnn": torch.backends.cudnn.version(),
    "rest_ms": options.rest,
    "repeats": options.repeats,
  }
  sys.stdout.write(json.dumps(where) + "\n")
  for name in options.names or BENCHES:
    report(BENCHES[name](how(options)))
    torch.cuda.empty_cache()


if __name__ == "__main__":
  main()
