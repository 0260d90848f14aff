"""nmoe.train.loop with a fault that the environment names as ODD, "rank:what"."""

import os
import signal
import sys
from pathlib import Path

from torch.distributed import checkpoint as dcp

from nmoe.distributed import parallel
from nmoe.train import loop

RANK, _, WHAT = os.environ["ODD"].partition(":")
MINE = sys.argv[sys.argv.index("--rank") + 1] == RANK


def stop(*_):
  os.kill(os.getpid(), signal.SIGSTOP)


def listening() -> list[str]:
  """The addresses on which this process listens, in hexadecimal, by proc(5)."""
  links = (os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
  mine = {link[8:-1] for link in links if link.startswith("socket:[")}
  rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
  return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in mine]


def noting(init):
  def joined(*arguments):
    ranks = init(*arguments)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    sys.stderr.write(f"listens on {sorted(set(listening()))} by {interface}\n")
    return ranks

  return joined


if WHAT == "listening":
  parallel.init = noting(parallel.init)
elif MINE and WHAT == "stopped in its checkpoint":
  dcp.FileSystemWriter.write_data = stop
elif MINE and WHAT == "interrupted":
  loop.train = lambda *_: os.kill(os.getpid(), signal.SIGINT)
elif MINE:
  os.kill(os.getpid(), int(WHAT))
sys.exit(loop.main())
