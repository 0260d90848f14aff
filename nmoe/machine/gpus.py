"""What this host's GPUs say of themselves once a rank is lost or slow: clocks and what holds them
down, temperature, power, memory errors, and the driver's Xid messages in the kernel's log.

`python -m nmoe.machine.gpus` prints it. nvidia-smi and the kernel's log are asked by child
processes, for LIMIT_S at most; what cannot be asked stands in `lacking`, and nothing here raises.
Xid: docs.nvidia.com/deploy/xid-errors; reasons of clocks: NVML's nvmlClocksEventReason constants.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nmoe import files

LIMIT_S = 10.0  # a driver that lost a GPU may not answer at all
WINDOW_S = 900.0  # messages of the kernel's log that are older are of something else
FIELDS = {  # of nvidia-smi --query-gpu -> ours
  "index": "index",
  "uuid": "uuid",
  "name": "name",
  "pci.bus_id": "bus",
  "clocks.sm": "sm_mhz",
  "clocks.max.sm": "sm_max_mhz",
  "clocks.mem": "memory_mhz",
  "clocks_event_reasons.active": "held_by",
  "temperature.gpu": "celsius",
  "power.draw": "watts",
  "enforced.power.limit": "watts_limit",
  "utilization.gpu": "busy_percent",
  "ecc.errors.corrected.volatile.total": "ecc_corrected",
  "ecc.errors.uncorrected.volatile.total": "ecc_uncorrected",
}
TEXT = ("uuid", "name", "bus")
REASONS = {
  0x1: "idle",
  0x2: "application clocks",
  0x4: "power cap",
  0x8: "hardware slowdown",
  0x10: "sync boost",
  0x20: "thermal slowdown by software",
  0x40: "thermal slowdown by hardware",
  0x80: "power brake",
  0x100: "display clocks",
}
XID = re.compile(r"^\[ *(\d+\.\d+)\] .*?\bS?Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+), ?(.*)$", re.M)
SMI = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
KERNEL = ("dmesg", "--color=never")
Value = float | str | list[str] | None


@dataclass(frozen=True)
class Xid:
  """A message of the driver: how many seconds ago, of which GPU or switch, which error."""

  age_s: float
  bus: str
  code: int
  text: str


@dataclass(frozen=True)
class Look:
  """time: seconds since 1970. gpus: by FIELDS, None where the driver has no value. lacking: what
  could not be asked, and why.
  """

  host: str
  time: float
  gpus: list[dict[str, Value]]
  xids: list[Xid]
  lacking: list[str]


def look() -> Look:
  """Ask now; takes 2 LIMIT_S at most."""
  smi, no_smi = _said(SMI)
  kernel, no_kernel = _said(KERNEL)
  found, odd = gpus(smi)
  lacking = [why for why in (no_smi, *odd, no_kernel) if why]
  return Look(socket.gethostname(), time.time(), found, xids(kernel, _uptime_s()), lacking)


def write(path: Path) -> None:
  """`look` into a file, by this process; a disk that takes none is no reason to fail."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(asdict(look()), indent=1))
  except OSError as error:
    sys.stderr.write(f"{path}: what the GPUs said is lost: {error}\n")


def gpus(text: str) -> tuple[list[dict[str, Value]], list[str]]:
  """nvidia-smi's answer to SMI: a table a GPU; the lines that are none."""
  found, odd = [], []
  for line in filter(None, map(str.strip, text.splitlines())):
    values = [value.strip() for value in line.split(",")]
    if len(values) == len(FIELDS):
      found.append(dict(map(_value, FIELDS.values(), values)))
    else:
      odd.append(f"{SMI[0]}: {line}")
  return found, odd


def xids(text: str, uptime_s: float) -> list[Xid]:
  """The driver's messages in a kernel's log whose lines begin with seconds since the start, up to
  WINDOW_S old.
  """
  ages = ((uptime_s - float(m[1]), m) for m in XID.finditer(text))
  return [Xid(round(age, 1), m[2], int(m[3]), m[4]) for age, m in ages if age <= WINDOW_S]


def _value(name: str, text: str) -> tuple[str, Value]:
  """ "[N/A]", "[Not Supported]", "[Unknown Error]": None."""
  if name in TEXT:
    return name, text
  try:
    number = int(text, 16) if name == "held_by" else float(text)
  except ValueError:
    return name, None
  if name == "held_by":
    return name, [reason for bit, reason in REASONS.items() if number & bit]
  return name, number


def _said(command: tuple[str, ...]) -> tuple[str, str]:
  """What a command printed; why it failed, "" if it did not. Both, where it printed and failed."""
  child = None
  try:
    child = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    out, err = child.communicate(timeout=LIMIT_S)
  except subprocess.TimeoutExpired:
    child.kill()  # and not waited for: in the driver, it may never end
    return "", f"{command[0]}: no answer within {LIMIT_S:g} s"
  except OSError as error:
    return "", f"{command[0]}: {error.strerror}"
  if child.returncode == 0:
    return out, ""
  last = (err.strip() or out.strip() or "no message").splitlines()[-1]
  return out, f"{command[0]}: exit status {child.returncode}: {last}"


def _uptime_s() -> float:
  return time.clock_gettime(time.CLOCK_MONOTONIC)  # the kernel's log stops with it in suspend


if __name__ == "__main__":
  sys.stdout.write(json.dumps(asdict(look()), indent=1) + "\n")
