"""What the hosts of a run must have in common, compared before anything is allocated."""

from __future__ import annotations

import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata

import torch.distributed as dist

from nmoe.errors import TargetError
from nmoe.machine.target import Target

PACKAGES = ("torch", "numpy", "quack-kernels", "nvidia-cutlass-dsl", "nvidia-nvshmem-cu13")
Facts = Mapping[str, str]


def facts(target: Target, local_ranks: int) -> dict[str, str]:
  """What this rank's host says of itself: where it is, and what all hosts must say alike."""
  found = {
    "host": socket.gethostname(),
    "processor": target.name,
    "ranks": str(local_ranks),
    "python": platform.python_version(),
  }
  for name in PACKAGES:
    versions = (one.version for one in metadata.distributions(name=name))
    found[name] = next(versions, "none")
  return found


def compare(mine: Facts, group: dist.ProcessGroup) -> None:
  """TargetError on every rank, naming the hosts that differ from most. Collective over `group`."""
  told: list[Facts] = [{}] * group.size()
  dist.all_gather_object(told, dict(mine), group)
  odd = differences(told)
  if odd:
    raise TargetError("the hosts of this run are not alike: " + "; ".join(odd))


def differences(told: Sequence[Facts]) -> list[str]:
  """A line for each fact in which a host differs from most ranks."""
  lines: dict[str, None] = {}
  for key in sorted(set().union(*told) - {"host"}):
    usual, _ = Counter(one.get(key, "none") for one in told).most_common(1)[0]
    for rank, one in enumerate(told):
      value = one.get(key, "none")
      if value != usual:
        lines[
          f"{one['host']} (rank {rank}) has {key} {value}, most have {usual}: use hosts of one "
          "kind, and one environment on all"
        ] = None
  return list(lines)
