"""Where a GPU's time goes: the profile of a few steps, divided into parts that add up to the whole.

At each moment the first part of PARTS that has a kernel at work takes all of it. So "products" is
what no later part can shorten, and every other part is what it adds to those before it: a kernel
beside a product costs nothing here, although it may slow the product down. The rest is idle.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernels.tools.inspect import short_name

OTHER, IDLE = "other kernels", "idle"
PARTS = {  # in turn, by the names of kernels; of several that fit, the first
  "products": re.compile(r"gemm|gemv|nvjet", re.IGNORECASE),
  "attention": re.compile(r"flash_attn"),
  OTHER: None,  # every name that no other part has
  "collectives": re.compile(r"nccl", re.IGNORECASE),
  "waits for peers": re.compile(r"signals_?Wait"),
}
OPERATION = re.compile(  # within the template's arguments of one of torch's kernels
  r"\b(?!gpu_kernel)\w*(?:_functor|Functor(?:_\w+)?|_cuda_kernel|_kernel_cuda|_kernel_impl)\b"
)
MAIN = ("products", "attention")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaDeviceSynchronize", "cudaEventSynchronize", "cudaStreamSynchronize")

Spans = list[tuple[float, float]]


class Timeline(NamedTuple):
  """Of one step, in milliseconds; of the rank that was profiled."""

  ms: float
  parts: dict[str, float]  # in turn, then IDLE; they add up to ms
  exposed: dict[str, float]  # a kernel of OTHER -> what it alone adds to products and attention
  kernels: float
  host_waits: float  # calls that wait for the device


def timeline(trace: Path) -> Timeline | None:
  """What `nmoe bench step --trace` wrote into trace.json; None if no kernel of a GPU is in it."""
  return divided(json.loads(trace.read_text())["traceEvents"])


def divided(events: Iterable[Mapping[str, Any]]) -> Timeline | None:
  """Of a profile's events; the whole is from the first kernel's begin to the last one's end."""
  spans: dict[str, dict[str, Spans]] = defaultdict(lambda: defaultdict(list))
  steps, waits = set(), 0
  for event in events:
    kind, name = event.get("cat"), event.get("name", "")
    if kind in ON_GPU:
      span = (event["ts"], event["ts"] + event["dur"])
      spans[part_of(name)][name].append(span)
    elif kind == "user_annotation" and name.startswith("ProfilerStep"):
      steps.add(name)
    elif kind == "cuda_runtime" and name in WAITS:
      waits += 1
  if not spans or not steps:
    return None
  scale, parts, before, covered = 1e-3 / len(steps), {}, [], 0.0
  for part in PARTS:
    before += [span for found in spans[part].values() for span in found]
    reached = length(before)
    parts[part], covered = (reached - covered) * scale, reached
  whole = max(end for _, end in before) - min(begin for begin, _ in before)
  parts[IDLE] = (whole - covered) * scale
  main = [s for part in MAIN for found in spans[part].values() for s in found]
  hidden = length(main)
  alone = {name: length(main + found) - hidden for name, found in spans[OTHER].items()}
  exposed = {name: us * scale for name, us in sorted(alone.items(), key=lambda item: -item[1])}
  return Timeline(whole * scale, parts, exposed, len(before) / len(steps), waits / len(steps))


def kernel_name(kernel: str) -> str:
  """What a line has room for: the class of a CuTeDSL kernel, the name and operation of torch's."""
  if "<" not in kernel:
    return short_name(kernel)
  name, arguments = kernel.split("<", 1)
  operation = OPERATION.search(arguments)
  return name.split("::")[-1] + (f" ({operation[0]})" if operation else "")


def part_of(kernel: str) -> str:
  return next((part for part, names in PARTS.items() if names and names.search(kernel)), OTHER)


def length(spans: Sequence[tuple[float, float]]) -> float:
  """Of the union of [begin, end), in their unit."""
  if not spans:
    return 0.0
  begin, end = np.array(sorted(spans), dtype=np.float64).T
  reached = np.maximum.accumulate(end)
  fresh = np.maximum(begin[1:], reached[:-1])  # what lies before it is counted
  return float(end[0] - begin[0] + np.maximum(0.0, end[1:] - fresh).sum())
