"""`nmoe doctor`: what works on this machine, what is missing, and the remedy.

Looks and tries, changes nothing. torch is only touched in a child process, so that a torch that
cannot be imported is a finding.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nmoe import files
from nmoe.config.parameters import kept_bytes
from nmoe.config.sections import Config
from nmoe.machine.versions import installed, pip_line, python_clauses, requirements, satisfies
from nmoe.records.provenance import REPO

OURS = ("kernels", "nmoe", "stages")
TORCH_RUNS = ">=2.11"  # other than the pinned torch, these run too
PROBE_TIMEOUT_S = 120
GDRCOPY = "/dev/gdrdrv"  # its kernel module's
MAPS_FOR_THE_HOST = 610  # the driver's release from which NVSHMEM 3.8 does without GDRCopy


@dataclass(frozen=True)
class Check:
  name: str
  ok: bool
  found: str
  remedy: str = ""  # what to do when it is not ok


def examine(config: Config | None = None) -> list[Check]:
  """Every check of this machine, and with a configuration of what that configuration needs."""
  gpu = config is not None and config.target.arch != "cpu"
  checks = [_python(), *_packages("", True), *_shadows(), *_packages("cuda", gpu)]
  checks += [_driver(gpu), *_targets(config)]
  if gpu and config.launch.ranks > 1:
    checks.append(_nvshmem())
    checks += [] if config.rdep.peer_access else [_puts()]
  if config is not None:
    checks += [_disk(config), _locks(Path(config.run.root))]
  return checks


def _python() -> Check:
  found, wanted = platform.python_version(), python_clauses()
  return Check(
    "python", satisfies(found, wanted), f"{found} at {sys.executable}", f"install Python {wanted}"
  )


def _packages(extra: str, needed: bool) -> Iterator[Check]:
  """The requirements of one extra; those that the target does not need are only reported."""
  for wanted in requirements():
    if wanted.extra != extra:
      continue
    version = installed(wanted.name)
    works = wanted.allows(version)
    found = version or "not installed"
    if wanted.name == "torch" and version and not works:
      works = satisfies(version, TORCH_RUNS)
      found += f" (pinned: {wanted.line}; {TORCH_RUNS} runs)"
    elif not works:
      found += f" (wanted: {wanted.line})" if needed else " (not needed here)"
    yield Check(wanted.name, works or not needed, found, pip_line([wanted]))


def _shadows() -> Iterator[Check]:
  """Our top-level packages must be those beside this file: `kernels` is a common name."""
  owners = metadata.packages_distributions()
  for name in OURS:
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    foreign = sorted(set(owners.get(name, ())) - {"nmoe"})
    if origin is None or origin.parent != REPO / name:
      found = f"{origin or 'nothing'} instead of {REPO / name}"
    elif foreign:
      found = f"{origin.parent}, also installed by {', '.join(foreign)}"
    else:
      yield Check(f"package {name}", True, str(origin.parent))
      continue
    remedy = f"pip uninstall {' '.join(foreign)}" if foreign else f"remove {name} from sys.path"
    yield Check(f"package {name}", False, found, f"{remedy}, then reinstall nmoe")


def _driver(needed: bool) -> Check:
  """The NVIDIA driver and its GPUs, as nvidia-smi names them."""
  query = "--query-gpu=name,driver_version,memory.total,compute_cap"
  remedy = "install the NVIDIA driver (580 or later), or give the container the GPU"
  try:
    answer = _run(["nvidia-smi", query, "--format=csv,noheader"])
  except (OSError, subprocess.SubprocessError) as error:
    found = "no nvidia-smi" if isinstance(error, FileNotFoundError) else str(error)
    found += "" if needed else " (not needed here)"
    return Check("nvidia driver", not needed, found, remedy)
  return Check("nvidia driver", True, answer.strip().replace("\n", "; "), remedy)


def _targets(config: Config | None) -> Iterator[Check]:
  """What nmoe.machine.target says, of the configured architecture or of all."""
  try:
    answers = json.loads(_run([sys.executable, "-m", "nmoe.machine.target"]))
  except (subprocess.SubprocessError, ValueError) as error:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    last = said.strip().splitlines()[-1:] or ["no message"]
    yield Check("target", False, f"torch cannot be imported: {last[0]}", "reinstall torch")
    return
  for arch, answer in answers.items():
    if config is None:
      yield Check(f"target {arch}", True, answer.get("name", "not on this machine"))
    elif arch == config.target.arch:
      found = answer.get("name") or answer["error"]
      yield Check(f"target {arch}", "name" in answer, found, "see the message")


def _nvshmem() -> Check:
  """The version that the NVSHMEM library itself reports."""
  wanted = next(r for r in requirements() if r.name.startswith("nvidia-nvshmem"))
  remedy = pip_line([wanted])
  try:
    root = Path(str(metadata.distribution(wanted.name).locate_file("nvidia/nvshmem/lib")))
    library = ctypes.CDLL(str(root / "libnvshmem_host.so.3"))
  except (metadata.PackageNotFoundError, OSError) as error:
    return Check("nvshmem library", False, str(error), remedy)
  parts = [ctypes.c_int() for _ in range(3)]
  library.nvshmemx_vendor_get_version_info(*map(ctypes.byref, parts))
  version = ".".join(str(part.value) for part in parts)
  return Check("nvshmem library", wanted.allows(version), f"{version} in {root}", remedy)


def _puts() -> Check:
  """Whether puts could reach a GPU whose memory no peer maps. NVSHMEM's barriers write signals
  there from the host, by its UCX transport (configs/moonlight/RESULTS.md, "The remote path").
  """
  name, here = "rdep puts", "through peer memory"
  try:
    ctypes.CDLL("libgdrapi.so.2")
    if Path(GDRCOPY).exists():
      return Check(name, True, f"{here}; GDRCopy is there for UCX (not tried)")
  except OSError:
    pass
  try:
    version = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
  except (OSError, subprocess.SubprocessError):
    version = ""
  driver = version.split()[0] if version.split() else "unknown"
  if driver.split(".")[0].isdigit() and int(driver.split(".")[0]) >= MAPS_FOR_THE_HOST:
    return Check(name, True, f"{here}; driver {driver} serves UCX (not tried)")
  needed = f"GDRCopy (libgdrapi.so.2, {GDRCOPY}) or a driver from R{MAPS_FOR_THE_HOST}"
  return Check(name, True, f"{here} only: UCX wants {needed}, here is {driver}")


def _disk(config: Config) -> Check:
  """Whether root can be written and holds the checkpoints that are kept, and one being written."""
  root, name = Path(config.run.root), "root"
  place = files.existing(root)
  try:
    with tempfile.TemporaryDirectory(dir=place, prefix="nmoe-doctor-") as folder:
      (Path(folder) / "file").write_bytes(b"nmoe")
  except OSError as error:
    remedy = f"make {place} writable, or set run.root (or NMOE_ROOT) to a folder that is"
    return Check(name, False, f"{root}: {error}", remedy)
  free = shutil.disk_usage(place).free
  need = kept_bytes(config)
  found = f"{root}: {free / 1e9:,.1f} GB free, checkpoints take {need / 1e9:,.1f} GB"
  return Check(
    name, free > need, found, "free space, lower train.keep_checkpoints or move run.root"
  )


def _locks(root: Path) -> Check:
  """flock must exclude a second holder, and SQLite must lock and write."""
  remedy = "the filesystem has no working locks: set run.root to a local disk"
  try:
    with tempfile.TemporaryDirectory(dir=files.existing(root), prefix="nmoe-doctor-") as folder:
      excludes = _flock_excludes(Path(folder) / "lock") and _sqlite_excludes(Path(folder) / "db")
  except (OSError, sqlite3.Error) as error:
    return Check("locks", False, f"{root}: {error}", remedy)
  return Check(
    "locks", excludes, f"{root}: {'flock and SQLite' if excludes else 'ignored'}", remedy
  )


def _flock_excludes(path: Path) -> bool:
  with path.open("w") as first, path.open("w") as second:
    return files.lock(first) and not files.lock(second)


def _sqlite_excludes(path: Path) -> bool:
  first = sqlite3.connect(path, isolation_level=None)
  second = sqlite3.connect(path, isolation_level=None, timeout=0)
  try:
    first.execute("CREATE TABLE t (x)")
    first.execute("BEGIN EXCLUSIVE")
    second.execute("BEGIN EXCLUSIVE")
  except sqlite3.OperationalError:
    if not first.in_transaction:
      raise
    return True
  finally:
    second.close()
    first.close()
  return False


def _run(command: list[str]) -> str:
  done = subprocess.run(
    command, cwd=REPO, capture_output=True, text=True, check=True, timeout=PROBE_TIMEOUT_S
  )
  return done.stdout
