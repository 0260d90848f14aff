"""A tokenizer.json of somebody else: whole texts, one encoding; the file is part of the data."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nmoe.data import tokenizer
from nmoe.data.fast import write_tokenizer
from nmoe.data.hf_tokenizer import HfTokenizer, byte_letters
from nmoe.data.mixture import load_mixture
from nmoe.data.prepare import prepare
from nmoe.data.prepared import open_data
from nmoe.errors import DataError

pytestmark = pytest.mark.faults
END = "<|endoftext|>"


def write(folder: Path, letters: list[str] | None = None, **keys: object) -> Path:
  """A tokenizer whose ids are the bytes, with keys of the file or, as model_KEY, of its model."""
  letters = letters or list(byte_letters().values())
  level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  added = {"id": 256, "content": END, "special": True, "single_word": False}
  model = {"type": "BPE", "vocab": {x: i for i, x in enumerate([*letters, END])}, "merges": []}
  model |= {key[6:]: value for key, value in keys.items() if key.startswith("model_")}
  table = {
    "version": "1.0",
    "added_tokens": [added | {"lstrip": False, "rstrip": False, "normalized": False}],
    "pre_tokenizer": level,
    "decoder": level,
    "model": model,
  }
  path = folder / "tokenizer.json"
  path.write_text(json.dumps(table | {k: v for k, v in keys.items() if k[:6] != "model_"}))
  return path


@pytest.mark.parametrize(
  "keys",
  [
    {
      "truncation": {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
      }
    },
    {
      "padding": {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
      }
    },
  ],
)
def test_texts_are_whole_whatever_the_file_was_used_for(tmp_path, keys):
  text = "a text of more than three letters"
  plain = HfTokenizer(write(tmp_path)).encode(text).tolist()
  assert HfTokenizer(write(tmp_path, **keys)).encode(text).tolist() == plain
  assert len(plain) == len(text)


def test_names_that_were_added_and_are_not_special_have_their_bytes(tmp_path):
  """As DeepSeek's `<think>`, in a text one id: the text is whole, and so is what bits are per."""
  path = write(tmp_path)
  table = json.loads(path.read_text())
  names = {257: "<think>", 258: "日本"}
  flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
  for i, name in names.items():
    table["added_tokens"].append({"id": i, "content": name, "normalized": True} | flags)
  path.write_text(json.dumps(table))
  text = f"a<think>日本 b</think>{END}"
  found, theirs = HfTokenizer(path), AutoTokenizer.from_pretrained(tmp_path)
  ids = found.encode(text)
  assert {257, 258} < set(ids.tolist()) and 256 not in ids
  assert ids.tolist() == theirs.encode(text, split_special_tokens=True, add_special_tokens=False)
  assert found.decode(ids) == text.encode()
  assert found.token_bytes()[ids].sum() == len(text.encode())
  assert found.decode([found.eot]) == b"" and found.token_bytes()[found.eot] == 0


VOCAB = {letter: i for i, letter in enumerate(byte_letters().values())} | {END: 256}


@pytest.mark.parametrize(
  "keys, told",
  [
    ({"model_dropout": 0.5}, "dropout 0.5"),
    ({"model_merges": [["zz", "yy"]]}, "is not a tokenizer.json .*zz"),
    ({"model_vocab": {"a": "x"}}, "is not a tokenizer.json"),
    ({"model_vocab": VOCAB | {"日本": 257}}, "id 257 is '日本', in which .* stand for no byte"),
    ({"model_vocab": VOCAB | {"ab": 2_000_000_000}}, "has the id 2000000000; at most"),
    ({"model": []}, "is not a tokenizer.json"),
  ],
)
def test_a_file_that_cannot_serve_is_one_error(tmp_path, keys, told):
  with pytest.raises(DataError, match=rf"tokenizer\.json.*{told}"):
    HfTokenizer(write(tmp_path, **keys))


def test_a_file_with_a_byte_order_mark(tmp_path):
  path = write(tmp_path)
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert HfTokenizer(path).vocab_size == 257


AROUND = {  # what a file may add around a text, cut off it, or fill it with
  "post_processor": {
    "type": "TemplateProcessing",
    "single": [
      {"SpecialToken": {"id": "</s>", "type_id": 0}},
      {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [256], "tokens": ["</s>"]}},
  },
  "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
}


def test_it_is_exported_as_it_is_read(tmp_path):
  """What was trained by somebody's tokenizer could not leave: it had "no form"."""
  text = write(tmp_path, **AROUND).read_text().replace(END, "</s>")
  (tmp_path / "tokenizer.json").write_text(text)
  ours = HfTokenizer(tmp_path / "tokenizer.json")
  out = tmp_path / "out"
  out.mkdir()
  write_tokenizer(out, ours, 100)
  theirs = AutoTokenizer.from_pretrained(out)
  assert (theirs.eos_token, theirs.eos_token_id, theirs.pad_token_id) == ("</s>", 256, 256)
  for sample in ("a text of more than three letters", "größer\n\t日本 🌙", ""):
    assert theirs(sample)["input_ids"] == ours.encode(sample).tolist()
    assert theirs.decode(ours.encode(sample)) == sample
  assert HfTokenizer(out / "tokenizer.json").eot == 256
  (tmp_path / "tokenizer.json").write_text(text + " ")
  with pytest.raises(DataError, match="tokenizer.json is another file meanwhile"):
    write_tokenizer(out, ours, 100)


def test_another_file_of_the_same_name_makes_other_data(tmp_path):
  """Ids would be read as other letters; the vocabulary is of the same size."""
  (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "ab {i}"}}\n' for i in range(100)))
  source = 'name = "s"\nkind = "files"\npaths = ["a.jsonl"]\nformat = "jsonl"\n'
  (tmp_path / "m.toml").write_text(f"[[source]]\n{source}")
  mixture, name = load_mixture(tmp_path / "m.toml"), f"hf:{write(tmp_path)}"
  tokenizer.get.cache_clear()
  first = prepare(mixture, tokenizer.get(name), tmp_path)
  assert prepare(mixture, tokenizer.get(name), tmp_path) == first
  swapped = str.maketrans("ab", "ba")
  write(tmp_path, [letter.translate(swapped) for letter in byte_letters().values()])
  tokenizer.get.cache_clear()
  assert prepare(mixture, tokenizer.get(name), tmp_path) != first
  with pytest.raises(DataError, match="which is now another file"):
    open_data(first)
