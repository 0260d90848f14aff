"""A tokenizer.json of HuggingFace as a tokenizer of ours: `data.tokenizer = "hf:PATH"`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Fast

from nmoe.errors import DataError

ENDS = ("<|endoftext|>", "<｜end▁of▁sentence｜>", "[EOS]", "<|end_of_text|>", "</s>")


class HfTokenizer:
  """See nmoe.data.tokenizer.Tokenizer. Byte-level BPE; what a file adds around a text is left out.

  The separator is the first of ENDS that the file has. Raises DataError for a file that is missing
  or of another kind.
  """

  def __init__(self, path: Path):
    self.name = f"hf:{path}"
    self._fast = Fast.from_str(_checked(path))
    self._fast.encode_special_tokens = True  # special names in a text are text
    vocab = self._fast.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    ends = [vocab[end] for end in ENDS if end in vocab]
    if not ends:
      raise DataError(f"{path} has no separator of documents: none of {', '.join(ENDS)}")
    self.eot = ends[0]
    special = self._fast.get_added_tokens_decoder()
    byte = {letter: b for b, letter in byte_letters().items()}
    self._pieces = {
      i: bytes(byte[letter] for letter in piece) for piece, i in vocab.items() if i not in special
    }

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


def _checked(path: Path) -> str:
  """The file's text, which must be of byte-level BPE."""
  try:
    text = path.read_text(encoding="utf-8")
    table = json.loads(text)
    kind, level = table["model"]["type"], "ByteLevel" in json.dumps(table["decoder"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is not a tokenizer.json ({error!r})") from error
  if kind != "BPE" or not level:
    raise DataError(f"{path} is a tokenizer of kind {kind}; byte-level BPE is needed")
  return text


def byte_letters() -> dict[int, str]:
  """The printable letter of each byte in byte-level BPE (GPT-2): itself, or the next of U+0100."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}
