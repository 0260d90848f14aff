"""Whether the process that a record names is still the one that wrote it."""

from __future__ import annotations

import calendar
import os
import socket
import time
from pathlib import Path

TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"  # of records: UTC, ISO 8601


def lives(host: str, pid: int, written: str) -> bool:
  """Whether process `pid` of `host` is alive on this host and was so when the record was `written`.

  A process that started later only has the same number. False for other hosts, and where there is
  no /proc: nothing can be said there.
  """
  if host != socket.gethostname():
    return False
  try:
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    boot = next(
      int(line.split()[1])
      for line in Path("/proc/stat").read_text().splitlines()
      if line.startswith("btime")
    )
  except OSError:
    return False
  started = boot + int(fields[18]) / os.sysconf("SC_CLK_TCK")
  return state != "Z" and started <= calendar.timegm(time.strptime(written, TIME_FORMAT)) + 1
