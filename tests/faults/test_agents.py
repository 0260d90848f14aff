"""Agents of two hosts, both on this one: after a rank was killed all start again, and meet."""

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from productions import REPO, wait_until, within_seconds

from nmoe.config import file as configs
from nmoe.records.root import Root
from stages.prod import hosts
from stages.prod.attempt import begin, settle

RANK = """
import os, signal, time
from pathlib import Path
from nmoe.distributed.meeting import Meeting
folder, node = Path(os.environ["FOLDER"]), os.environ["NODE"]
signal.signal(signal.SIGTERM, lambda *_: None)  # as of a rank that would save at its next step
life = len(list(folder.glob(f"life_{node}_*")))
meeting = Meeting("env://", int(os.environ["RANK"]), 2, 30.0)
stale = meeting.store.check([f"of a first life, {other}" for other in "01"])
said = ""
if life == 0:
  meeting.store.set(f"of a first life, {node}", "")
if not stale:
  said = " ".join(sorted(meeting.gather("life", f"{node}.{life}")))
restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"life_{node}_{life}").write_text(f"{restarts}|{stale}|{said}")
def waits_for_the_lost_rank():
  while True: time.sleep(1)
if life == 0 and node == "0":
  while not (folder / "life_1_0").exists(): time.sleep(0.05)
  os.kill(os.getpid(), signal.SIGKILL)
elif life == 0:
  waits_for_the_lost_rank()
"""
AGENT = "import sys; from stages.launch import agent; agent.TRAIN = 'rank'; sys.exit(agent.main())"


def free_port() -> int:
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return one.getsockname()[1]


@pytest.mark.faults
@pytest.mark.parametrize("shares", [False, pytest.param(True, marks=pytest.mark.kills)])
def test_ranks_meet_again_after_one_was_killed(lab, tmp_path, shares):
  """A store that the ranks share with the agents outlives them: in it lie the keys of the dead, by
  which the next ones would meet ranks that are gone. With the ranks' own, which
  stages.prod.hosts.environment asks for, they meet each other, in seconds, though the rank that
  waited takes no SIGTERM. Where it waited stands in its log, though its agent counts no restart.
  """
  run = lab.record(
    launch__ranks=2,
    launch__ranks_per_node=1,
    launch__engine="slurm",
    rdep__group=1,
    schedule__batch_tokens=1024,
    schedule__warmup_tokens=0,
    schedule__decay_tokens=0,
  )
  config = configs.loads(lab.run(run).toml, "test", env={})
  (tmp_path / "rank.py").write_text(RANK)
  env = hosts.environment(config, lab.root)
  assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
  env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0" if shares else "1"
  env |= {"FOLDER": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"}
  place = ["--root", str(lab.root), "--run", run, "--attempt", "1", "--nodes", "2"]
  place += ["--head", f"127.0.0.1:{free_port()}", "--address", "127.0.0.1"]
  with ExitStack() as stack:
    agents = []
    for node in ("0", "1"):
      command = [sys.executable, "-P", "-c", AGENT, *place, "--node", node]
      agents.append(subprocess.Popen(command, env=env | {"NODE": node}, cwd=REPO))
      stack.callback(agents[-1].wait)
      stack.callback(agents[-1].kill)
    assert [agent.wait(180) for agent in agents] == [0, 0]
  lives = {path.name: path for path in tmp_path.glob("life_*")}
  assert sorted(lives) == ["life_0_0", "life_0_1", "life_1_0", "life_1_1"]
  told = {name: path.read_text().split("|") for name, path in lives.items()}
  assert [told[f"life_{node}_0"] for node in (0, 1)] == [["0", "False", "0.0 1.0"]] * 2
  assert [told[f"life_{node}_1"][0] for node in (0, 1)] == ["1", "0"]
  again = [told[f"life_{node}_1"][1:] for node in (0, 1)]
  assert again == ([["True", ""]] if shares else [["False", "0.1 1.1"]]) * 2
  killed = lives["life_1_0"].stat().st_mtime
  within_seconds(lives["life_1_1"].stat().st_mtime - killed, 15, "all have started again")
  logs = [log.read_text() for log in Root(lab.root).logs(run).rglob("stderr.log")]
  assert sum("waits_for_the_lost_rank" in log for log in logs) == 1


@pytest.mark.faults
@pytest.mark.kills
def test_an_agent_that_waits_for_other_hosts_is_told_to_leave(lab):
  """A host that is preempted while another is still to come: it leaves at once, and the attempt is
  to be queued again.
  """
  keys = {"launch__ranks": 2, "launch__ranks_per_node": 1, "launch__engine": "slurm"}
  keys |= {"rdep__group": 1, "schedule__batch_tokens": 1024, "schedule__warmup_tokens": 0}
  run = lab.record(**keys, schedule__decay_tokens=0)
  number = begin(lab.root, run, "slurm")
  config = configs.loads(lab.run(run).toml, "test", env={})
  command = [sys.executable, "-P", "-m", "stages.launch.agent", "--root", str(lab.root)]
  command += ["--run", run, "--attempt", str(number), "--nodes", "2", "--address", "127.0.0.1"]
  command += ["--head", f"127.0.0.1:{free_port()}"]
  process = subprocess.Popen(command, env=hosts.environment(config, lab.root), cwd=REPO)
  try:
    launch = Root(lab.root).launch(run)
    wait_until(lambda: json.loads(launch.read_text())["pid"] == process.pid, 20, "it says a sign")
    time.sleep(2.0)
    process.terminate()
    assert process.wait(30) == 0
  finally:
    process.kill()
    process.wait()
  end = settle(lab.root, run, number)
  assert (end.outcome, end.status) == ("preempted", 75)
