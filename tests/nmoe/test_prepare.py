"""Preparation: what is written, when it is reused, and what every fault leaves behind.

One file: the same documents are prepared, at peace and disturbed.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.data import prepare as preparation
from nmoe.data import shards, sources_python, tokenizer
from nmoe.data.mixture import FilesSource, HuggingFaceSource, Mixture, PythonSource
from nmoe.data.prepare import prepare
from nmoe.data.prepared import open_data
from nmoe.data.shards import read_manifest, write_manifest
from nmoe.errors import DataError

BYTE = tokenizer.get("byte")
DOCUMENTS = [f"document {i}: " + "lorem ipsum é " * (i % 7) for i in range(400)]


def write_texts(folder, texts):
  folder.mkdir(exist_ok=True)
  for i, text in enumerate(texts):
    (folder / f"{i:04d}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(folder / "*.txt")


def text_source(pattern, **values):
  return FilesSource(**{"name": "texts", "paths": (pattern,), "format": "text", **values})


def mixture_of(*sources, holdout=0.1):
  return Mixture(sources=sources, holdout=holdout)


def prepared_sources(folder):
  """The source folders of a prepared mixture, in order, with their manifests."""
  entries = read_manifest(folder)["sources"]
  folders = [folder.parent / "sources" / e["source"] for e in entries]
  return [(f, read_manifest(f)) for f in folders]


def read_split(folder, manifest, split):
  """The texts of a split, cut at the document index; every text must be followed by a separator."""
  parts = [np.load(folder / s["file"]) for s in manifest[split]["shards"]]
  tokens = np.concatenate([np.zeros(0, np.uint16), *parts])
  offsets = np.load(folder / f"{split}-offsets.npy").astype(int)
  assert offsets[0] == 0 and offsets[-1] == len(tokens) == manifest[split]["tokens"]
  texts = [tokens[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
  assert all(t[-1] == BYTE.eot and not (t[:-1] == BYTE.eot).any() for t in texts)
  return [BYTE.decode(t).decode() for t in texts]


def visible(root):
  return sorted(p.name for p in (root / "data" / "sources").glob("[!.]*"))


def leftovers(root):
  return [p.name for p in (root / "data").rglob("*.partial")]


def is_heldout(text, holdout):
  """The published rule, computed apart: bytes 8..15 of the sha256, little endian, below holdout."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16], "little") < holdout * 2**64


def test_documents_are_written_split_and_indexed(tmp_path):
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  folder = prepare(mixture_of(text_source(pattern)), BYTE, tmp_path)
  ((source, manifest),) = prepared_sources(folder)
  for split, held in (("train", False), ("heldout", True)):
    expected = [d for d in DOCUMENTS if is_heldout(d, 0.1) == held]
    assert read_split(source, manifest, split) == expected
    assert manifest[split]["documents"] == len(expected)
    assert manifest[split]["bytes"] == sum(len(d.encode()) for d in expected)
    hashes = [int.from_bytes(hashlib.sha256(d.encode()).digest()[:8], "little") for d in expected]
    assert np.load(source / f"{split}-hashes.npy").tolist() == hashes
  ids = [i for d in DOCUMENTS if not is_heldout(d, 0.1) for i in (*d.encode(), BYTE.eot)]
  counts = np.load(source / "train-counts.npy")
  assert counts.tolist() == np.bincount(ids, minlength=BYTE.vocab_size).tolist()
  assert not (source / "heldout-counts.npy").exists()  # nothing reads them
  assert 20 <= manifest["heldout"]["documents"] <= 65  # 40 expected


def test_shards_are_bounded_and_typed_by_the_vocabulary(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
  monkeypatch.setattr(preparation, "BATCH_BYTES", 1000)
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  folder = prepare(mixture_of(text_source(pattern)), BYTE, tmp_path)
  ((source, manifest),) = prepared_sources(folder)
  sizes = [s["tokens"] for s in manifest["train"]["shards"]]
  assert len(sizes) > 3 and all(3000 <= n < 4200 for n in sizes[:-1])
  assert np.load(source / "train-tokens-00000.npy").dtype == np.uint16
  assert read_split(source, manifest, "train") == [d for d in DOCUMENTS if not is_heldout(d, 0.1)]


def test_o200k_needs_uint32(tmp_path):
  o200k = tokenizer.get("o200k_harmony")
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  folder = prepare(mixture_of(text_source(pattern)), o200k, tmp_path)
  ((source, _),) = prepared_sources(folder)
  tokens = np.load(source / "train-tokens-00000.npy")
  assert tokens.dtype == np.uint32
  text = "".join(d for d in DOCUMENTS if not is_heldout(d, 0.1))
  assert o200k.decode(tokens).decode() == text


def test_prepared_sources_are_reused_for_equal_content(tmp_path, monkeypatch):
  here = text_source(write_texts(tmp_path / "here", DOCUMENTS))
  there = text_source(write_texts(tmp_path / "there", DOCUMENTS), name="other", weight=3.0)
  first = prepare(mixture_of(here), BYTE, tmp_path)

  def must_not_write(*_):
    raise AssertionError("prepared again")

  monkeypatch.setattr(preparation, "_write_source", must_not_write)
  assert prepare(mixture_of(here), BYTE, tmp_path) == first
  second = prepare(mixture_of(there), BYTE, tmp_path)
  assert second != first
  assert prepared_sources(second) == prepared_sources(first)


def test_a_source_that_holds_counts_of_its_held_out_text_is_used_as_it_is(tmp_path):
  """As all did that were prepared before 2026-11-28."""
  mixture = mixture_of(text_source(write_texts(tmp_path / "in", DOCUMENTS)))
  ((source, manifest),) = prepared_sources(prepare(mixture, BYTE, tmp_path))
  np.save(source / "heldout-counts.npy", np.zeros(BYTE.vocab_size, np.int64))
  write_manifest(source, {**manifest, "files": shards.list_files(source)})
  before = (source / "manifest.json").read_bytes()
  (opened,) = open_data(prepare(mixture, BYTE, tmp_path, anew=True)).sources
  assert opened.folder == source and (source / "manifest.json").read_bytes() == before
  assert opened.train_counts().sum() == opened.train.length == manifest["train"]["tokens"]


@pytest.mark.parametrize("change", ["content", "holdout", "max_documents", "tokenizer"])
def test_what_changes_tokens_changes_the_digest(tmp_path, change):
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  first = prepare(mixture_of(text_source(pattern)), BYTE, tmp_path)
  if change == "content":
    (tmp_path / "in" / "0000.txt").write_text("another text")
  second = prepare(
    mixture_of(
      text_source(pattern, max_documents=7 if change == "max_documents" else 0),
      holdout=0.2 if change == "holdout" else 0.1,
    ),
    tokenizer.get("o200k_harmony") if change == "tokenizer" else BYTE,
    tmp_path,
  )
  assert prepared_sources(second)[0][0] != prepared_sources(first)[0][0]


def test_max_documents(tmp_path):
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  folder = prepare(mixture_of(text_source(pattern, max_documents=50)), BYTE, tmp_path)
  ((source, manifest),) = prepared_sources(folder)
  assert read_split(source, manifest, "train") == [
    d for d in DOCUMENTS[:50] if not is_heldout(d, 0.1)
  ]


def test_copies_cannot_leak_into_training(tmp_path):
  """A text in two sources lies on one side; a second copy in a source is dropped and counted."""
  one = text_source(write_texts(tmp_path / "one", DOCUMENTS + DOCUMENTS[:30]), name="one")
  two = text_source(write_texts(tmp_path / "two", DOCUMENTS[::-1]), name="two")
  folder = prepare(mixture_of(one, two), BYTE, tmp_path)
  (a, first), (b, second) = prepared_sources(folder)
  assert first["skipped"]["duplicate"] == 30
  assert set(read_split(a, first, "heldout")) == set(read_split(b, second, "heldout"))
  assert not set(read_split(a, first, "heldout")) & set(read_split(b, second, "train"))


def test_what_is_no_text_is_counted(tmp_path):
  pattern = write_texts(tmp_path / "in", [*DOCUMENTS[:40], "", b"\xff\xfe", ""])
  ((_, manifest),) = prepared_sources(prepare(mixture_of(text_source(pattern)), BYTE, tmp_path))
  assert manifest["skipped"] == {"empty": 2, "not_utf8": 1, "duplicate": 0}


def test_progress_counts_documents_and_bytes(tmp_path):
  seen = []
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  prepare(mixture_of(text_source(pattern)), BYTE, tmp_path, lambda *args: seen.append(args))
  assert seen[-1] == ("texts", len(DOCUMENTS), sum(len(d.encode()) for d in DOCUMENTS))


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12))
def test_seen_is_a_set(batches):
  seen, oracle = preparation._Seen(), set()
  for batch in batches:
    fresh = seen.add(np.array(batch, dtype=np.uint64))
    for value, new in zip(batch, fresh.tolist(), strict=True):
      assert new == (value not in oracle)
      oracle.add(value)


@given(parts=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=50), max_size=6))
def test_npy_writer_writes_what_numpy_reads(tmp_path_factory, parts):
  path = tmp_path_factory.mktemp("npy") / "a.npy"
  writer = shards.NpyWriter(path, np.uint32)
  for part in parts:
    writer.append(np.array(part, dtype=np.uint32))
  writer.close()
  found = np.load(path)
  assert found.dtype == np.uint32 and found.tolist() == [v for part in parts for v in part]


# --- jsonl, parquet, the Hub ---


def write_rows(folder, format, rows):
  path = folder / f"rows.{format}"
  if format == "jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return path


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_are_documents(tmp_path, format):
  rows = [{"id": i, "body": d} for i, d in enumerate(DOCUMENTS)] + [{"id": -1, "body": None}]
  path = write_rows(tmp_path, format, rows)
  source = text_source(str(path), format=format, text_field="body")
  ((folder, manifest),) = prepared_sources(prepare(mixture_of(source), BYTE, tmp_path))
  assert read_split(folder, manifest, "train") == [d for d in DOCUMENTS if not is_heldout(d, 0.1)]
  assert manifest["skipped"]["null"] == 1


def test_a_dataset_by_name(tmp_path):
  """A local folder stands in for the Hub; its revision is recorded and rules the digest."""
  (tmp_path / "set").mkdir()
  write_rows(tmp_path / "set", "parquet", [{"text": d} for d in DOCUMENTS])
  source = HuggingFaceSource(name="hub", dataset=str(tmp_path / "set"), revision="a" * 40)
  ((folder, manifest),) = prepared_sources(prepare(mixture_of(source), BYTE, tmp_path))
  assert read_split(folder, manifest, "train") == [d for d in DOCUMENTS if not is_heldout(d, 0.1)]
  assert manifest["source"]["revision"] == "a" * 40
  other = HuggingFaceSource(name="hub", dataset=str(tmp_path / "set"), revision="b" * 40)
  assert prepared_sources(prepare(mixture_of(other), BYTE, tmp_path))[0][0] != folder


def bad_parquet(folder):
  (folder / "bad.parquet").write_bytes(b"PAR1 and then nothing of use")
  return text_source(str(folder / "bad.parquet"), format="parquet"), "bad.parquet cannot be read"


def cut_parquet(folder):
  path = write_rows(folder, "parquet", [{"text": d} for d in DOCUMENTS])
  path.write_bytes(path.read_bytes()[:-40])
  return text_source(str(path), format="parquet"), "rows.parquet cannot be read"


def bad_jsonl(folder):
  (folder / "bad.jsonl").write_text('{"text": "whole"}\n{"text": "cut\n{"text": "cut')
  return text_source(str(folder / "bad.jsonl"), format="jsonl"), "bad.jsonl cannot be read"


def missing_field(folder):
  path = write_rows(folder, "jsonl", [{"txet": "a"}])
  return text_source(str(path), format="jsonl"), "no field 'text', .*did you mean 'txet'"


def number_field(folder):
  path = write_rows(folder, "parquet", [{"text": 1}])
  return text_source(str(path), format="parquet"), "field 'text' is int64"


def missing_split(folder):
  write_rows(folder, "parquet", [{"text": "a"}])
  source = HuggingFaceSource(name="h", dataset=str(folder), revision="a" * 40, split="dev")
  return source, "split 'dev' cannot be read .*train"


def missing_file(folder):
  return text_source(str(folder / "*.none")), r"no file matches .*\*\.none; correct its paths"


def empty_source(folder):
  return text_source(write_texts(folder, ["", b"\xff"])), "no document to train on .*1 not_utf8"


def empty_jsonl(folder):
  (folder / "none.jsonl").write_text("")
  return text_source(str(folder / "none.jsonl"), format="jsonl"), "no document to train on"


def all_heldout(folder):
  text = next(d for d in DOCUMENTS if is_heldout(d, 0.1))
  return text_source(write_texts(folder, [text])), r"no document to train on \(1 held out"


@pytest.mark.parametrize(
  "make",
  [
    bad_parquet,
    cut_parquet,
    bad_jsonl,
    missing_field,
    number_field,
    missing_split,
    missing_file,
    empty_source,
    empty_jsonl,
    all_heldout,
  ],
)
def test_unusable_sources_stop_with_their_name(tmp_path, make):
  (tmp_path / "in").mkdir()
  source, message = make(tmp_path / "in")
  with pytest.raises(DataError, match=f"(?s)source '{source.name}'.*({message})"):
    prepare(mixture_of(source), BYTE, tmp_path)
  assert not visible(tmp_path) and not leftovers(tmp_path)


# --- the standard library ---


def test_prose_of_a_module():
  code = '''#!/usr/bin/env python
"""Module doc.

   Indented."""
import os  # after code
# a block
#   of two lines

x = """not prose"""
y = f(
  "argument"
)

class A:
  r\'\'\'Class doc with "quotes" and # no comment.\'\'\'
  s = "# no comment"
'''
  assert sources_python.prose(code) == (
    "/usr/bin/env python\n\nModule doc.\n\nIndented.\n\nafter code\na block\nof two lines\n\n"
    'Class doc with "quotes" and # no comment.'
  )


def test_the_standard_library_is_found_and_is_text():
  files = sources_python._files("stdlib")
  assert len(files) > 100
  assert not any("site-packages" in p.parts for p in files)
  assert any(p.name == "argparse.py" for p in files)


def test_installed_packages_are_a_tree_of_their_own():
  packages, stdlib = sources_python._files("packages"), sources_python._files("stdlib")
  assert len(packages) > 100
  assert not set(packages) & set(stdlib)
  assert any(path.match("numpy/__init__.py") for path in packages)


def test_held_out_files_are_held_out_as_prose_too(tmp_path, monkeypatch):
  texts = [f'"""Doc {i}."""\nx = {i}\n' for i in range(300)]
  write_texts(tmp_path / "lib", texts)
  monkeypatch.setattr(sources_python, "_files", lambda tree: sorted((tmp_path / "lib").iterdir()))
  code = PythonSource(name="code", part="code")
  prose = PythonSource(name="prose", part="prose")
  (a, first), (b, second) = prepared_sources(prepare(mixture_of(code, prose), BYTE, tmp_path))
  heldout = [i for i, text in enumerate(texts) if is_heldout(text, 0.1)]
  assert read_split(a, first, "heldout") == [texts[i] for i in heldout]
  assert read_split(b, second, "heldout") == [f"Doc {i}." for i in heldout]


# --- faults and several processes ---


@pytest.mark.parametrize("where", ["append", "close"])
def test_a_full_disk_leaves_nothing_and_the_next_call_succeeds(tmp_path, monkeypatch, where):
  source = text_source(write_texts(tmp_path / "in", DOCUMENTS))

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(shards.NpyWriter, where, full)
    with pytest.raises(DataError, match=r"(?s)No space left on device; [\d,]+ bytes are free"):
      prepare(mixture_of(source), BYTE, tmp_path)
  assert not visible(tmp_path) and not leftovers(tmp_path)
  ((_, manifest),) = prepared_sources(prepare(mixture_of(source), BYTE, tmp_path))
  assert manifest["train"]["documents"] > 0


PREPARER = """
import resource, sys
from nmoe.data import prepare as p, tokenizer
from nmoe.errors import DataError
from nmoe.data.mixture import FilesSource, Mixture
root, pattern, limit = sys.argv[1:]
if int(limit):
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
source = FilesSource(name="texts", paths=(pattern,), format="text")
sys.stdin.readline()
wrote = []
try:
  folder = p.prepare(Mixture(sources=(source,), holdout=0.1), tokenizer.get("byte"), root,
                     lambda *a: wrote.append(a))
  print(folder, len(wrote))
except DataError as error:
  print("DataError", error)
"""


def start_preparer(root, pattern, limit=0):
  command = [sys.executable, "-c", PREPARER, str(root), pattern, str(limit)]
  repo = Path(__file__).parents[2]
  return subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repo
  )


def test_a_write_that_the_system_refuses(tmp_path):
  """The same with the kernel's own refusal: no file may grow above 4 KiB."""
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  said = start_preparer(tmp_path, pattern, limit=4096).communicate("\n")[0]
  assert said.startswith("DataError") and "File too large" in said
  assert not visible(tmp_path) and not leftovers(tmp_path)


def test_two_preparers_at_once(tmp_path):
  pattern = write_texts(tmp_path / "in", DOCUMENTS)
  processes = [start_preparer(tmp_path, pattern) for _ in range(2)]
  for process in processes:
    process.stdin.write("\n")
    process.stdin.flush()
  said = [process.communicate()[0].split() for process in processes]
  assert said[0][0] == said[1][0]
  assert sorted(int(wrote) > 0 for _, wrote in said) == [False, True]  # one did the work
  ((folder, manifest),) = prepared_sources(Path(said[0][0]))
  shards.check_files(folder, manifest)
  assert len(visible(tmp_path)) == 1 and not leftovers(tmp_path)


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
  source = text_source(write_texts(tmp_path / "in", DOCUMENTS))
  write = preparation._write_source
  nested = []

  def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  def overtaken(*args):
    if not nested:
      nested.append(True)
      prepare(mixture_of(source), BYTE, tmp_path)
    return write(*args)

  monkeypatch.setattr(preparation.files.fcntl, "flock", no_locks)
  monkeypatch.setattr(preparation, "_write_source", overtaken)
  ((folder, manifest),) = prepared_sources(prepare(mixture_of(source), BYTE, tmp_path))
  shards.check_files(folder, manifest)
  assert nested and len(visible(tmp_path)) == 1 and not leftovers(tmp_path)


def test_what_a_killed_preparer_left_is_cleared(tmp_path):
  source = text_source(write_texts(tmp_path / "in", DOCUMENTS))
  name = prepared_sources(prepare(mixture_of(source), BYTE, tmp_path))[0][0].name
  store = tmp_path / "again" / "data" / "sources"
  (store / f".{name}-killed.partial").mkdir(parents=True)
  prepare(mixture_of(source), BYTE, tmp_path / "again")
  assert visible(tmp_path / "again") == [name] and not leftovers(tmp_path / "again")


@pytest.mark.faults
def test_what_a_killed_preparer_of_another_source_left_is_cleared(tmp_path):
  """A source that nobody prepares again; what a living one fills is left alone."""
  source = text_source(write_texts(tmp_path / "in", DOCUMENTS))
  store = tmp_path / "data" / "sources"
  for name in ("dead", "alive"):
    (store / f".{name}-0123.partial").mkdir(parents=True)
  with (store / ".alive.lock").open("w") as file:
    assert preparation.files.lock(file)
    prepare(mixture_of(source), BYTE, tmp_path)
  assert leftovers(tmp_path) == [".alive-0123.partial"]


@pytest.mark.faults
def test_prepared_data_are_as_private_as_the_user_wants(tmp_path):
  before = os.umask(0o077)
  try:
    folder = prepare(mixture_of(text_source(write_texts(tmp_path / "in", ["a"]))), BYTE, tmp_path)
  finally:
    os.umask(before)
  assert folder.stat().st_mode & 0o777 == 0o700
