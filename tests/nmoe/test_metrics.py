"""The metrics store: what is added is read, once, whatever happens to the writer."""

import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import RecordError
from nmoe.records import metrics
from nmoe.records.metrics import Metrics, read
from nmoe.records.root import Root

REPO = Path(__file__).resolve().parents[2]
RUN = "20261123-142233-ab12"


def child(code):
  return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPO)


values = st.floats(width=64)
rows = st.lists(
  st.dictionaries(st.sampled_from(["train/loss", "moe/0/dead", "ü"]), values, min_size=1),
  max_size=12,
)


@settings(max_examples=20, deadline=None)
@given(rows, st.integers(1, 7))
def test_every_value_is_read_back_in_step_order(tmp_path_factory, rows, batch):
  root = tmp_path_factory.mktemp("root")
  writer = Metrics(root, RUN, batch=batch)
  for step, row in enumerate(rows):
    writer.add(step, step * 10, row)
  writer.flush()
  found = read(root, RUN)
  for tag in {tag for row in rows for tag in row}:
    steps, tokens, got = found.pop(tag)
    wanted = [(step, row[tag]) for step, row in enumerate(rows) if tag in row]
    np.testing.assert_array_equal(steps, [step for step, _ in wanted])
    np.testing.assert_array_equal(tokens, [step * 10 for step, _ in wanted])
    np.testing.assert_array_equal(got, [value for _, value in wanted])
  assert found == {}


def test_tags_select_and_missing_ones_are_absent(tmp_path):
  assert read(tmp_path, RUN) == {}
  writer = Metrics(tmp_path, RUN)
  writer.add(1, 10, {"a": 1.0, "b": math.nan, "c": -math.inf})
  writer.flush()
  found = read(tmp_path, RUN, ["b", "c", "z"])
  assert set(found) == {"b", "c"} and math.isnan(found["b"][2][0])
  assert read(tmp_path, RUN, []) == {} and read(tmp_path, RUN, rank=1) == {}


def eventually(true, seconds=10.0):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "not within its time"
    time.sleep(0.01)


def test_nothing_is_written_before_the_batch_is_full(tmp_path):
  writer = Metrics(tmp_path, RUN, batch=4)
  writer.add(1, 10, {"a": 1.0, "b": 2.0, "c": 3.0})
  time.sleep(0.2)
  assert not writer.path.exists()
  writer.add(2, 20, {"a": 1.0})
  eventually(lambda: len(read(tmp_path, RUN).get("a", [()])[0]) == 2)


def test_a_run_does_not_wait_for_its_metrics(tmp_path, monkeypatch):
  """Steps go on while a batch is written; theirs come after it, each row once."""
  entered, go, write = threading.Event(), threading.Event(), Metrics._append

  def slow(self, *args):
    entered.set()
    assert go.wait(10)
    write(self, *args)

  monkeypatch.setattr(Metrics, "_append", slow)
  writer = Metrics(tmp_path, RUN, batch=2)
  for step in range(1, 8):
    writer.add(step, step, {"a": float(step)})
    writer.add_loads(step, np.ones((1, 2)))
  assert entered.wait(10) and not writer.path.exists(), "seven steps, and the first two are held"
  go.set()
  writer.flush()
  assert read(tmp_path, RUN)["a"][0].tolist() == list(range(1, 8))
  with duckdb.connect(str(writer.path), read_only=True) as db:
    assert db.execute("SELECT step FROM loads").fetchnumpy()["step"].tolist() == list(range(1, 8))


def test_rows_that_could_not_be_written_beside_the_run_are_told_and_kept(tmp_path):
  (tmp_path / "metrics").write_text("a file in the way")
  writer = Metrics(tmp_path, RUN, batch=2)
  writer.add(1, 1, {"a": 1.0})
  writer.add(2, 2, {"a": 2.0})
  eventually(writer._writing.done.done)
  with pytest.raises(RecordError, match="cannot be created"):
    writer.add(3, 3, {"a": 3.0})
  (tmp_path / "metrics").unlink()
  writer.add(4, 4, {"a": 4.0})
  writer.flush()
  assert read(tmp_path, RUN)["a"][0].tolist() == [1, 2, 3, 4]


def test_a_resumed_run_logs_each_row_once(tmp_path):
  writer = Metrics(tmp_path, RUN)
  for step in range(1, 8):
    writer.add(step, step, {"loss": float(step)})
    if step == 5:
      writer.flush()
  writer.rewind(3)
  writer.flush()
  resumed = Metrics(tmp_path, RUN)
  resumed.rewind(3)
  for step in range(4, 8):
    resumed.add(step, step, {"loss": float(step)})
  resumed.flush()
  assert read(tmp_path, RUN)["loss"][0].tolist() == [1, 2, 3, 4, 5, 6, 7]
  Metrics(tmp_path, "another").rewind(0)


def test_a_writer_killed_between_flushes_loses_only_what_it_held(tmp_path):
  writer = child(
    f"""
from nmoe.records.metrics import Metrics
import time
m = Metrics({str(tmp_path)!r}, {RUN!r})
m.add(1, 10, {{"a": 1.0, "b": 2.0}})
m.flush()
m.add(2, 20, {{"a": 3.0}})
print("up", flush=True)
time.sleep(60)
"""
  )
  assert writer.stdout.readline() == "up\n"
  writer.kill()
  writer.communicate()
  assert read(tmp_path, RUN)["a"][0].tolist() == [1]


def test_a_writer_killed_at_any_moment_leaves_whole_batches(tmp_path):
  code = f"""
from nmoe.records.metrics import Metrics
m = Metrics({str(tmp_path)!r}, {RUN!r}, batch=10**9)
print("up", flush=True)
step = STEP
while True:
  step += 1
  m.add(step, step, {{f"tag/{{i}}": float(i) for i in range(100)}})
  m.flush()
"""
  last = 0
  for delay in (0.0, 0.03, 0.11, 0.2, 0.37):
    writer = child(code.replace("STEP", str(last)))
    assert writer.stdout.readline() == "up\n"
    time.sleep(delay)
    writer.kill()
    writer.communicate()
    found = read(tmp_path, RUN)
    if found:
      steps = found["tag/0"][0]
      assert len(found) == 100 and all(len(series[0]) == len(steps) for series in found.values())
      assert steps.tolist() == list(range(1, steps[-1] + 1)), "no batch is torn, lost or doubled"
      last = int(steps[-1])
  assert last > 0


def test_a_live_run_is_read_while_it_is_written(tmp_path):
  writer = child(
    f"""
from nmoe.records.metrics import Metrics
m = Metrics({str(tmp_path)!r}, {RUN!r}, batch=10**9)
print("up", flush=True)
for step in range(1, 41):
  m.add(step, step, {{"a": 1.0}})
  m.flush()
"""
  )
  assert writer.stdout.readline() == "up\n"
  lengths = []
  while writer.poll() is None:
    lengths.append(len(read(tmp_path, RUN).get("a", [[]])[0]))
  assert writer.returncode == 0 and lengths == sorted(lengths)
  assert len(read(tmp_path, RUN)["a"][0]) == 40


def holding(path: Path) -> subprocess.Popen:
  """Another process that has the file open, until it is killed."""
  holder = child(
    f"import duckdb, time; c = duckdb.connect({str(path)!r})\n"
    "print('up', flush=True); time.sleep(60)"
  )
  assert holder.stdout.readline() == "up\n"
  return holder


def test_a_file_locked_by_another_process(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, "LOCK_TIMEOUT_S", 0.3)
  writer = Metrics(tmp_path, RUN)
  writer.add(1, 10, {"a": 1.0})
  writer.flush()
  holder = holding(writer.path)
  writer.add(2, 20, {"a": 2.0})
  for attempt in (writer.read, lambda: read(tmp_path, RUN)):
    with pytest.raises(RecordError, match=r"rank_0\.duckdb: .*stayed locked"):
      attempt()
  holder.kill()
  holder.communicate()
  writer.flush()
  assert read(tmp_path, RUN)["a"][2].tolist() == [1.0, 2.0], "the rows were kept"


def test_a_reader_counts_rows_kept_beside_a_locked_file_in(tmp_path):
  writer = Metrics(tmp_path, RUN)
  writer.add(1, 10, {"a": 1.0})
  writer.flush()
  holder = holding(writer.path)
  writer.add(2, 20, {"a": float("nan"), "b": 2.0})
  writer.flush()
  assert writer.beside.exists()
  kept = writer.beside.read_bytes()
  holder.kill()
  holder.communicate()
  found = read(tmp_path, RUN)  # as of a run that died before its next flush
  np.testing.assert_array_equal(found["a"][2], [1.0, float("nan")])
  assert read(tmp_path, RUN, ["b"])["b"][0].tolist() == [2] and list(found) == ["a", "b"]
  writer.flush()
  writer.beside.write_bytes(kept)  # as of one killed between the file and the unlink
  again = read(tmp_path, RUN)
  assert [len(series[0]) for series in again.values()] == [2, 1], "no row twice"


def test_a_corrupt_file(tmp_path):
  writer = Metrics(tmp_path, RUN)
  writer.path.parent.mkdir(parents=True)
  writer.path.write_bytes(b"garbage" * 1000)
  with pytest.raises(RecordError, match="the file is corrupt: move it away"):
    read(tmp_path, RUN)
  writer.add(1, 1, {"a": 1.0})
  with pytest.raises(RecordError, match="the file is corrupt"):
    writer.flush()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "metrics").write_text("a file in the way")
  writer = Metrics(tmp_path, RUN)
  writer.add(1, 1, {"a": 1.0})
  with pytest.raises(RecordError, match=r"cannot be created \(Not a directory\)|File exists"):
    writer.flush()


def test_the_file_is_plain_duckdb(tmp_path):
  writer = Metrics(tmp_path, RUN)
  writer.add(7, 70, {"a": 1.5})
  writer.flush()
  with duckdb.connect(str(writer.path), read_only=True) as db:
    row = db.execute("SELECT step, tokens, tag, value FROM metrics").fetchall()
  assert row == [(7, 70, "a", 1.5)]


def loads_of(root):
  with duckdb.connect(str(Root(root).metrics(RUN, 0)), read_only=True) as db:
    return db.execute("SELECT step, layer, count FROM loads ORDER BY step, layer").fetchall()


def test_loads_of_every_expert_are_kept_with_their_metrics_and_rewound(tmp_path):
  noise = np.random.default_rng(0)
  writer = Metrics(tmp_path, RUN)
  counts = {step: noise.integers(0, 9999, (3, 5)) for step in range(1, 7)}
  for step, count_LE in counts.items():
    writer.add(step, step, {"a": 1.0})
    writer.add_loads(step, count_LE)
    if step in (2, 4):
      writer.flush()
  assert writer.rewind(5) == 1 and writer.rewind(6) == 0
  writer.flush()
  wanted = [
    (s, layer, c[layer].tolist()) for s, c in counts.items() for layer in range(3) if s <= 5
  ]
  assert loads_of(tmp_path) == wanted
  writer.rewind(3)
  assert loads_of(tmp_path) == [row for row in wanted if row[0] <= 3]


def test_loads_outlive_rows_of_their_step_that_come_later(tmp_path):
  """The loads of step 1 are in the file; then a row of step 1 waits beside it for another."""
  writer = Metrics(tmp_path, RUN)
  writer.add(1, 10, {"a": 1.0})
  writer.add_loads(1, np.array([[3, 4]]))
  writer.flush()
  holder = holding(writer.path)
  writer.add(1, 10, {"b": 2.0})
  writer.flush()
  assert writer.beside.exists()
  holder.kill()
  holder.communicate()
  writer.flush()
  assert loads_of(tmp_path) == [(1, 0, [3, 4])]


def test_loads_that_a_killed_flush_left_in_both_places_are_there_once(tmp_path):
  writer = Metrics(tmp_path, RUN)
  writer.add(1, 10, {"a": 1.0})
  writer.flush()
  writer.add_loads(1, np.array([[3, 4]]))
  writer.add(2, 20, {"a": 2.0})
  writer.add_loads(2, np.array([[5, 6]]))
  holder = holding(writer.path)
  writer.flush()
  kept = writer.beside.read_bytes()
  holder.kill()
  holder.communicate()
  writer.flush()
  writer.beside.write_bytes(kept)
  writer.flush()
  assert loads_of(tmp_path) == [(1, 0, [3, 4]), (2, 0, [5, 6])]


def test_loads_join_a_file_that_has_no_table_for_them(tmp_path):
  writer = Metrics(tmp_path, RUN)
  writer.add(1, 1, {"a": 1.0})
  writer.flush()
  with duckdb.connect(str(writer.path)) as db:
    db.execute("DROP TABLE loads")
  writer.add(2, 2, {"a": 1.0})
  writer.add_loads(2, np.array([[3, 4]]))
  writer.flush()
  assert loads_of(tmp_path) == [(2, 0, [3, 4])] and len(read(tmp_path, RUN)["a"][0]) == 2
