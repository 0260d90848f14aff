"""The fast tokenizer against ours: equal ids on every text, through transformers."""

from __future__ import annotations

import pathlib
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from transformers import AutoTokenizer

from nmoe.data.fast import O200K_NAMES, write_tokenizer
from nmoe.data.hf_tokenizer import HfTokenizer, byte_letters
from nmoe.data.tokenizer import get

TEXTS = st.text(max_size=300)
LANGUAGES = (
  "Ein schöner Tag, isn't it? It'S 1234567 o'clock…\r\n\r\n\t  x  ",
  "العربية، עברית, हिन्दी ไทย 中文，日本語。 한국어 Ελληνικά Ⅷ ǅ ʰ",
  "👩‍👩‍👧 🇨🇭 \u200b\u00a0\u2028 \x00\x01\x7f e\u0301",
  "<|endof text|> <| endoftext|> |>",
)


@pytest.fixture(scope="module", params=["byte", "o200k_harmony"])
def pair(request, tmp_path_factory):
  ours = get(request.param)
  folder = tmp_path_factory.mktemp(request.param)
  write_tokenizer(folder, ours, 4096)
  return ours, AutoTokenizer.from_pretrained(folder)


def python_sources(num_bytes: int) -> list[str]:
  files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
  texts, size = [], 0
  for file in files:
    if size > num_bytes:
      break
    texts.append(file.read_text(encoding="utf-8", errors="replace"))
    size += len(texts[-1])
  return texts


def test_ids_are_equal_on_half_a_million_tokens_and_decode(pair):
  ours, theirs = pair
  texts = [*LANGUAGES, *python_sources(500_000 if ours.name == "byte" else 2_100_000)]
  count = 0
  for text in texts:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert np.array_equal(ids, ours.encode(text))
    assert theirs.decode(ids) == text
    count += len(ids)
  assert count > 450_000


def test_a_tokenizer_json_is_a_tokenizer_of_ours(pair):
  ours, theirs = pair
  again = HfTokenizer(pathlib.Path(theirs.name_or_path) / "tokenizer.json")
  assert (again.vocab_size, again.eot) == (ours.vocab_size, ours.eot)
  assert np.array_equal(again.token_bytes(), ours.token_bytes())
  for text in (*LANGUAGES, "a<|endoftext|>b", "lone \ud800"):
    ids = again.encode(text)
    assert np.array_equal(ids, ours.encode(text)) and again.decode(ids) == ours.decode(ids)


def test_ids_are_equal_on_any_text(pair):
  ours, theirs = pair

  @settings(max_examples=150)
  @given(TEXTS)
  def equal(text):
    ids = theirs(text, split_special_tokens=True)["input_ids"]  # special names are text here
    assert ids == ours.encode(text).tolist()

  equal()


def test_the_separator_and_the_size(pair):
  ours, theirs = pair
  assert len(theirs) == ours.vocab_size
  assert theirs.eos_token_id == theirs.pad_token_id == ours.eot
  assert theirs.bos_token_id is None
  assert theirs.decode([ours.eot], skip_special_tokens=True) == ""
  split = theirs("a<|endoftext|>b", split_special_tokens=True)["input_ids"]
  assert split == ours.encode("a<|endoftext|>b").tolist()
  assert theirs("a<|endoftext|>b")["input_ids"][1] == ours.eot


def test_special_ids_have_the_names_of_tiktoken(monkeypatch):
  ranks = {bytes([b]): b for b in range(256)}
  monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
  named = openai_public.o200k_harmony()["special_tokens"]
  theirs = {i: name for name, i in named.items() if "reserved" not in name}
  assert {i: name for i, name in theirs.items() if i != 200018} == O200K_NAMES


def test_every_byte_has_a_letter_of_its_own():
  letters = byte_letters()
  assert len(set(letters.values())) == 256
  assert letters[ord("a")] == "a"
  assert letters[ord(" ")] == "Ġ"
