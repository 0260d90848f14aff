"""The reader of dashboards: what a trainer appends appears, and neither is in the other's way."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from roots import KILLED, RUN, SPILLED, start_run, tree_hash, write

from nmoe.records import metrics
from nmoe.records.experiments import Experiments
from nmoe.records.live import Live, LiveFile, Opener
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Hypothesis
from nmoe.records.root import Root

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path):
  (tmp_path / "root").mkdir()
  return tmp_path / "root"


@pytest.fixture
def live(root, tmp_path):
  return Live(root, tmp_path / "cache")


def values(file: LiveFile, tag: str = "loss") -> list[float]:
  rows = file.read([tag])
  return rows[tag].value.tolist() if rows else []


def with_runs(root: Path, count: int) -> list[str]:
  """The ids of runs that stand in the records, interrupted."""
  with_all = Experiments(root)
  claim = Hypothesis("It learns.", "val/bpb", "lower", 0.0)
  experiment = with_all.create("test", "research", [claim])
  told = {"diff": "a long diff"}
  ids = [start_run(with_all, experiment.id, "arm", seed, **told).id for seed in range(count)]
  with_all.close()
  Experiments(root).close()
  return ids


def test_appended_rows_are_read_once_and_agree_with_a_whole_read(root, live):
  file = live.file(RUN)
  assert values(file) == [] and file.tags() == []
  for steps in (range(5), range(5, 6), range(6, 40)):
    write(root, steps)
    rows = file.read(["loss", "never"])
    steps, tokens, wanted = metrics.read(root, RUN)["loss"]
    assert rows.keys() == {"loss"}
    np.testing.assert_array_equal(rows["loss"].step, steps)
    np.testing.assert_array_equal(rows["loss"].tokens, tokens)
    np.testing.assert_array_equal(rows["loss"].value, wanted)
    assert (np.diff(rows["loss"].time) >= 0).all()
  assert file.tags() == ["loss", "lr"]


def test_a_file_that_did_not_change_is_not_opened(root, live, monkeypatch):
  write(root, range(3))
  file = live.file(RUN)
  assert values(file) == [0, 1, 2] and values(file, "lr") == [0.5] * 3
  monkeypatch.setattr(duckdb, "connect", None)
  assert values(file) == [0, 1, 2] and file.tags() == ["loss", "lr"]


def test_a_database_in_memory_attaches_so_many_files_and_gives_way(root, live, monkeypatch):
  """Each file leaves some kilobytes in it: of 2,000 reads the process kept 12 MB, of 200 it does
  not grow.
  """
  made, connect = [], duckdb.connect
  write(root, range(3))
  monkeypatch.setattr("nmoe.records.live.RENEWED", 3)
  monkeypatch.setattr(duckdb, "connect", lambda *a, **k: made.append(a) or connect(*a, **k))
  for n in range(10):
    assert live.file(RUN).expert_names() == [] and len(made) == n // 3 + 1


@pytest.mark.parametrize("again", [range(3, 4), range(3, 9), range(3, 20)])
def test_a_rewind_is_seen_whether_fewer_or_more_rows_follow(root, live, again):
  """As a resumed run does: rows after a checkpoint are deleted, and logged anew."""
  write(root, range(9))
  file = live.file(RUN)
  assert values(file) == list(range(9))
  Metrics(root, RUN).rewind(2)
  write(root, again, scale=7.0)
  assert values(file) == [0, 1, 2, *(7.0 * step for step in again)]


def test_a_new_process_begins_with_what_the_last_one_kept(root, live, tmp_path):
  write(root, range(50))
  assert len(values(live.file(RUN))) == 50
  write(root, range(50, 53))
  later = Live(root, tmp_path / "cache").file(RUN)
  later._remember()
  before = [rows.step.size for tag, rows in later._series.items() if tag == "loss"]
  assert before == [50] and values(later) == list(range(53))


def test_a_new_process_opens_no_file_that_is_as_it_was_kept(root, live, tmp_path, monkeypatch):
  write(root, range(50))
  values(live.file(RUN))
  monkeypatch.setattr(Opener, "opened", lambda self, path: pytest.fail("opened"))
  file = Live(root, tmp_path / "cache").file(RUN)
  assert values(file) == list(range(50)) and file.tags() == ["loss", "lr"]


def test_rows_kept_beside_a_locked_file_are_shown_once(root, live):
  """A trainer whose file is held logs on beside it; after a kill both may hold the same rows."""
  write(root, range(3))
  file = live.file(RUN)
  assert values(file) == [0, 1, 2]
  path = Root(root).metrics(RUN, 0)
  holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == "open\n"
    writer = Metrics(root, RUN)
    writer.add(3, 30, {"loss": 3.0, "late": 1.0})
    writer.flush()
    assert values(file) == [0, 1, 2, 3] and "locked" in file.trouble
    assert file.tags() == ["late", "loss", "lr"]
  finally:
    holder.kill()
    holder.wait()
  beside = path.with_suffix(".rows")
  kept = beside.read_bytes()
  assert values(file) == [0, 1, 2, 3] and file.trouble == ""
  writer.add(4, 40, {"loss": 4.0})
  writer.flush()
  assert not beside.exists() and values(file) == [0, 1, 2, 3, 4]
  beside.write_bytes(kept)
  assert values(file) == [0, 1, 2, 3, 4]
  beside.write_text("{")
  assert values(file) == [0, 1, 2, 3, 4] and ".rows: cannot be read" in file.trouble


def test_a_kept_file_of_another_file_or_of_none_is_not_believed(root, live, tmp_path):
  write(root, range(50))
  values(live.file(RUN))
  Root(root).metrics(RUN, 0).unlink()
  assert values(Live(root, tmp_path / "cache").file(RUN)) == []
  write(root, range(4), scale=3.0)
  assert values(Live(root, tmp_path / "cache").file(RUN)) == [0, 3, 6, 9]
  (kept,) = (tmp_path / "cache").rglob("*.npz")
  kept.write_bytes(b"PK\x03\x04 half a file")
  assert values(Live(root, tmp_path / "cache").file(RUN)) == [0, 3, 6, 9]


def test_a_corrupt_file_says_so_and_others_are_read(root, live):
  write(root, range(3))
  write(root, range(4), run="other")
  path = Root(root).metrics(RUN, 0)
  path.write_bytes(path.read_bytes()[:5000])
  file = live.file(RUN)
  assert values(file) == [] and "rank_0.duckdb cannot be read" in file.trouble
  assert values(live.file("other")) == [0, 1, 2, 3]
  path.unlink()
  write(root, range(2))
  assert values(file) == [0, 1] and file.trouble == ""


def test_blocks_that_are_corrupt_spoil_one_file_alone(root, live):
  write(root, range(20_000))
  write(root, range(4), run="other")
  path = Root(root).metrics(RUN, 0)
  whole = path.read_bytes()
  for at in range(12_288, len(whole), 65_536):  # behind the headers
    path.write_bytes(whole[:at] + bytes(len(whole[at : at + 30_000])) + whole[at + 30_000 :])
    file = Live(root, live.cache).file(RUN)
    assert values(file) in ([], list(range(20_000)))
    assert "cannot be read" in file.trouble or len(values(file))
    assert values(live.file("other")) == [0, 1, 2, 3]
  path.write_bytes(whole)
  assert len(values(live.file(RUN))) == 20_000


def test_a_file_of_any_name_is_read(tmp_path):
  root = tmp_path / "it's a root; 100 %"
  write(root, range(3))
  assert values(Live(root, tmp_path / "cache").file(RUN)) == [0, 1, 2]


def test_a_file_that_disappears_is_gone(root, live):
  write(root, range(3))
  file = live.file(RUN)
  values(file)
  Root(root).metrics(RUN, 0).unlink()
  assert values(file) == [] and "gone" in file.trouble


HOLD = """
import duckdb, sys, time
db = duckdb.connect(sys.argv[1])
print("open", flush=True)
time.sleep(60)
"""


def test_a_locked_file_keeps_what_was_read_and_is_tried_again(root, live):
  write(root, range(3))
  file = live.file(RUN)
  assert values(file) == [0, 1, 2]
  write(root, range(3, 5))
  path = Root(root).metrics(RUN, 0)
  holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == "open\n"
    assert values(file) == [0, 1, 2] and "locked" in file.trouble
  finally:
    holder.kill()
    holder.wait()
  assert values(file) == [0, 1, 2, 3, 4] and file.trouble == ""


def test_what_a_killed_writer_committed_is_read_and_nothing_is_written(root, live):
  write(root, range(3))
  path = Root(root).metrics(RUN, 0)
  assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -signal.SIGKILL
  assert Path(f"{path}.wal").exists()
  before = tree_hash(root)
  assert values(live.file(RUN)) == [0, 1, 2, 3]
  assert tree_hash(root) == before


def test_a_whole_session_writes_nothing_below_the_root(root, live):
  ids = with_runs(root, 2)
  for run in ids:
    write(root, range(5), run=run)
  before = tree_hash(root)
  assert [run.id for run in live.snapshot().runs] == ids
  for run in ids:
    file = live.file(run)
    assert values(file) == [0, 1, 2, 3, 4] and live.ranks(run) == [0]
    assert file.experts(0, "count", 100) is None and live.log_tail(run) == ""
  assert live.stamps([*ids, "none"])["none"] == 0
  assert tree_hash(root) == before


def test_the_records_are_read_again_only_when_they_changed(root, live, monkeypatch):
  (run,) = with_runs(root, 1)
  first = live.snapshot()
  assert first.run(run).diff == "" and first.run("other") is None
  assert live.snapshot() is first
  records = Experiments(root)
  records.claim(run)
  assert live.snapshot().run(run).status == "running"
  records.close()
  assert live.snapshot().run(run).status == "running"
  monkeypatch.setattr("nmoe.records.live.LIVENESS_S", 0.0)
  assert live.snapshot().run(run).status == "interrupted", "its owner let go of the lock"


def test_a_hot_journal_is_recovered_in_a_copy(root, live):
  """The killed writer's half a transaction is undone there; the root waits for a writer."""
  ids = with_runs(root, 30)
  path = Root(root).experiments_db
  assert subprocess.run([sys.executable, "-c", SPILLED, path]).returncode == -signal.SIGKILL
  with pytest.raises(sqlite3.OperationalError, match="readonly"):
    sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True).execute("SELECT * FROM runs").fetchall()
  before = tree_hash(root)
  seen = live.snapshot()
  assert [run.id for run in seen.runs] == ids and {run.error for run in seen.runs} == {""}
  assert "awaits recovery" in seen.notice and tree_hash(root) == before


def test_records_that_cannot_be_read_stay_as_they_were(root, live):
  ids = with_runs(root, 1)
  assert live.snapshot().notice == ""
  Root(root).experiments_db.write_bytes(b"not a database, and long enough to be looked at" * 9)
  seen = live.snapshot()
  assert [run.id for run in seen.runs] == ids and "corrupt" in seen.notice


def test_a_root_without_records_says_so(live):
  assert live.snapshot().experiments == () and "no records" in live.snapshot().notice


def test_loads_are_thinned_to_columns_and_keep_the_last(root, live):
  write(root, range(1))
  counts = {step: [step, 2 * step, 3 * step] for step in range(1, 101)}
  with duckdb.connect(str(Root(root).metrics(RUN, 0))) as db:
    db.execute("CREATE TABLE IF NOT EXISTS loads (step BIGINT, layer INTEGER, count UINTEGER[])")
    rows = [(step, layer, count) for step, count in counts.items() for layer in (0, 1)]
    db.executemany("INSERT INTO loads VALUES (?, ?, ?)", rows)
  steps, found = live.file(RUN).experts(1, "count", 30)
  assert len(steps) <= 30 and steps[-1] == 100 and set(np.diff(steps)) == {4}
  np.testing.assert_array_equal(found, [counts[step] for step in steps])
  assert len(live.file(RUN).experts(0, "count", 1000)[0]) == 100
  assert live.file(RUN).experts(2, "count", 30) is None


WRITER = """
import sys, time
from nmoe.records.metrics import Metrics
writer, worst = Metrics(sys.argv[1], sys.argv[2]), 0.0
end, step = time.monotonic() + float(sys.argv[3]), 0
while time.monotonic() < end:
  step += 1
  writer.add(step, step * 10, {f"tag/{i}": float(step) for i in range(100)} | {"loss": step})
  began = time.monotonic()
  writer.flush()
  worst = max(worst, time.monotonic() - began)
  time.sleep(0.05)
print(step, worst)
"""


def test_a_writer_beside_readers_never_fails_and_its_lines_appear(root, live):
  """Three readers, as eager as can be, against a trainer that flushes twenty times a second."""
  command = [sys.executable, "-c", WRITER, root, RUN, "6"]
  writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
  done, ages = threading.Event(), []

  def watch(cache: str):
    file = Live(root, root.parent / cache).file(RUN)
    seen = 0
    while not done.is_set():
      rows = file.read(["loss"]).get("loss")
      if rows is not None and rows.step.size != seen:
        assert rows.value.tolist() == list(range(1, rows.step.size + 1)), "whole, in order"
        seen = rows.step.size
        ages.append(time.time() - rows.time[-1])
      time.sleep(0.1)

  watchers = [threading.Thread(target=watch, args=(f"cache{i}",)) for i in range(3)]
  for watcher in watchers:
    watcher.start()
  out, _ = writer.communicate(timeout=120)
  done.set()
  for watcher in watchers:
    watcher.join()
  steps, worst = out.split()
  assert writer.returncode == 0 and float(worst) < 5.0, f"worst flush {worst} s"
  assert values(live.file(RUN)) == list(range(1, int(steps) + 1))
  assert len(ages) > 6 and sorted(ages)[len(ages) // 2] < 2.0
