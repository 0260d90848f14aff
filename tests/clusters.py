"""Two hosts on this one: network namespaces joined by a wire, and a Slurm of two nodes. Root only.

What they need (ip of iproute2; slurmctld, slurmd, sbatch and munged) is in Debian's packages
`iproute2 slurmctld slurmd slurm-client munge`; tests/conftest.py counts the tests that go without.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

NEEDS = {
  "netns": ("ip", "unshare"),
  "slurm": ("slurmctld", "slurmd", "sbatch", "munged"),
  "kubernetes": ("kubectl",),
}
PACKAGES = {"kubernetes": ("kmock", "kubernetes_validate", "jsonschema")}
CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16837
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={dir}/sock,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=5
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=5
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port=16840 CPUs=2 RealMemory=2000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=16841 CPUs=2 RealMemory=2000
PartitionName=ci Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def lacking(marker: str) -> str:
  """What a marker's tests need and this machine lacks; "" if nothing."""
  tools = [tool for tool in NEEDS[marker] if shutil.which(tool) is None]
  tools += [name for name in PACKAGES.get(marker, ()) if importlib.util.find_spec(name) is None]
  if marker != "kubernetes" and os.geteuid() != 0:
    tools.append("root")
  return ", ".join(tools)


class Namespaces:
  """Two hosts h0 and h1, each with a network of its own; a context. `interface` joins them."""

  interface = "wire"

  def __init__(self) -> None:
    tag = secrets.token_hex(2)
    self.names = [f"nmoe-{tag}-{n}" for n in (0, 1)]
    self.addresses = ["10.231.7.1", "10.231.7.2"]

  def __enter__(self) -> Namespaces:
    for name in self.names:
      _ip("netns", "add", name)
      _ip("-n", name, "link", "set", "lo", "up")
    first, second = self.names
    peer = ("peer", "name", self.interface, "netns", second)
    _ip("-n", first, "link", "add", self.interface, "type", "veth", *peer)
    for name, address in zip(self.names, self.addresses, strict=True):
      _ip("-n", name, "address", "add", f"{address}/24", "dev", self.interface)
      _ip("-n", name, "link", "set", self.interface, "up")
    return self

  def __exit__(self, *_: object) -> None:
    for name in self.names:
      _ip("netns", "delete", name)

  def prefix(self, host: int) -> list[str]:
    """Runs what follows on a host, under its name."""
    enter = ["ip", "netns", "exec", self.names[host], "unshare", "--uts"]
    return [*enter, "sh", "-c", f'hostname h{host}; exec "$@"', "sh"]

  def cut(self, seconds: float) -> None:
    """The wire carries nothing meanwhile."""
    _ip("-n", self.names[1], "link", "set", self.interface, "down")
    time.sleep(seconds)
    _ip("-n", self.names[1], "link", "set", self.interface, "up")


def host(name: str) -> list[str]:
  """Runs what follows on this host under another name."""
  return ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]


class Slurm:
  """A Slurm of two nodes n0 and n1 with all its state in a folder; a context."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.conf = folder / "slurm.conf"

  def __enter__(self) -> Slurm:
    for name in ("state", "spool-n0", "spool-n1"):
      (self.folder / name).mkdir(parents=True)
    for above in (self.folder, *self.folder.parents[:-2]):
      above.chmod(0o755)  # munge wants its socket to be found by all
    self.conf.write_text(CONF.format(host=socket.gethostname(), dir=self.folder))
    key = self.folder / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = {"key-file": "key", "socket": "sock", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "seed"}
    self._run("munged", "--force", *(f"--{k}={self.folder / v}" for k, v in files.items()))
    self._run("slurmctld", "-f", str(self.conf))
    for node in ("n0", "n1"):
      self.start_node(node)
    deadline = time.monotonic() + 60
    while self.say("sinfo", "-h", "-t", "idle", "-o", "%D") != "2":
      assert time.monotonic() < deadline, "the nodes are not idle"
      time.sleep(0.1)
    return self

  def __exit__(self, *_: object) -> None:
    self.say("scancel", "--user=root")
    for name in ("slurmd-n0", "slurmd-n1", "slurmctld", "munge"):
      self.kill(name)

  def start_node(self, node: str) -> None:
    self._run("slurmd", "-N", node, "-f", str(self.conf))

  def kill(self, daemon: str, number: int = 15) -> None:
    try:
      os.kill(int((self.folder / f"{daemon}.pid").read_text()), number)
    except (OSError, ValueError):
      return

  def say(self, *command: str) -> str:
    """What a client prints."""
    return self._run(*command, check=False)

  def jobs(self, name: str) -> list[tuple[str, str]]:
    """(id, state) of the jobs of a name."""
    lines = self.say("squeue", "-h", f"--name={name}", "-o", "%i %T").splitlines()
    return [tuple(line.split()) for line in lines]

  @property
  def env(self) -> dict[str, str]:
    return os.environ | {"SLURM_CONF": str(self.conf)}

  def _run(self, *command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.env)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def _ip(*arguments: str) -> None:
  done: Sequence[str] | subprocess.CompletedProcess = subprocess.run(
    ["ip", *arguments], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
