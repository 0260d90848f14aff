"""The metrics of a run: who looks at them, and a full disk, cost the run nothing that it logged."""

import subprocess
import sys
import time
from contextlib import contextmanager

import duckdb
import pytest

from nmoe.errors import RecordError
from nmoe.records import metrics
from nmoe.records.metrics import Metrics, read

pytestmark = pytest.mark.faults
HOLD = """
import duckdb, sys, time
held = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "reader")
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(metrics, "LOCK_TIMEOUT_S", 0.2)
  monkeypatch.setattr(metrics, "TRY_S", 0.05)


@contextmanager
def held(path, kind="reader"):
  command = [sys.executable, "-c", HOLD, str(path), kind]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
    assert holder.stdout.readline() == "open\n"
    yield
    holder.kill()


def logged(tmp_path, *steps):
  writer = Metrics(tmp_path, "r")
  for step in steps:
    writer.add(step, step, {"a": float(step)})
  return writer


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_an_onlooker_does_not_end_a_run(tmp_path, kind, capsys):
  writer = logged(tmp_path, 1)
  writer.flush()
  with held(writer.path, kind):
    for step in (2, 3):
      writer.add(step, step, {"a": float(step)})
      writer.flush()
    told = capsys.readouterr().err
    assert told.count("locked") == 1 and str(writer.path) in told, "said once"
    with pytest.raises(RecordError, match="locked"):
      writer.read()
  assert writer.read()["a"][2].tolist() == [1.0, 2.0, 3.0]


def test_rows_behind_a_checkpoint_survive_a_kill_under_an_onlooker(tmp_path):
  """A flush that could not write leaves its rows beside, and the next writer takes them up."""
  writer = logged(tmp_path, 1)
  writer.flush()
  with held(writer.path):
    writer.add(2, 2, {"a": 2.0, "b": float("inf")})
    writer.flush()
  resumed = Metrics(tmp_path, "r")
  resumed.rewind(2)
  resumed.add(3, 3, {"a": 3.0})
  assert resumed.read()["a"][2].tolist() == [1.0, 2.0, 3.0]
  assert resumed.read()["b"][2].tolist() == [float("inf")]
  assert [p.name for p in resumed.path.parent.iterdir()] == ["rank_0.duckdb"]


def test_rewind_forgets_what_was_kept_beside_too(tmp_path):
  writer = logged(tmp_path, 1)
  writer.flush()
  with held(writer.path):
    writer.add(2, 2, {"a": 2.0})
    writer.add(3, 3, {"a": 3.0})
    writer.flush()
  resumed = Metrics(tmp_path, "r")
  resumed.rewind(2)
  assert resumed.read()["a"][0].tolist() == [1, 2]


def test_a_kill_between_the_write_and_the_tidying_doubles_nothing(tmp_path, monkeypatch):
  writer = logged(tmp_path, 1)
  writer.flush()
  with held(writer.path):
    writer.add(2, 2, {"a": 2.0})
    writer.flush()
  beside = writer.beside.read_bytes()
  writer.flush()
  writer.beside.write_bytes(beside)
  assert Metrics(tmp_path, "r").read()["a"][0].tolist() == [1, 2]


def test_a_live_run_can_be_watched(tmp_path, monkeypatch):
  """What is logged is on disk within FLUSH_S, however large a batch is."""
  now = [1000.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  assert metrics.FLUSH_S <= 5
  writer = logged(tmp_path, 1)
  now[0] += metrics.FLUSH_S
  writer.add(2, 2, {"a": 2.0})
  writer._writing.done.result(10)
  assert read(tmp_path, "r")["a"][0].tolist() == [1, 2]
  writer.add(3, 3, {"a": 3.0})
  assert writer._writing is None
  assert read(tmp_path, "r")["a"][0].tolist() == [1, 2]


FULL = """
import resource, sys
from nmoe.errors import RecordError
from nmoe.records.metrics import Metrics
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
m = Metrics(sys.argv[1], "r")
m.add(1, 1, {"a": 1.0})
try:
  m.read()
except RecordError as error:
  print(error)
"""


@pytest.mark.parametrize("limit", [100, 4096, 8192, 12288, 20000, 100_000, 262_144])
def test_a_disk_full_while_the_file_is_made_leaves_a_run_that_goes_on(tmp_path, limit):
  command = [sys.executable, "-c", FULL, str(tmp_path), str(limit)]
  subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
  writer = Metrics(tmp_path, "r")
  writer.rewind(0)
  writer.add(1, 1, {"a": 1.0})
  assert writer.read()["a"][2].tolist() == [1.0]


def test_a_file_without_the_table_is_filled(tmp_path):
  """What an earlier version left when the disk was full."""
  writer = Metrics(tmp_path, "r")
  writer.path.parent.mkdir(parents=True)
  duckdb.connect(str(writer.path)).close()
  assert read(tmp_path, "r") == {}
  writer.rewind(0)
  writer.add(1, 1, {"a": 1.0})
  assert writer.read()["a"][0].tolist() == [1]


def test_waiting_for_an_onlooker_is_short_in_the_loop(tmp_path):
  writer = logged(tmp_path, 1)
  writer.flush()
  with held(writer.path):
    writer.add(2, 2, {"a": 2.0})
    begun = time.perf_counter()
    writer.flush()
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(
  "made",
  [
    "CREATE TABLE metrics (x INTEGER)",
    "CREATE TABLE metrics (step VARCHAR, tokens VARCHAR, tag INTEGER, value VARCHAR, time VARCHAR)",
    "CREATE VIEW metrics AS SELECT 1 AS step",
  ],
)
def test_a_file_of_another_program_is_said_to_be_one(tmp_path, made):
  """Not that space is short; and it stays as it is."""
  metrics = Metrics(tmp_path, "run")
  metrics.path.parent.mkdir(parents=True)
  with duckdb.connect(str(metrics.path)) as db:
    db.execute(made)
  before = metrics.path.read_bytes()
  metrics.add(1, 1, {"a": 1.0})
  with pytest.raises(RecordError, match="the file is another program's: move it away"):
    metrics.read()
  assert metrics.path.read_bytes() == before


@pytest.mark.parametrize("rows", ["", "[" * 100_000, '{"rows": [["x", 1, "a", 1.0, 1.0]]}', "{}"])
def test_rows_beside_that_are_none_are_named(tmp_path, rows):
  kept = Metrics(tmp_path, "r")
  kept.add(1, 1, {"a": 1.0})
  kept.flush()
  kept.beside.write_text(rows.replace("}", ', "loads": []}') if len(rows) > 2 else rows)
  for use in (lambda: kept.rewind(1), lambda: read(tmp_path, "r"), kept.flush):
    with pytest.raises(RecordError, match=r"rank_0\.rows: cannot be read .*move it away"):
      use()
