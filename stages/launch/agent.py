"""One host of a production run: torch's elastic agent, which starts its ranks and restarts them.

`python -m stages.launch.agent --root ROOT --run RUN_ID --attempt N --nodes N --node K --head H:P`,
one process a host. Ranks that fail are restarted from the newest checkpoint, on all hosts at once,
`prod.max_restarts` times. SIGTERM makes them save and leave. What became of the run stands in the
records: this exits with 0 unless the ranks could not be kept up. Attempt 0 is a preflight, which is
not tried twice.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.records.attempts import History
from nmoe.records.root import Root
from stages.launch import notify

TRAIN, PREFLIGHT = "nmoe.train.loop", "nmoe.bench.preflight"
SAVE_S = 900  # ranks that are told to leave may take this long to save
START_S = 1800  # hosts may come this late to the rendezvous


def settings(config: Config, options: argparse.Namespace) -> LaunchConfig:
  """Of torch's agent on this host.

  is_host is always given: torch would decide by the host name who serves the rendezvous, and where
  names mislead nobody would.
  """
  logs = Root(options.root).logs(options.run) / f"attempt_{options.attempt}"
  logs.mkdir(parents=True, exist_ok=True)
  return LaunchConfig(
    min_nodes=options.nodes,
    max_nodes=options.nodes,
    nproc_per_node=config.node_ranks,
    run_id=f"{options.run}-{options.attempt}",
    rdzv_backend="c10d",
    rdzv_endpoint=options.head,
    rdzv_configs={"is_host": options.node == 0, "timeout": START_S},
    max_restarts=config.prod.max_restarts if options.attempt else 0,
    monitor_interval=0.5,
    local_addr=options.address,
    logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    shutdown_timeout=SAVE_S,
  )


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
  reader = History(options.root)
  config = configs.loads(reader.run(options.run).toml, f"run {options.run}", env={})
  reader.close()
  told = config.prod.notify if options.node == 0 else ""
  try:
    with notify.telling(options.root, options.run, told):
      elastic_launch(settings(config, options), sys.executable)(*command(options))
  except ChildFailedError as error:
    for rank, failure in error.failures.items():
      sys.stderr.write(f"rank {rank}: exit status {failure.exitcode}, {failure.message}\n")
    return 1
  except SignalException as told:
    sys.stderr.write(f"{told}\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
