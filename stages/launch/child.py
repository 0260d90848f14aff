"""The first lines of a rank: it dies with the process that started it, then becomes its module.

`python -P -m stages.launch.child --parent PID MODULE ARGUMENTS…`. Imports nothing slow, so that
there is no moment of importing torch in which a rank would outlive its parent.

`--agent`: the parent is torch's elastic agent (stages.launch.agent). The rank's place comes from
the environment, and its exit status is 0 whenever another start would not help: what became of the
run stands in the records, and the agent restarts ranks that leave with another status. On the
signal STACKS it writes the stacks of its threads to its log, wherever it hangs, and ends.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import runpy
import signal
import sys

from nmoe.records import provenance

PR_SET_PDEATHSIG = 1  # prctl(2)
STACKS = signal.SIGUSR2
RECORDED = (0, 75, 76)  # completed, told to stop, failed for good: nmoe.train.loop


def die_with(parent: int, number: int) -> None:
  """Have the kernel send signal `number` to this process when the thread that started it ends.

  Leaves at once if `parent` is gone already: prctl tells nothing of a death before it.
  """
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
    raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
  if os.getppid() != parent:
    sys.exit(128 + number)


def place() -> list[str]:
  """Where this rank is among the others, as torch's agent says it."""
  env = os.environ
  found = ["--rank", env["RANK"], "--ranks", env["WORLD_SIZE"], "--rendezvous", "env://"]
  return [*found, "--local-rank", env["LOCAL_RANK"], "--local-ranks", env["LOCAL_WORLD_SIZE"]]


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m stages.launch.child")
  parser.add_argument("--parent", type=int, required=True)
  parser.add_argument("--agent", action="store_true", help="the parent is torch's elastic agent")
  parser.add_argument("module")
  parser.add_argument("arguments", nargs=argparse.REMAINDER)
  options = parser.parse_args()
  die_with(options.parent, signal.SIGKILL if options.agent else signal.SIGTERM)
  if options.agent:
    faulthandler.register(STACKS, file=sys.stderr, all_threads=True, chain=True)  # and it ends
  provenance.imported()  # what follows is imported from these files
  more = place() if options.agent else []
  sys.argv = [options.module, *options.arguments, *more]
  try:
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)
  except SystemExit as left:
    if options.agent and left.code in RECORDED:
      sys.exit(0)
    raise


if __name__ == "__main__":
  main()
