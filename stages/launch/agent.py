"""One host of a production run: torch's elastic agent, which starts its ranks and restarts them.

`python -m stages.launch.agent --root ROOT --run RUN_ID --attempt N --nodes N --node K --head H:P`,
one process a host. Ranks that fail are restarted from the newest checkpoint, on all hosts at once,
`prod.max_restarts` times. SIGTERM makes them save and leave. What became of the run stands in the
records: this exits with 0 unless the ranks could not be kept up. Attempt 0 is a preflight, which is
not tried twice.

Where one rank is lost the others can save nothing more: each step and each checkpoint needs all.
torch sends them SIGTERM and waits 30 s for them, as long as they wait for the lost one. `Agent`
ends them in seconds, their stacks in their logs.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from pathlib import Path

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import (
  DefaultLogsSpecs,
  LogsDest,
  SignalException,
  Std,
)
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import RecordError
from nmoe.machine import gpus
from nmoe.records import launches, postmortem
from nmoe.records.attempts import Attempts, History
from nmoe.records.heartbeat import Heartbeat
from nmoe.records.launches import Launch
from nmoe.records.root import Root
from stages.launch import notify
from stages.launch.child import STACKS

TRAIN, PREFLIGHT = "nmoe.train.loop", "nmoe.bench.preflight"
SAVE_S = 900  # ranks that are told to leave may take this long to save
START_S = 1800  # hosts may come this late to the rendezvous
LOOK_S = 0.5  # ranks are looked at this often
LEAVE_S = 3.0  # ranks that miss one may take this long to say why they end
STACKS_S = 1.0  # and this long to write their stacks
LOOK_GPUS_S = 12.0  # and GPUs may take this long to say how they are, beside all of it
MISSED_S = 10.0  # a rank that passed its own deadline may take this long to end by it
GONE_S = 30.0  # what is killed may take this long to give a GPU's memory back


class Logs(DefaultLogsSpecs):
  """A folder for each start of this host's ranks. torch names it by the restarts that its agent
  counts, and so removes the logs of ranks that another agent's restart ended.
  """

  starts = 0
  folder = Path()  # of the newest start

  def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
    count = {"TORCHELASTIC_RESTART_COUNT": str(self.starts)}
    self.starts += 1
    made = super().reify({local_rank: env | count for local_rank, env in envs.items()})
    self.folder = Path(next(iter(made.stderrs.values()))).parents[1]
    return made


class Looks:
  """What this host's GPUs say when its ranks end or when rank 0 asks: each once, into a file, in a
  thread that nobody waits for longer than LOOK_GPUS_S. On a CPU there is nothing to ask.
  """

  def __init__(self, options: argparse.Namespace, arch: str):
    self.place = options.root, options.run
    self.attempt = options.attempt if arch != "cpu" else 0
    self.done: set[Path] = set()

  def when_asked(self) -> None:
    """Begin what rank 0 asks for, if it does."""
    attempt, step = postmortem.asked(*self.place) if self.attempt else (0, 0)
    if attempt and attempt == self.attempt:
      self.begin(postmortem.look_file(*self.place, attempt, step, socket.gethostname()))

  def begin(self, path: Path) -> threading.Thread | None:
    """Begin to write a look, unless it was before; None: there is nothing to wait for."""
    if not self.attempt or path in self.done:
      return None
    self.done.add(path)
    thread = threading.Thread(target=gpus.write, args=(path,), daemon=True)
    thread.start()
    return thread


class Sign:
  """That the launch lives, for those who ask while it has no ranks: the first host's agent says it
  every EVERY_S, as a context; those of other hosts, and of a preflight, say nothing.
  """

  def __init__(self, options: argparse.Namespace):
    self.place, now = (options.root, options.run), time.time()
    before = Launch.read(*self.place)
    known = before is not None and before.attempt == options.attempt
    began = before.began if known else now
    self.said = Launch(options.attempt, began, now, socket.gethostname(), os.getpid())
    self.silent = options.node > 0 or not options.attempt
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._repeat, daemon=True)

  def __enter__(self) -> Sign:
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._ended.set()
    self._thread.join()

  def lost(self, start: int) -> None:
    """The ranks of a start of this host, counted from 1, are gone or miss one."""
    if start != self.said.restarts:
      self.said = self.said._replace(lost=time.time(), restarts=start)
      self._say()

  def _say(self) -> None:
    self.said = self.said._replace(time=time.time())
    try:
      if not self.silent:
        self.said.write(*self.place)
    except OSError as error:
      sys.stderr.write(f"{error}: nobody is told that the launch lives\n")

  def _repeat(self) -> None:
    self._say()
    while not self._ended.wait(launches.EVERY_S):
      self._say()


class Pulse:
  """The signs of rank 0, if it is of this host, by the clock of this process alone.

  A process that is stopped does not hear its own deadline (nmoe.train.watchdog). Who waits for it
  ends at his; where all are stopped, or there is no other, nobody does.
  """

  def __init__(self, path: Path):
    self.path = path
    self._last: Heartbeat | None = None
    self._since = 0.0

  def missed_s(self, ranks: Collection[int]) -> float:
    """Seconds since the last sign of rank 0, one of these processes, if it should have ended by
    itself meanwhile; else 0.
    """
    now = time.monotonic()
    try:
      found = Heartbeat.read(self.path)
    except (RecordError, OSError):
      found = None  # rank 0 itself says what is wrong with it
    if found != self._last:
      self._last, self._since = found, now
    if found is None or found.host != socket.gethostname() or found.pid not in ranks:
      return 0.0
    age_s = now - self._since
    return age_s if age_s > found.limit_s + MISSED_S else 0.0


class Agent(LocalElasticAgent):
  """torch's agent, which does not wait for ranks that wait for a lost one."""

  def __init__(self, spec: WorkerSpec, logs: Logs, looks: Looks, sign: Sign, pulse: Pulse):
    super().__init__(spec, logs, shutdown_timeout=SAVE_S)
    self.logs, self.looks, self.sign, self.pulse = logs, looks, sign, pulse

  def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
    ranks = self._ranks()
    lost = {number: rank for number, rank in enumerate(ranks) if rank.poll()}
    for number, rank in lost.items():
      sys.stderr.write(f"local rank {number}, pid {rank.pid}: exit status {rank.returncode}\n")
    if missed_s := self.pulse.missed_s([rank.pid for rank in ranks]):
      sys.stderr.write(f"rank 0 gave no sign for {missed_s:.0f} s, and its deadline is over\n")
    if lost or missed_s:
      self._end(ranks)
    self.looks.when_asked()
    return super()._monitor_workers(worker_group)

  def _stop_workers(self, worker_group: WorkerGroup) -> None:
    """Before a restart: another host may have asked for it."""
    self._end(self._ranks())
    super()._stop_workers(worker_group)

  def _end(self, ranks: Sequence[subprocess.Popen]) -> None:
    """End the ranks; meanwhile the GPUs say how they are."""
    self.sign.lost(self.logs.starts)
    look = self.looks.begin(self.logs.folder / postmortem.GPUS)
    begun = time.monotonic()
    end(ranks)
    if look is not None:
      look.join(max(0.0, begun + LOOK_GPUS_S - time.monotonic()))

  def _ranks(self) -> list[subprocess.Popen]:
    """The processes of this host's ranks."""
    handlers = self._pcontext.subprocess_handlers
    return [handlers[local_rank].proc for local_rank in sorted(handlers)]


def end(ranks: Sequence[subprocess.Popen]) -> None:
  """Ranks that miss one: they may end by themselves, then write their stacks and end, then are
  killed.
  """
  for number, seconds in ((0, LEAVE_S), (STACKS, STACKS_S), (signal.SIGKILL, GONE_S)):
    living = [rank for rank in ranks if rank.poll() is None]
    for rank in living:
      with suppress(ProcessLookupError):
        os.killpg(rank.pid, number)  # torch gives each a group of its own
    deadline = time.monotonic() + seconds
    for rank in living:
      with suppress(subprocess.TimeoutExpired):
        rank.wait(max(0.0, deadline - time.monotonic()))


def made(config: Config, options: argparse.Namespace, sign: Sign) -> Agent:
  """The agent of this host, which meets those of the others.

  is_host is always given: torch would decide by the host name who serves the rendezvous, and where
  names mislead nobody would.
  """
  logs = Root(options.root).logs(options.run) / f"attempt_{options.attempt}"
  logs.mkdir(parents=True, exist_ok=True)
  meeting = RendezvousParameters(
    backend="c10d",
    endpoint=options.head,
    run_id=f"{options.run}-{options.attempt}",
    min_nodes=options.nodes,
    max_nodes=options.nodes,
    local_addr=options.address,
    is_host=options.node == 0,
    join_timeout=START_S,
  )
  spec = WorkerSpec(
    role="rank",
    local_world_size=config.node_ranks,
    entrypoint=sys.executable,
    args=tuple(command(options)),
    rdzv_handler=get_rendezvous_handler(meeting),
    max_restarts=config.prod.max_restarts if options.attempt else 0,
    monitor_interval=LOOK_S,
    local_addr=options.address,
  )
  pulse = Pulse(Root(options.root).heartbeat(options.run))
  looks = Looks(options, config.target.arch)
  return Agent(spec, Logs(str(logs), redirects=Std.ALL), looks, sign, pulse)


def command(options: argparse.Namespace) -> list[str]:
  """Of a rank, after the interpreter; its place among the others comes from the environment."""
  module = TRAIN if options.attempt else PREFLIGHT
  more = ["--heartbeat", str(Root(options.root).heartbeat(options.run))] if options.attempt else []
  return [
    *("-P", "-m", "stages.launch.child", "--parent", str(os.getpid()), "--agent"),
    *(module, "--root", str(options.root), "--run", options.run),
    *("--attempt", str(options.attempt), *more),
  ]


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m stages.launch.agent")
  parser.add_argument("--root", type=Path, required=True)
  parser.add_argument("--run", required=True)
  parser.add_argument("--attempt", type=int, required=True)
  parser.add_argument("--nodes", type=int, default=1)
  parser.add_argument("--node", type=int, default=0, help="this host's number")
  parser.add_argument("--head", default="127.0.0.1:0", help="the first host, and a port")
  parser.add_argument("--address", help="by which others reach this host; default: torch finds it")
  options = parser.parse_args()
  signal.signal(signal.SIGTERM, _leave)  # until torch has its own, when it starts ranks
  with closing(History(options.root)) as records:
    config = configs.loads(records.run(options.run).toml, f"run {options.run}", env={})
  told, sign = config.prod.notify if options.node == 0 else "", Sign(options)
  agent = made(config, options, sign)
  try:
    with sign, notify.telling(options.root, options.run, told):
      result = agent.run()
  except SignalException as error:
    sys.stderr.write(f"{error}\n")
    if options.node == 0 and options.attempt:
      with closing(Attempts(options.root)) as records:
        records.left(options.run, options.attempt)
    return 0  # the rendezvous stays open: the other hosts' agents are told by themselves
  agent.get_worker_group().spec.rdzv_handler.shutdown()
  if result is None or result.state == WorkerState.SUCCEEDED:
    return 0
  for rank, failure in result.failures.items():
    sys.stderr.write(f"rank {rank}: exit status {failure.exitcode}, {failure.message}\n")
  return 1


def _leave(number: int, _: object) -> None:
  raise SignalException("told to leave while no rank ran", signal.Signals(number))


if __name__ == "__main__":
  sys.exit(main())
