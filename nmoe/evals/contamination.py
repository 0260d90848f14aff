"""Which evaluation items stand in the training data: 13 words in a row of an item that follow each
other there too (as for GPT-3, arXiv 2005.14165, appendix C).

Words are runs of letters and digits in lower case; every character beyond ASCII counts as a letter,
but for the dashes and quotes of U+2000 to U+203F. Of an item its own question and right answer
count, not the solved examples before it. Both sides are hashed to 64 bits, and the data are read in
pieces, so that memory is that of the items' hashes and of one piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nmoe.data.permutation import mix
from nmoe.data.shards import Stream, open_stream, read_manifest
from nmoe.data.tokenizer import Tokenizer
from nmoe.errors import DataError
from nmoe.evals.requests import Document
from nmoe.files import replace

N = 13
PIECE = 1 << 20  # tokens read at once
OVERLAP = 1 << 10  # tokens that a piece repeats of the one before: 13 words are fewer
LONGEST = 256  # bytes of a word that have a place in its hash
FILTER_BITS = 24

_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[ord("A") : ord("Z") + 1] += 32
_LETTER = np.array([chr(b).isalnum() for b in range(0x80)] + [True] * 0x80)
_DRAW = np.random.default_rng(13)
_PLACES = _DRAW.integers(1 << 63, size=LONGEST, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TURNS = _DRAW.integers(1 << 63, size=N, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Contamination:
  """Of a task: its documents, those of 13 words or more, and the names of those in the data."""

  documents: int
  checked: int
  found: tuple[str, ...]


def ngrams(text: bytes) -> np.ndarray:
  """Hashes, uint64, of every 13 words in a row of a text; none across a zero byte."""
  data = np.frombuffer(text, dtype=np.uint8)
  letter = _LETTER[data] & (data != 0)
  quote = np.flatnonzero((data[:-2] == 0xE2) & (data[1:-1] == 0x80)) if len(data) > 2 else []
  for i in range(3):
    letter[np.asarray(quote, dtype=np.int64) + i] = False
  edges = np.flatnonzero(np.diff(letter, prepend=False, append=False))
  starts, ends = edges[0::2], edges[1::2]
  if len(starts) < N:
    return np.zeros(0, dtype=np.uint64)
  lengths = ends - starts
  firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
  place = np.arange(int(lengths.sum())) - np.repeat(firsts, lengths)
  weighted = (_LOWER[data[letter]].astype(np.uint64) + np.uint64(1)) * _PLACES[place % LONGEST]
  words = mix(np.add.reduceat(weighted, firsts))
  count = len(words) - N + 1
  total = np.zeros(count, dtype=np.uint64)
  for k in range(N):
    total += words[k : k + count] * _TURNS[k]
  document = np.cumsum(data == 0)[starts]
  return mix(total[document[:count] == document[N - 1 :]])


def own_text(document: Document) -> bytes:
  """The question and its right answer, without the examples of the prompt."""
  gold = document.gold
  return (document.contexts[gold][document.shots :] + document.answers[gold]).encode()


def contamination(
  tasks: Mapping[str, Sequence[Document]], texts: Iterator[bytes]
) -> dict[str, Contamination]:
  """By task, which documents share 13 words in a row with the texts."""
  grams = {task: [ngrams(own_text(d)) for d in documents] for task, documents in tasks.items()}
  asked = np.unique(np.concatenate([g for per in grams.values() for g in per]))
  seen = np.zeros(len(asked), dtype=bool)
  sieve = np.zeros(1 << FILTER_BITS, dtype=bool)
  shift = np.uint64(64 - FILTER_BITS)
  sieve[asked >> shift] = True
  for text in texts:
    there = ngrams(text)
    there = there[sieve[there >> shift]]
    at = np.minimum(np.searchsorted(asked, there), max(len(asked) - 1, 0))
    seen[at[asked[at] == there]] = True
  return {
    task: Contamination(
      len(documents),
      sum(len(own) > 0 for own in grams[task]),
      tuple(
        d.name
        for d, own in zip(documents, grams[task], strict=True)
        if len(own) and seen[np.searchsorted(asked, own)].any()
      ),
    )
    for task, documents in tasks.items()
  }


def texts_of(folder: Path, tokenizer: Tokenizer) -> Iterator[bytes]:
  """What a prepared mixture trains on, in pieces, documents parted by zero bytes.

  folder: {root}/data/DIGEST. Raises DataError for one that is broken, or of another tokenizer.
  """
  content = read_manifest(folder)
  if content["tokenizer"] != tokenizer.name:
    raise DataError(f"{folder} is of tokenizer {content['tokenizer']}, not {tokenizer.name}")
  for entry in content["sources"]:
    source = folder.parent / "sources" / entry["source"]
    yield from pieces(open_stream(source, read_manifest(source)["train"]), tokenizer)


def pieces(stream: Stream, tokenizer: Tokenizer, size: int = PIECE) -> Iterator[bytes]:
  """Of a stream of tokens; each begins with the last OVERLAP tokens of the one before."""
  for begin in range(0, stream.length, size):
    first = max(0, begin - OVERLAP)
    ids = np.empty(min(begin + size, stream.length) - first, dtype=np.uint32)
    stream.read(first, ids)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    yield b"\0".join(tokenizer.decode(document) for document in documents)


def write(path: Path, found: Mapping[str, Contamination]) -> None:
  """As JSON, by a rename. Raises DataError."""
  try:
    replace(path, json.dumps({task: asdict(c) for task, c in found.items()}, indent=1) + "\n")
  except OSError as error:
    raise DataError(f"{path} cannot be written ({error}); make room, then run again") from error
