"""Prepare a mixture: read its sources, tokenize, write shards.

    {root}/data/sources/{digest}/   one prepared source (see nmoe.data.shards), shared by mixtures
    {root}/data/{digest}/           one mixture: a manifest naming its sources, weights, temperature

A source's digest covers its content, the tokenizer and the holdout, so changed weights cost no new
tokenization. Both kinds of folders are written beside and renamed: what is visible is complete.

Held-out documents are chosen by the sha256 of their text (of their group, where a source gives
one), so equal documents fall into the same split in every source. A second copy in a source is
dropped. Near-duplicates are not looked for.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from nmoe import files
from nmoe.data.hashes import HASHES, Hashes
from nmoe.data.mixture import FilesSource, Mixture, Source
from nmoe.data.shards import (
  FORMAT,
  SplitWriter,
  check_files,
  digest,
  list_files,
  read_manifest,
  write_manifest,
)
from nmoe.data.sources import Document, Skip, check_there, reader
from nmoe.data.tokenizer import Tokenizer
from nmoe.errors import DataError
from nmoe.records.root import Root

Progress = Callable[[str, int, int], None]
"""Called with a source's name, the documents read so far and the bytes of text read so far."""

BATCH_BYTES = 1 << 22
SPLITS = ("train", "heldout")
_BLANK = "\ufeff" + "".join(c for c in map(chr, range(0x3001)) if c.isspace())


@dataclass(frozen=True, slots=True)
class _Text:
  text: str
  hash: int
  num_bytes: int
  heldout: bool


def prepare(
  mixture: Mixture,
  tokenizer: Tokenizer,
  root: Path,
  progress: Progress | None = None,
  anew: bool = False,
) -> Path:
  """The folder of the prepared mixture under `root`; complete parts are reused.

  anew: hash every file of the sources and of what is prepared, whatever is remembered of them.

  Raises DataError when a source is missing, unreadable or empty, or when writing fails; nothing
  unfinished becomes visible then. Several processes may prepare at once.
  """
  check_there(mixture.sources)
  store = Root(Path(root)).data
  entries = []
  with Hashes(store / HASHES, anew) as hash_of:
    folders = [
      _prepare_source(source, mixture.holdout, tokenizer, store / "sources", progress, hash_of)
      for source in mixture.sources
    ]
    for folder in folders if anew else ():
      check_files(folder, read_manifest(folder), hash_of)
  for source, folder in zip(mixture.sources, folders, strict=True):
    entries.append({"name": source.name, "weight": source.weight, "source": folder.name})
  content = {
    "format": FORMAT,
    "tokenizer": tokenizer.name,
    "temperature": repr(mixture.temperature),
    "sources": entries,
  }
  folder = store / digest(content)[:16]
  with _writing(folder) as partial:
    if partial:
      write_manifest(partial, content)
  return folder


def _prepare_source(
  source: Source,
  holdout: float,
  tokenizer: Tokenizer,
  store: Path,
  progress: Progress | None,
  hash_of: Hashes,
) -> Path:
  described = {k: v for k, v in asdict(source).items() if k not in ("name", "weight")}
  key = {
    "format": FORMAT,
    "kind": source.kind,
    "source": {k: v for k, v in described.items() if k != "paths"},
    "content": digest(reader(source).identity(source, hash_of)),
    "tokenizer": _identity(tokenizer),
    "holdout": holdout,
  }
  folder = store / digest(key)[:16]
  with _writing(folder) as partial:
    if partial:
      counts = _write_source(source, holdout, tokenizer, partial, progress)
      if digest(reader(source).identity(source, hash_of)) != key["content"]:
        raise DataError(
          f"the files of source {source.name!r} were changed while they were read; run again when "
          "nobody writes them"
        )
      write_manifest(partial, {**key, "source": described, **counts, "files": list_files(partial)})
  return folder


def _identity(tokenizer: Tokenizer) -> dict[str, str | int]:
  """What decides the ids of a text."""
  known = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
  return known | ({"sha256": tokenizer.content} if tokenizer.content else {})


def _write_source(
  source: Source, holdout: float, tokenizer: Tokenizer, folder: Path, progress: Progress | None
) -> dict[str, Any]:
  """Tokenize one source into the folder; returns its counts for the manifest.

  Two batches are in flight: threads encode one while this thread reads the next (tiktoken releases
  the interpreter's lock).
  """
  skipped: Counter[str] = Counter()
  with (
    SplitWriter(folder, "train", tokenizer.vocab_size, counted=True) as train,
    SplitWriter(folder, "heldout", tokenizer.vocab_size, counted=False) as heldout,
    ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
  ):
    writers = dict(zip(SPLITS, (train, heldout), strict=True))
    pending: tuple[list[_Text], Iterable[np.ndarray]] = ([], [])
    for texts in _batches(source, holdout, skipped, progress):
      following = (texts, pool.map(tokenizer.encode, [t.text for t in texts]))
      _append(writers, tokenizer.eot, *pending)
      pending = following
    _append(writers, tokenizer.eot, *pending)
    splits = {split: writer.finish() for split, writer in writers.items()}
  if splits["train"]["documents"] == 0:
    rest = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "none skipped"
    raise DataError(
      f"source {source.name!r} has no document to train on "
      f"({splits['heldout']['documents']} held out, {rest}); correct its paths or text_field, "
      f"or remove it from the mixture{_one_document(source, splits)}"
    )
  return {"skipped": dict(skipped), **splits}


def _one_document(source: Source, splits: dict[str, dict]) -> str:
  """What to do about a source of one document, which is held out or not as a whole."""
  if sum(split["documents"] for split in splits.values()) != 1:
    return ""
  told = ". It is one document, which cannot be split into training and held-out text: give several"
  if isinstance(source, FilesSource) and source.format == "text":
    return f'{told} files, or set documents = "paragraphs", which cuts it at blank lines'
  return f"{told} rows"


def _append(
  writers: dict[str, SplitWriter], eot: int, texts: list[_Text], encoded: Iterable[np.ndarray]
) -> None:
  ids = [np.append(e, np.uint32(eot)) for e in encoded]
  for split, heldout in zip(SPLITS, (False, True), strict=True):
    mine = [i for i, text in enumerate(texts) if text.heldout == heldout]
    hashes = np.array([texts[i].hash for i in mine], dtype=np.uint64)
    writers[split].append([ids[i] for i in mine], hashes, sum(texts[i].num_bytes for i in mine))


def _batches(
  source: Source, holdout: float, skipped: Counter[str], progress: Progress | None
) -> Iterator[list[_Text]]:
  """The source's distinct, non-empty documents in lists of about BATCH_BYTES of text."""
  seen = _Seen()
  batch: list[_Text] = []
  size = num_read = bytes_read = kept = 0
  limit = source.max_documents or inf
  for document in reader(source).documents(source):
    num_read += 1
    if isinstance(document, Skip):
      skipped[document.reason] += 1
    elif not document.text.strip(_BLANK):
      skipped["empty"] += 1
    else:
      batch.append(_text(document, holdout))
      size += batch[-1].num_bytes
    if size >= BATCH_BYTES or kept + len(batch) >= limit:
      distinct = _distinct(batch, seen, skipped)
      yield distinct
      bytes_read, kept = bytes_read + size, kept + len(distinct)
      batch, size = [], 0
      if progress:
        progress(source.name, num_read, bytes_read)
      if kept >= limit:
        return
  yield _distinct(batch, seen, skipped)
  if progress:
    progress(source.name, num_read, bytes_read + size)


def _text(document: Document, holdout: float) -> _Text:
  data = document.text.encode("utf-8", errors="replace")
  content = hashlib.sha256(data).digest()
  group = content if document.group is None else hashlib.sha256(document.group).digest()
  heldout = int.from_bytes(group[8:16], "little") < holdout * 2**64
  return _Text(document.text, int.from_bytes(content[:8], "little"), len(data), heldout)


def _distinct(batch: list[_Text], seen: _Seen, skipped: Counter[str]) -> list[_Text]:
  """The batch without texts that were seen before."""
  fresh = seen.add(np.array([text.hash for text in batch], dtype=np.uint64))
  skipped["duplicate"] += len(batch) - int(fresh.sum())
  return [text for text, new in zip(batch, fresh, strict=True) if new]


class _Seen:
  """A growing set of uint64 in sorted runs, each at least twice as long as the next."""

  def __init__(self) -> None:
    self._runs: list[np.ndarray] = []

  def add(self, values: np.ndarray) -> np.ndarray:
    """Add the values; True where a value is met for the first time."""
    fresh = np.zeros(len(values), dtype=bool)
    fresh[np.unique(values, return_index=True)[1]] = True
    for run in self._runs:
      at = np.minimum(np.searchsorted(run, values), len(run) - 1)
      fresh &= run[at] != values
    if fresh.any():
      self._runs.append(np.sort(values[fresh]))
    while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
      self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
    return fresh


@contextmanager
def _writing(folder: Path) -> Iterator[Path | None]:
  """A folder to fill, renamed to `folder` at the end; None when `folder` is there already.

  One process at a time fills it (where the filesystem has locks; elsewhere the first rename wins).
  Whatever fails, no unfinished folder stays.
  """
  if folder.exists():
    yield None
    return
  partial = None
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
      if folder.exists():
        yield None
        return
      partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.partial")
      partial.mkdir()
      yield partial
      files.publish(partial, folder)
  except OSError as error:
    raise DataError(
      f"{folder}: cannot be written: {error}; {_free_space(folder.parent)}; make room or permit "
      "writing, or set run.root to another disk, then run again"
    ) from error
  finally:
    if partial:
      shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
  """Wait for other preparers of this folder; clear what a killed one left behind."""
  with _lock_file(folder.parent, folder.name).open("w") as file:
    try:
      files.lock(file, wait=True)
      _cleared(folder.parent, held=folder.name)
    except OSError:  # no locks on this filesystem: what is there may be in use
      pass
    yield


def clear_unfinished(root: Path) -> list[Path]:
  """Remove what killed preparers left in a root; the folders removed."""
  data = Root(root).data
  return [left for store in (data, data / "sources") for left in _cleared(store)]


def _cleared(store: Path, held: str | None = None) -> list[Path]:
  """Remove the unfinished folders that nobody fills; held: whose lock this process has."""
  removed = []
  for left in sorted(store.glob(".*-*.partial")):
    name = left.name[1:].rpartition("-")[0]
    # a filesystem without locks: it may be in use
    with suppress(OSError), _lock_file(store, name).open("w") as file:
      if name == held or files.lock(file):
        shutil.rmtree(left, ignore_errors=True)
        removed += [] if left.exists() else [left]
  return removed


def _lock_file(store: Path, name: str) -> Path:
  return store / f".{name}.lock"


def _free_space(folder: Path) -> str:
  try:
    return f"{shutil.disk_usage(folder).free:,} bytes are free"
  except OSError:
    return "free space unknown"
