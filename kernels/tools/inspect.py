"""What a compiled kernel costs and uses, read from its machine code.

Needs CUTE_DSL_KEEP=cubin when the kernel is compiled, and NVIDIA's cuobjdump and nvdisasm: on the
PATH, or from the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from kernels.errors import KernelError

MMA = re.compile(r"UTC\w*MMA|[HQI]GMMA|[HQ]MMA")
OPCODE = re.compile(  # an instruction's address, and its opcode
  r"^\s+/\*([0-9a-f]+)\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
PROGBITS, EXECUTABLE = 1, 4  # of an ELF section: its type and a flag
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
# The host code stores the dynamic shared memory into the third field of cudaLaunchConfig_t.
LAUNCH = r"struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
LAUNCH_SHARED = re.compile(rf"(%\w+) = llvm\.getelementptr %\w+\[0, 2\].*{LAUNCH}")


@dataclass(frozen=True)
class Inspection:
  """One kernel. Without a cubin only job and seconds are known."""

  job: str
  seconds: float  # of compilation
  kernel: str = ""
  registers: int = 0
  stack: int = 0  # bytes of local memory per thread
  stores: int = 0  # STL instructions: spills, or arrays in local memory
  loads: int = 0  # LDL
  shared: int = 0  # bytes per thread block, with the 1 KiB that the system takes of any
  instructions: int = 0
  mma: dict[str, int] = field(default_factory=dict)  # tensor-core opcodes with their modifiers


def tool(name: str) -> str:
  """The path of an NVIDIA binary tool, or KernelError saying what to install."""
  spec = find_spec("nvidia")
  for place in spec.submodule_search_locations if spec else ():
    found = shutil.which(name, path=str(Path(place, "cu13", "bin")))
    if found:
      return found
  found = shutil.which(name)
  if found is None:
    raise KernelError(f"{name} was not found; install it with pip install nvidia-cuda-{name}")
  return found


def _run(name: str, *arguments: str) -> str:
  return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def code(cubin: bytes) -> bytes:
  """The instructions of a cubin: its executable sections (ELF-64)."""
  (table,) = struct.unpack_from("<Q", cubin, 0x28)
  size, count = struct.unpack_from("<HH", cubin, 0x3A)
  sections = (struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count))
  return b"".join(
    cubin[start : start + length]
    for _, kind, flags, _, start, length in sections
    if kind == PROGBITS and flags & EXECUTABLE
  )


def opcodes(codes: Sequence[bytes], arch: str) -> list[Counter]:
  """How often each SASS opcode (with modifiers) occurs in each code of an architecture.

  In one run of nvdisasm over all of them: its start takes half a second.
  """
  found = [Counter() for _ in codes]
  ends = list(accumulate(len(one) for one in codes))
  with tempfile.NamedTemporaryFile() as file:
    file.write(b"".join(codes))
    file.flush()
    sass = (
      _run("nvdisasm", "-b", arch.replace("sm_", "SM"), "-ndf", file.name) if any(codes) else ""
    )
  for address, name in OPCODE.findall(sass):
    found[bisect(ends, int(address, 16))][name] += 1
  return found


def short_name(symbol: str) -> str:
  """The part of a CuTeDSL symbol that names the kernel's class: no hashes, no argument types."""
  name = symbol.removeprefix("kernel_cutlass_").removeprefix("kernel_")
  return re.sub(r"_[0-9a-f]{16}", "", re.split(r"_object_at_", name)[0])


def dynamic_shared(host_code: str) -> int:
  """Bytes of dynamic shared memory that a compiled function's host code (LLVM dialect) asks for."""
  sizes = [0]
  for function in host_code.split("llvm.func"):
    for slot in LAUNCH_SHARED.findall(function):
      [stored] = re.findall(rf"llvm\.store (%\w+), {slot} : i64", function)
      [size] = re.findall(rf"{stored} = llvm\.mlir\.constant\((\d+) : i64\)", function)
      sizes.append(int(size))
  return max(sizes)


def inspect(found: Sequence[tuple[str, Any, float]], arch: str) -> list[Inspection]:
  """The records of compiled functions, of each (job, function, seconds)."""
  cubins = [function.__cubin__ for _, function, _ in found]
  counted = opcodes([code(cubin) if cubin else b"" for cubin in cubins], arch)
  return [_record(*one, ops) for one, ops in zip(found, counted, strict=True)]


def _record(job: str, function: Any, seconds: float, ops: Counter) -> Inspection:
  if not function.__cubin__:
    return Inspection(job, seconds)
  with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(function.__cubin__)
    file.flush()
    symbol, registers, stack, shared = USAGE.search(
      _run("cuobjdump", "-res-usage", file.name)
    ).groups()
  base = Counter()
  for name, count in ops.items():
    base[name.split(".")[0]] += count
  return Inspection(
    job=job,
    seconds=seconds,
    kernel=short_name(symbol),
    registers=int(registers),
    stack=int(stack),
    stores=base["STL"],
    loads=base["LDL"],
    shared=int(shared) + dynamic_shared(str(function.ir_module)),
    instructions=ops.total(),
    mma={name: count for name, count in sorted(ops.items()) if MMA.match(name)},
  )
