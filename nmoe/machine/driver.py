"""The processors of this machine, asked without torch: GPUs of the CUDA driver, in no context."""

from __future__ import annotations

import ctypes
import platform
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kernels.arch import ARCHS
from nmoe.errors import TargetError

LIBRARY = "libcuda.so.1"
NAME_BYTES = 256
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class Gpu(NamedTuple):
  name: str
  capability: tuple[int, int]


@cache
def gpus() -> tuple[Gpu, ...]:
  """As CUDA_VISIBLE_DEVICES lets them through; none where there is no driver."""
  try:
    cuda = ctypes.CDLL(LIBRARY)
  except OSError:
    return ()
  count = ctypes.c_int()
  if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
    return ()
  return tuple(_gpu(cuda, number) for number in range(count.value))


def _gpu(cuda: ctypes.CDLL, number: int) -> Gpu:
  name, values = ctypes.create_string_buffer(NAME_BYTES), (ctypes.c_int(), ctypes.c_int())
  cuda.cuDeviceGetName(name, NAME_BYTES, number)
  for value, which in zip(values, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True):
    cuda.cuDeviceGetAttribute(ctypes.byref(value), which, number)
  return Gpu(name.value.decode(), (values[0].value, values[1].value))


def devices(arch: str) -> set[str]:
  """The names of the processors here that may be an `arch`."""
  return {cpu_name()} if arch == "cpu" else {gpu.name for gpu in gpus()}


def cpu_name() -> str:
  """The model name that Linux reports, or the machine's type."""
  info = Path("/proc/cpuinfo")
  text = info.read_text(errors="replace") if info.is_file() else ""
  model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
  return model[1] if model else platform.machine()


def check(arch: str) -> None:
  """TargetError unless the first GPU is what `arch` needs; nothing for "cpu"."""
  if arch == "cpu":
    return
  wanted, found = ARCHS[arch].capability, gpus()
  if not found:
    raise TargetError(f"{needs(arch)}; the CUDA driver shows none. {remedy('cpu')}")
  if found[0].capability != wanted:
    raise TargetError(other(arch, *found[0]))


def needs(arch: str) -> str:
  """The start of a message about [target]."""
  major, minor = ARCHS[arch].capability
  return f'target.arch = "{arch}" needs a GPU of compute capability {major}.{minor}'


def other(arch: str, name: str, capability: tuple[int, int]) -> str:
  """The message about a GPU of another capability than `arch` needs."""
  fitting = [a.name for a in ARCHS.values() if a.capability == capability] or ["cpu"]
  return f"{needs(arch)}; found {name} ({capability[0]}.{capability[1]}). {remedy(fitting[0])}"


def remedy(fitting: str) -> str:
  return f'Run on such a GPU, or set arch = "{fitting}" under [target]'
