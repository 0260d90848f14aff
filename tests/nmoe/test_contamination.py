"""Items in the training data: against plain Python's sets of words, and planted in a mixture."""

from __future__ import annotations

import json
import random
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nmoe.data.mixture import load_mixture
from nmoe.data.prepare import prepare
from nmoe.data.shards import Stream
from nmoe.data.tokenizer import get
from nmoe.errors import DataError
from nmoe.evals import contamination
from nmoe.evals.contamination import OVERLAP, N, ngrams, pieces, texts_of
from nmoe.evals.requests import Document
from stages import evals

WORDS = "the cat sat on a mat while seven dogs sang of rain and gold it is so".split()


def by_hand(text: str) -> list[tuple[str, ...]]:
  """13 words in a row of each part between zero bytes."""
  found = []
  for part in text.split("\0"):
    words = re.findall(r"(?:[a-z0-9]|[^\x00-\x7f\u2000-\u203f])+", part.lower())
    found += [tuple(words[i : i + N]) for i in range(len(words) - N + 1)]
  return found


texts = st.lists(
  st.sampled_from([*WORDS[:4], "Cat", "é", "9", " ", ", ", " — ", "’", "\0", "\n"]), max_size=120
).map("".join)


@settings(max_examples=300)
@given(texts, texts)
def test_hashes_are_equal_where_words_are(a, b):
  """As many as there are, in their order; two texts share hashes where they share words."""
  mine, wanted = ngrams(a.encode()), by_hand(a)
  assert len(mine) == len(wanted)
  assert len(set(mine.tolist())) == len(set(wanted))
  shared = set(wanted) & set(by_hand(b))
  assert len(np.intersect1d(mine, ngrams(b.encode()))) == len(shared)


def sentence(chance, count):
  return " ".join(chance.choices(WORDS, k=count))


def mixture(folder, texts):
  (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  source = '[[source]]\nname = "t"\nkind = "files"\npaths = ["text.jsonl"]\nformat = "jsonl"\n'
  (folder / "mixture.toml").write_text("[mixture]\nholdout = 1e-9\n" + source)
  return folder / "mixture.toml"


def questions(count=20):
  chance = random.Random(2)
  shots = sentence(chance, 20) + "\n\n"
  return [
    Document(str(i), (shots + sentence(chance, 14 if i else 3),), (f" answer {i}",), 0, len(shots))
    for i in range(count)
  ]


@pytest.mark.parametrize("name", ["byte", "o200k_harmony"])
def test_planted_items_are_found_and_no_others(tmp_path, name):
  """Whatever their case and signs; neither the examples of a prompt nor words of two documents."""
  items, chance = questions(), random.Random(3)
  own = {d.name: contamination.own_text(d).decode() for d in items}
  clean = [sentence(chance, 30) for _ in range(50)]
  shots = items[0].contexts[0][: items[0].shots]
  halves = [" ".join(own["9"].split()[:9]), " ".join(own["9"].split()[9:])]
  planted = ["So: " + own["4"].upper().replace(" ", ", ") + " end", "x " + own["7"][:-3], shots]
  tokenizer = get(name)
  for texts, wanted in ((clean, ()), ([*clean, *planted, *halves], ("4", "7"))):
    folder = prepare(load_mixture(mixture(tmp_path, texts)), tokenizer, tmp_path / "root")
    found = contamination.contamination({"t": items}, texts_of(folder, tokenizer))["t"]
    assert (found.documents, found.checked, found.found) == (20, 19, wanted)
  with pytest.raises(DataError, match="is of tokenizer"):
    next(texts_of(folder, get("byte" if name != "byte" else "o200k_harmony")))


def test_pieces_overlap_and_are_small():
  """13 words across the edge of two pieces are found; memory does not grow with the data."""
  tokenizer, chance = get("byte"), random.Random(4)
  item = Document("0", ("alpha beta gamma delta one two three four five six seven",), (" 8 9",), 0)
  size = 4 * OVERLAP
  for edge in (size - 20, size + 5):
    filler = sentence(chance, 4000)
    text = filler[: edge - 20] + " " + contamination.own_text(item).decode() + " " + filler
    stream = Stream([tokenizer.encode(text)])
    assert contamination.contamination({"t": [item]}, pieces(stream, tokenizer, size))["t"].found
  peaks = []
  for count in (1, 16):
    stream = Stream([tokenizer.encode(sentence(chance, 20_000)) for _ in range(count)])
    tracemalloc.start()
    contamination.contamination({"t": [item]}, pieces(stream, tokenizer, size))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 1.2 * peaks[0]


def test_the_command_reports_and_writes_what_it_found(tmp_path):
  chance = random.Random(5)
  asked = [sentence(chance, 15) for _ in range(6)]
  asked = {"pets": asked, "both": [*asked[:2], "the cat", "a mat"], "brief": ["the cat", "a mat"]}
  lines = (
    {"task": task, "name": f"n{i}", "context": q, "choices": [" a", " b"], "gold": 0}
    for task, questions in asked.items()
    for i, q in enumerate(questions)
  )
  (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  file = mixture(tmp_path, [sentence(chance, 40) for _ in range(30)] + ["so " + asked["pets"][3]])
  console = Console(record=True, width=120)
  source = str(tmp_path / "items.jsonl")
  evals.prep(source, tmp_path / "root", console, file, "byte")
  said = console.export_text()
  cells = dict(re.findall(r"│ (\w+) +│.*│ +([^│]*?) +│\n", said))
  assert cells == {"pets": "1 of 6", "both": "0 of 2, 2 too short", "brief": "2 too short"}
  assert "too short, of fewer than 13 words: none of those was looked for" in said
  (path,) = (tmp_path / "root" / "data").glob("*/contamination-*.json")
  assert json.loads(path.read_text())["pets"] == {"documents": 6, "checked": 6, "found": ["n3"]}
  assert path.stem.removeprefix("contamination-") in {
    p.name for p in (tmp_path / "root" / "evals").iterdir()
  }
