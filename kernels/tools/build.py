"""Compile the CUDA kernels of a configuration ahead of a run, or beside its start, in a child
process. Imports no CUDA package.

The child needs no GPU: a login node or CI can fill the cache folder that a GPU host then reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from kernels.arch import environment
from kernels.errors import KernelError
from kernels.shapes import Shapes

CODE = Path(__file__).resolve().parents[2]  # a child imports from here, not where it is started


def build(
  shapes: Sequence[Shapes],
  arch: str,
  cache_root: str | Path,
  env: Mapping[str, str],
  *,
  inspect: bool = False,
) -> list[dict]:
  """Fill cache_root/arch with the kernels of these shapes; one record per kernel compiled.

  env is the environment that the child starts from. Records hold the kernel's job, name and compile
  seconds; with `inspect` the kernels are compiled one after the other and the records also hold
  registers, spills, shared memory and tensor-core instructions. Raises KernelError with the child's
  last lines if it fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder, "records.json")
    command, child = _child(shapes, arch, cache_root, env)
    if inspect:
      child |= {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": folder}
      command += ["--workers", "1"]
    command += ["--stamps", *(str(stamp(one, arch, cache_root).resolve()) for one in shapes)]
    command += ["--records", str(out)]
    done = subprocess.run(command, cwd=CODE, env=child, capture_output=True, text=True)
    if done.returncode:
      tail = "\n".join(done.stderr.splitlines()[-15:])
      raise KernelError(f"building the kernels for {arch} failed (exit {done.returncode}):\n{tail}")
    return json.loads(out.read_text())


def start(
  shapes: Shapes, arch: str, cache_root: str | Path, env: Mapping[str, str], log: Path
) -> subprocess.Popen | None:
  """Begin to fill cache_root/arch on all cores, and do not wait; None if that was done before, by
  these sources and packages, or is being done by another process.

  A run that needs a kernel meanwhile waits for the one that compiles it, or compiles it itself: the
  cache locks each kernel. So a failure here stops nothing; the child's output goes to `log`.
  """
  done = stamp(shapes, arch, cache_root)
  if done.exists():
    return None
  done.parent.mkdir(parents=True, exist_ok=True)
  lock = os.open(done.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return None
  else:
    command, child = _child([shapes], arch, cache_root, env)
    command += ["--stamps", str(done.resolve())]
    with log.open("a") as out:  # the child inherits the lock, which its end releases
      return subprocess.Popen(
        command,
        cwd=CODE,
        env=child,
        stdout=out,
        stderr=out,
        pass_fds=(lock,),
        start_new_session=True,
      )
  finally:
    os.close(lock)


def stamp(shapes: Shapes, arch: str, cache_root: str | Path) -> Path:
  """The file that says that the kernels of these shapes are in the cache, as they are made now."""
  h = hashlib.sha256(json.dumps(asdict(shapes)).encode())
  for package in ("nvidia-cutlass-dsl", "quack-kernels", "flash-attn-4"):
    found = (one.version for one in metadata.distributions(name=package))
    h.update(f"{package} {next(found, None)}".encode())
  for source in sorted(Path(__file__).parents[1].rglob("*.py")):
    h.update(source.read_bytes())
  return Path(cache_root) / arch / "built" / h.hexdigest()[:16]


def _child(
  shapes: Sequence[Shapes], arch: str, cache_root: str | Path, env: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
  """The command and the environment of a process that compiles; it sees no GPU."""
  given = json.dumps([asdict(one) for one in shapes])
  command = [sys.executable, "-m", "kernels.tools.compiler", given]
  cache = Path(cache_root).resolve()
  return command, {**env, **environment(arch, cache), "CUDA_VISIBLE_DEVICES": ""}
