"""Goodput: a made-up history with every bucket, worked out by hand; deadlines of states."""

import json
import time

import pytest

from nmoe.records import attempts, goodput, metrics
from nmoe.records.attempts import Attempts
from nmoe.records.goodput import production
from nmoe.records.heartbeat import STATES, Entry, Heartbeat
from nmoe.records.metrics import Metrics
from nmoe.records.root import Root
from nmoe.train.progress import Progress
from nmoe.train.watchdog import limit

STARTUP = {"imports": 4.0, "kernels": 2.0, "ranks_and_data": 1.0, "model": 2.0}


class Clock:
  now = 0.0

  def time(self) -> float:
    return self.now

  def __getattr__(self, name: str):
    return getattr(time, name)


@pytest.fixture
def history(lab, monkeypatch):
  """Writes a run's history at stated times."""
  clock = Clock()
  for module in (attempts, metrics):
    monkeypatch.setattr(module, "time", clock)
  run = lab.record()
  records, rows = Attempts(lab.root), Metrics(lab.root, run)

  class History:
    id, root = run, lab.root

    def begin(self, at: float, step: int, engine: str = "slurm") -> int:
      clock.now = at
      place = {"engine": engine, "job_id": "", "nodes": ["a"], "commit": ""}
      return records.begin(run, **place, step=step)

    def end(self, at: float, number: int, outcome: str) -> None:
      clock.now = at
      records.end(run, number, outcome=outcome, exit_status=0, step=0)

    def start(self, at: float, number: int, step: int, **detail: float) -> None:
      clock.now = at
      records.started(run, number, step, "a", {"startup": STARTUP} | detail)

    def event(self, at: float, number: int, kind: str) -> None:
      clock.now = at
      records.event(run, number, kind)

    def save(self, at: float, step: int) -> None:
      clock.now = at
      rows.add(step, step * 100, {"checkpoint/stall_s": 0.5, "train/loss": 1.0})
      rows.flush()
      (Root(lab.root).checkpoints(run) / f"step_{step:08d}").mkdir(parents=True)

    def log(self, at: float, step: int, **values: float) -> None:
      clock.now = at
      rows.add(step, step * 100, values | {"train/loss": 1.0})
      rows.flush()

    def beat(self, at: float, step: int, number: int) -> None:
      path = Root(lab.root).heartbeat(run)
      path.parent.mkdir(parents=True, exist_ok=True)
      Heartbeat(Entry(step, 60, 1.0, 1.0, 1.0), at, "a", 1, number).write(path)

    def live(self) -> None:
      records.claim(run)

  yield History()
  records.close()


def test_every_second_is_in_one_bucket(history):
  """A killed rank, a crash of the attempt, a stop: 100 to 250, plus 20 s in the queue before."""
  history.event(80.0, 0, "submit")
  first = history.begin(100.0, 0)
  history.start(110.0, first, 0)  # 101: the processes; 105 imports, 107 kernels, 108, 110 model
  history.save(120.0, 10)
  history.log(125.0, 15, **{"time/eval_s": 2.0})
  history.save(130.0, 20)
  history.start(150.0, first, 20, reached=23, reached_at=134.0)  # the processes: 141
  history.save(160.0, 30)
  history.end(170.0, first, "crashed")
  second = history.begin(180.0, 30)
  history.start(190.0, second, 30, reached=33, reached_at=165.0)
  history.save(200.0, 40)
  history.end(203.0, second, "stopped")
  third = history.begin(220.0, 40)
  history.start(230.0, third, 40, reached=40, reached_at=201.0)
  history.save(245.0, 60)
  history.end(250.0, third, "completed")
  history.beat(246.0, 60, third)
  found = production(history.root, history.id)
  assert found.wall_s == 170.0
  assert found.seconds == pytest.approx(
    {
      "stepping": 20 + 10 + 10 + 15 - 5 * 0.5 - 2.0,
      "save stall": 3 + 5 + 5 * 0.5,  # the ends of the second and third attempt
      "eval": 2.0,
      "lost steps": 4 + 5,
      "hang wait": 7 + 5,
      "starting": 3 * 1 + 4 * 5.0,  # before the processes of each attempt
      "compiling": 4 * 2.0,
      "loading": 4 * 2.0,
      "queued": 20 + 10,
      "stopped": 17,
    }
  )
  assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
  assert found.goodput == pytest.approx(50.5 / 170) and found.ettr == pytest.approx(50.5 / 140)
  assert found.failures == 2 and found.mttf_s == (170 - 30 - 17) / 2  # of what was not between
  assert found.checkpoints == [10, 20, 30, 40, 60] and found.left_s is None
  edges = [(a.end, b.begin) for a, b in zip(found.spans, found.spans[1:], strict=False)]
  assert all(end == begin for end, begin in edges)


def test_a_live_run_is_counted_to_now(history):
  number = history.begin(100.0, 0, "local")
  assert production(history.root, history.id).wall_s == 0.0  # it is not running
  history.live()
  history.start(110.0, number, 0)
  history.save(120.0, 10)
  found = production(history.root, history.id, now=131.0)
  assert found.wall_s == 31.0 and found.seconds["stepping"] == 20.5
  assert found.failures == 0 and found.mttf_s is None
  assert found.left_s == pytest.approx((6144 - 1000) * 31.0 / 1000)


def test_a_rewind_loses_what_came_after_its_checkpoint(history):
  """The second start goes back to step 20, the third before it, to step 10."""
  number = history.begin(100.0, 0, "local")
  history.start(110.0, number, 0)
  history.save(120.0, 10)
  history.start(160.0, number, 20, reached=25, reached_at=135.0)
  history.start(200.0, number, 10, reached=31, reached_at=180.0)
  history.save(220.0, 20)
  history.end(221.0, number, "stopped")
  found = production(history.root, history.id)
  assert found.seconds["stepping"] == 10 + 20 - 2 * 0.5
  assert found.seconds["lost steps"] == 15 + 20 and found.seconds["hang wait"] == 16 + 11


def test_a_killed_launch_is_nobodys_queue(history):
  first = history.begin(100.0, 0, "local")
  history.start(110.0, first, 0)
  second = history.begin(150.0, 0, "local")
  history.start(160.0, second, 0, reached=3, reached_at=115.0)
  history.end(161.0, second, "crashed")
  found = production(history.root, history.id)
  assert found.seconds["lost steps"] == 5 and found.seconds["stopped"] == 35
  assert found.failures == 2


def test_the_heartbeat_tells_the_state(tmp_path):
  """At each change, and the newest logged step of the ranks before, whatever was logged since."""
  path = tmp_path / "run" / "heartbeat.json"
  first = Progress(None, path, 1)
  assert first.before is None
  for state in STATES[:3]:
    first.enter(state)
    beat = Heartbeat.read(path)
    assert (beat.state, beat.attempt, beat.entry.step) == (state, 1, 0)
  first.log(Entry(7, 9, 2.0, 3.0, 4.0), tell=True)
  stamp = path.stat().st_mtime_ns
  first.enter("stepping")
  assert path.stat().st_mtime_ns == stamp  # nothing new
  second = Progress(None, path, 2)
  second.enter("starting")
  assert second.before.entry.step == 7 and json.loads(path.read_text())["entry"]["step"] == 7


def test_deadlines():
  assert limit("starting", 8.0, 0.0, 1) == 1800.0
  for state in ("saving", "stopping"):
    assert limit(state, 8.0, 0.1, 1) == 900.0 and limit(state, 1800.0, 0.1, 1) == 1800.0
    assert limit(state, 8.0, 0.1, 1, 2.0) == 8.0  # of a run whose checkpoints take 2 s
    assert limit(state, 8.0, 0.1, 1, 20.0) == 60.0
  assert limit("profiling", 8.0, 0.1, 1) == 900.0 and limit("profiling", 1800.0, 0.1, 1) == 1800.0
  assert limit("stepping", 600.0, 0.0, 10) == 600.0  # none is measured
  assert limit("stepping", 600.0, 0.1, 10) == 60.0
  assert limit("stepping", 600.0, 4.0, 10) == 120.0  # 20 steps, and all since the last log
  assert limit("stepping", 8.0, 4.0, 10) == 8.0 and limit("evaluating", 600.0, 0.1, 1) == 600.0


def test_buckets_are_all_there_are():
  assert set(goodput.STARTUP.values()) < set(goodput.BUCKETS)
