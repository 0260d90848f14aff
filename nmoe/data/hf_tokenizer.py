"""A tokenizer.json of HuggingFace as a tokenizer of ours: `data.tokenizer = "hf:PATH"`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Fast

from nmoe.errors import DataError

MAX_VOCAB = 1 << 24
ENDS = ("<|endoftext|>", "<｜end▁of▁sentence｜>", "[EOS]", "<|end_of_text|>", "</s>")


class HfTokenizer:
  """See nmoe.data.tokenizer.Tokenizer. Byte-level BPE; what a file adds around a text is left out.

  The separator is the first of ENDS that the file has. Raises DataError for a file that is missing
  or of another kind.
  """

  def __init__(self, path: Path):
    self.name = f"hf:{path}"
    text, self.content = _checked(path)
    self._fast = _made(path, text)
    self._fast.encode_special_tokens = True  # special names in a text are text
    self._fast.no_truncation()  # a file may hold what one who trained on it set: texts are whole
    self._fast.no_padding()
    vocab = self._fast.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    if self.vocab_size > MAX_VOCAB:
      raise DataError(f"{path} has the id {self.vocab_size - 1}; at most {MAX_VOCAB} ids are taken")
    ends = [end for end in ENDS if end in vocab]
    if not ends:
      raise DataError(f"{path} has no separator of documents: none of {', '.join(ENDS)}")
    self.path, self.end = path, ends[0]
    self.eot = vocab[self.end]
    added = self._fast.get_added_tokens_decoder()
    self._pieces = _pieces(path, {i: p for p, i in vocab.items() if i not in added})
    self._pieces |= {i: t.content.encode() for i, t in added.items() if not t.special}  # of texts

  def save(self, path: Path) -> None:
    """The file as it is read here: it adds nothing around a text, cuts nothing and fills nothing.

    Raises DataError if it is another one meanwhile.
    """
    text, content = _checked(self.path)
    if content != self.content:
      raise DataError(f"{self.path} is another file meanwhile; run again")
    plain = dict.fromkeys(("truncation", "padding", "post_processor"))
    path.write_text(json.dumps(json.loads(text) | plain, ensure_ascii=False), encoding="utf-8")

  def encode(self, text: str) -> np.ndarray:
    plain = text.encode("utf-8", errors="replace").decode("utf-8")
    return np.array(self._fast.encode(plain, add_special_tokens=False).ids, dtype=np.uint32)

  def decode(self, ids) -> bytes:
    return b"".join(self._pieces.get(i, b"") for i in np.asarray(ids).tolist())

  def token_bytes(self) -> np.ndarray:
    sizes = np.zeros(self.vocab_size, dtype=np.int32)
    for i, piece in self._pieces.items():
      sizes[i] = len(piece)
    return sizes


def _checked(path: Path) -> tuple[str, str]:
  """The text of a file of byte-level BPE, and the file's sha256."""
  try:
    data = path.read_bytes()
    text = data.decode("utf-8-sig")
    model, decoder = (json.loads(text)[key] for key in ("model", "decoder"))
    kind, level, dropout = model["type"], "ByteLevel" in json.dumps(decoder), model.get("dropout")
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise DataError(f"{path} is not a tokenizer.json ({error!r})") from error
  if kind != "BPE" or not level:
    raise DataError(f"{path} is a tokenizer of kind {kind}; byte-level BPE is needed")
  if dropout:
    raise DataError(f"{path} has dropout {dropout}: one text has many encodings; set it to null")
  return text, hashlib.sha256(data).hexdigest()


def _made(path: Path, text: str) -> Fast:
  try:
    return Fast.from_str(text)
  except Exception as error:  # the library has no class of its own for it
    raise DataError(f"{path} is not a tokenizer.json ({error})") from error


def _pieces(path: Path, names: dict[int, str]) -> dict[int, bytes]:
  """The bytes of each id. DataError for a piece that is not of the letters of bytes."""
  byte = {letter: b for b, letter in byte_letters().items()}
  for i, name in names.items():
    odd = set(name) - byte.keys()
    if odd:
      raise DataError(f"{path}: id {i} is {name!r}, in which {sorted(odd)} stand for no byte")
  return {i: bytes(byte[letter] for letter in name) for i, name in names.items()}


def byte_letters() -> dict[int, str]:
  """The printable letter of each byte in byte-level BPE (GPT-2): itself, or the next of U+0100."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}
