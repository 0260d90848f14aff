"""The first lines of a rank: it dies with the process that started it, then becomes its module.

`python -P -m stages.launch.child --parent PID MODULE ARGUMENTS…`. Imports nothing slow, so that
there is no moment of importing torch in which a rank would outlive its parent.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with(parent: int, number: int) -> None:
  """Have the kernel send signal `number` to this process when the thread that started it ends.

  Leaves at once if `parent` is gone already: prctl tells nothing of a death before it.
  """
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
    raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
  if os.getppid() != parent:
    sys.exit(128 + number)


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m stages.launch.child")
  parser.add_argument("--parent", type=int, required=True)
  parser.add_argument("--signal", type=int, default=signal.SIGTERM, help="SIGTERM saves first.")
  parser.add_argument("module")
  parser.add_argument("arguments", nargs=argparse.REMAINDER)
  options = parser.parse_args()
  die_with(options.parent, options.signal)
  sys.argv = [options.module, *options.arguments]
  runpy.run_module(options.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
