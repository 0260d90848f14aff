"""What the hosts of a run must have in common, compared before anything is allocated."""

from __future__ import annotations

import json
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata

import torch

from nmoe.config.sections import Config
from nmoe.distributed.meeting import Meeting
from nmoe.errors import NmoeError, TargetError
from nmoe.machine.target import Target, select

PACKAGES = ("torch", "numpy", "quack-kernels", "nvidia-cutlass-dsl", "nvidia-nvshmem-cu13")
Facts = Mapping[str, str]


def select_alike(
  config: Config, meeting: Meeting, local_rank: int | None = None, local_ranks: int | None = None
) -> Target:
  """This rank's target (nmoe.machine.target.select), if every rank finds one and all hosts are
  alike. local_rank, local_ranks: among those of its host, None: there is one host.

  TargetError on every rank otherwise, naming the host. Collective.
  """
  rank, ranks = meeting.rank, config.launch.ranks
  target, error = None, ""
  try:
    target = select(config, rank if local_rank is None else local_rank, local_ranks)
  except NmoeError as found:
    error = str(found)
    if ranks == 1:
      raise
  mine = facts(target, local_ranks or ranks) | {"error": error}
  compare([json.loads(told) for told in meeting.gather("hosts", json.dumps(mine))])
  assert target is not None
  return target


def facts(target: Target | None, local_ranks: int) -> dict[str, str]:
  """What this rank's host says of itself: where it is, and what all hosts must say alike."""
  found = {
    "host": socket.gethostname(),
    "processor": target.name if target else "none that fits",
    "ranks": str(local_ranks),
    "threads": str(torch.get_num_threads()),  # of a rank: they decide the order of sums
    "GPUs": str(torch.cuda.device_count()),
    "python": platform.python_version(),
  }
  for name in PACKAGES:
    versions = (one.version for one in metadata.distributions(name=name))
    found[name] = next(versions, "none")
  return found


def compare(told: Sequence[Facts]) -> None:
  """TargetError with what failed on a host ("error"), or naming the hosts that differ from most."""
  failed = dict.fromkeys(f"{one['host']}: {one['error']}" for one in told if one.get("error"))
  if failed:
    raise TargetError("; ".join(failed))
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
