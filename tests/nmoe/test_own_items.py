"""Evaluation items of one's own, with the mistakes that people make in them."""

from __future__ import annotations

import json

import pytest

from nmoe.errors import DataError
from nmoe.evals.requests import read_manifest, read_task
from nmoe.evals.sources import prepare

pytestmark = pytest.mark.faults
ITEM = {"task": "t", "context": "c", "choices": [" a", " b"], "gold": 0}


def text_of(*lines, **options):
  """The item with these changes, a line each."""
  return "".join(json.dumps(ITEM | line, **options) + "\n" for line in lines)


def without(key):
  return json.dumps({k: v for k, v in ITEM.items() if k != key}) + "\n"


MISTAKES = {  # text, and what is said of it behind the file's name
  "gold behind the last": (text_of({}, {"gold": 2}), "line 2: gold 2 of 2 answers; it is .* place"),
  "gold before the first": (text_of({"gold": -1}), "line 1: gold -1 of 2 answers"),
  "gold as a float": (text_of({"gold": 0.0}), "line 1: gold 0.0 of 2 answers"),
  "gold null": (text_of({"gold": None}), "line 1: gold None"),
  "an empty answer": (text_of({"choices": [" a", ""]}), "line 1: answer 1 is empty"),
  "no choice": (text_of({"choices": []}), "line 1: gold 0 of 0 answers"),
  "contexts too few": (text_of({"context": ["x"]}), "line 1: 1 context of 2 answers; name one"),
  "no context": (without("context"), "line 1: has no 'context'; a line is .*choices"),
  "no gold": (without("gold"), "line 1: has no 'gold'"),
  "a list of items": (json.dumps([ITEM]), "line 1: .* is no table; a line is"),
  "no JSON": ("task, context\n", "line 1: Expecting value"),
  "null": ("null\n", "line 1: null is no table"),
  "an indented table": (json.dumps(ITEM, indent=1), "line 1: Expecting property name"),
  "choices null": (text_of({"choices": None}), "line 1: choices None must be a list"),
  "choices as numbers": (text_of({"choices": [1, 2]}), "line 1: 1 must be a string"),
  "context null": (text_of({"context": None}), "line 1: None must be a string"),
  "a name in a list": (text_of({"name": [1]}), "line 1: name .1. must be a string"),
  "a key of others": (
    text_of({"label": 0}),
    "line 1: unknown key 'label'; a line is .*task.*context.*choices.*gold.*name",
  ),
  "keys of others": (
    text_of({}, {"context": "d", "id": 1, "Gold": 0}),
    "line 2: unknown keys 'Gold', 'id'; ",
  ),
  "a key that is none of a line": (text_of({"shots": 3}), "line 1: unknown key 'shots'; "),
  "a key twice": (
    text_of({}).replace('"gold": 0', '"gold": 0, "gold": 1'),
    "line 1: key 'gold' stands there twice",
  ),
  "an item twice": (
    text_of({}, {"context": "d"}, {}),
    "line 3: the question and answers of line 1; delete one: an item counts once",
  ),
  "an item twice by two names": (
    text_of({"name": "x"}, {"name": "y"}),
    "line 2: the question and answers of line 1",
  ),
  "an item twice, its context spelt out": (
    text_of({}, {"context": ["c", "c"]}),
    "line 2: the question and answers of line 1",
  ),
  "an item twice with two answers": (
    text_of({}, {"gold": 1}),
    "line 2: the question and answers of line 1, whose gold is 0, not 1; delete one",
  ),
  "two of one name": (
    text_of({"name": "x"}, {"name": "x", "context": "d"}),
    "line 2: name 'x' is of line 1 too; give each its own",
  ),
  "a number and its digits": (
    text_of({"name": 1}, {"name": "1", "context": "d"}),
    "line 2: name '1' is of line 1 too",
  ),
  "a name like a line": (
    text_of({}, {"name": "1", "context": "d"}),
    "line 2: name '1' is of line 1 too; .* number",
  ),
  "a suite's name": (text_of({"task": "quick"}), "line 1: task 'quick' has the name of a suite"),
}
OF_TASKS = {  # several lines that do not go together
  "one answer among several": (
    text_of({"name": "q"}, {"choices": [" a"]}),
    "task t: document 2 has one answer, q has several; .* make two tasks of them",
  ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_line(tmp_path, name):
  text, message = MISTAKES[name]
  path = tmp_path / "items.jsonl"
  path.write_text(text, encoding="utf-8")
  with pytest.raises(DataError, match=f"items.jsonl, {message}"):
    prepare(path, tmp_path / "root")
  assert list(tmp_path.rglob("*")) == [path]


@pytest.mark.parametrize("name", OF_TASKS)
def test_lines_that_do_not_go_together_are_named(tmp_path, name):
  text, message = OF_TASKS[name]
  path = tmp_path / "items.jsonl"
  path.write_text(text, encoding="utf-8")
  with pytest.raises(DataError, match=message):
    prepare(path, tmp_path / "root")
  assert not list(tmp_path.glob("root/evals/*"))


OTHER = {"context": "d"}
SPELLINGS = {
  "CRLF": text_of({}, OTHER).replace("\n", "\r\n"),
  "a byte order mark": "\ufeff" + text_of({}, OTHER),
  "blank lines between": text_of({}, OTHER | {"name": "2"}).replace("\n", "\n \t\n\n"),
  "no end of line": text_of({}, OTHER).rstrip(),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_lines_are_the_same_items(tmp_path, name):
  found = []
  for i, text in enumerate((text_of({}, OTHER), SPELLINGS[name])):
    path = tmp_path / f"{i}.jsonl"
    path.write_bytes(text.encode())
    found.append(read_task(prepare(path, tmp_path / "root"), "t", 0))
  assert found[0] == found[1] and len(found[0]) == 2


def test_the_same_question_may_be_of_two_tasks_or_have_other_answers(tmp_path):
  path = tmp_path / "items.jsonl"
  path.write_text(
    text_of({}, {"task": "u"}, {"choices": [" b", " a"]}, {"choices": [" a", " b", " c"]})
  )
  folder = prepare(path, tmp_path / "root")
  assert [len(read_task(folder, task, 0)) for task in "tu"] == [3, 1]


def test_any_text_is_kept_as_it_is(tmp_path):
  """Blanks alone, marks that combine, right to left, zero, what a tokenizer calls special."""
  choices = [" ", "ﷺ", "👨‍👩‍👧", "e\u0301", "é", "\0", "<|endoftext|>"]
  path = tmp_path / "items.jsonl"
  path.write_text(text_of({"choices": choices, "gold": 6, "context": ""}, ensure_ascii=False))
  folder = prepare(path, tmp_path / "root")
  (document,) = read_task(folder, "t", 0)
  assert document.answers == tuple(choices) and document.contexts == ("",) * 7
  assert read_manifest(folder)["tasks"]["t"]["chance"] == 1 / 7
