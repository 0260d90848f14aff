"""The launcher: with runs where the process matters, with small scripts where it does not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labs import Lab, same_bits

from nmoe.records.root import Root
from nmoe.train import loop as train
from stages.launch import local as launch


def child(lab: Lab, run: str) -> list[str]:
  return [sys.executable, "-m", "nmoe.train.loop", "--root", str(lab.root), "--run", run]


def test_interrupted_and_finished(lab):
  """Ctrl-C while it trains: the child saves its state and leaves; the next one goes on from it."""
  run, whole = lab.record(), lab.record()
  seen = []

  def stop(line):
    seen.append(line["step"])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    launch.run(lab.root, run, lab.config, stop)
  assert seen == [1]
  assert lab.run(run).status == "interrupted"
  assert lab.attempt(run) == lab.attempt(whole) == 0
  assert same_bits(lab.state(run), lab.state(whole))
  assert (Root(lab.root).logs(run) / "rank_0.txt").read_text() == ""  # no warning, no noise
  assert signal.getsignal(signal.SIGTERM) is not launch._raise_interrupt


def test_a_child_whose_parent_vanished(lab):
  """It saves its state and leaves with the status of an interrupted run, not with a traceback."""
  run = lab.record()
  process = subprocess.Popen(
    child(lab, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert json.loads(process.stdout.readline())["step"] == 1
  process.stdout.close()
  assert process.wait(60) == train.INTERRUPTED
  assert process.stderr.read() == ""
  process.stderr.close()
  assert lab.run(run).status == "interrupted"


@pytest.fixture
def scripts(lab, monkeypatch):
  """Children that run a given line of Python in place of nmoe.train.loop."""

  def use(*lines: str):
    def spawn(root, run_id, config, rank, rendezvous, logs, more):
      with (logs / f"rank_{rank}.txt").open("a") as log:
        return subprocess.Popen(
          [sys.executable, "-c", lines[rank]],
          stdout=subprocess.PIPE if rank == 0 else log,
          stderr=log,
          text=True,
        )

    monkeypatch.setattr(launch, "_spawn", spawn)
    return lab.config.with_values(**{"launch.ranks": len(lines), "schedule.batch_tokens": 1024})

  return use


SLEEP = "import time; time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


def test_progress_and_noise(lab, scripts):
  config = scripts("print('a library says hello'); print('{\"step\": 1}')")
  lines = []
  assert launch.run(lab.root, "r", config, lines.append) == 0
  assert lines == [{"step": 1}]
  assert launch.tail(lab.root, "r").endswith("rank_0.txt:\na library says hello\n")


def test_the_first_failure_is_the_status(lab, scripts):
  config = scripts("import sys; sys.exit(3)", "pass")
  assert launch.run(lab.root, "r", config, print) == 3


def test_ranks_that_outlive_a_failed_one_are_stopped(lab, scripts, monkeypatch):
  """One leaves at SIGTERM, another only at SIGKILL; the status is that of the one that failed."""
  monkeypatch.setattr(launch, "GRACE_S", 0.3)
  config = scripts("import sys; sys.exit(4)", STUBBORN)
  begun = time.monotonic()
  assert launch.run(lab.root, "r", config, print) == 4
  config = scripts("import sys; sys.exit(5)", SLEEP)
  assert launch.run(lab.root, "r", config, print) == 5
  assert time.monotonic() - begun < 20


def test_sigterm_stops_the_children(lab, scripts):
  """Sent to the launcher, it is passed on and raised there as an interrupt."""
  told = lab.root / "told"
  config = scripts(
    "import signal, time\n"
    f"signal.signal(signal.SIGTERM, lambda *_: (open({str(told)!r}, 'w').close(), exit(75)))\n"
    "print('{\"step\": 1}', flush=True); time.sleep(60)"
  )
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt):
    launch.run(lab.root, "r", config, lambda _: os.kill(os.getpid(), signal.SIGTERM))
  assert told.exists()
  assert signal.getsignal(signal.SIGTERM) is before


def test_kill_at(lab, scripts):
  lines = (
    "import time\nfor s in range(1, 9): print(f'{{\"step\": {s}}}', flush=True)\ntime.sleep(60)"
  )
  config = scripts(lines)
  seen = []
  assert launch.run(lab.root, "r", config, seen.append, kill_at=5) == -signal.SIGKILL
  assert {"step": 5} in seen


def test_no_child_outlives_an_error_here(lab, scripts):
  config = scripts(f"import os; print('{{\"pid\": %d}}' % os.getpid(), flush=True); {SLEEP}")
  pids = []

  def fail(line):
    pids.append(line["pid"])
    raise ValueError("here")

  with pytest.raises(ValueError, match="here"):
    launch.run(lab.root, "r", config, fail)
  assert not Path(f"/proc/{pids[0]}").exists()


def test_tail_is_the_end_of_every_rank(tmp_path):
  logs = Root(tmp_path).logs("r")
  assert launch.tail(tmp_path, "r") == ""
  logs.mkdir(parents=True)
  (logs / "rank_0.txt").write_text("".join(f"line {i}\n" for i in range(50)))
  (logs / "rank_1.txt").write_bytes(b"not \xff UTF-8\n")
  (logs / "rank_2.txt").write_text("\n")
  text = launch.tail(tmp_path, "r", lines=2)
  assert text == f"{logs}/rank_0.txt:\nline 48\nline 49\n\n{logs}/rank_1.txt:\nnot \ufffd UTF-8\n"
