"""Sources: one row, one file costs itself; a name is a name; what is text is read as text."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nmoe.data import sources_files, tokenizer
from nmoe.data.mixture import load_mixture
from nmoe.data.prepare import prepare
from nmoe.data.shards import read_manifest
from nmoe.errors import ConfigError, DataError

pytestmark = pytest.mark.faults
BYTE = tokenizer.get("byte")
LONG = "x " * 4000
GOOD = [f"document {i}" for i in range(40)]


def mixture(folder: Path, paths: list[str], format: str = "jsonl", **more: object) -> Path:
  keys = {"name": "s", "kind": "files", "paths": paths, "format": format, **more}
  lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
  path = folder / "mix.toml"
  path.write_text("\n".join(["[mixture]", "holdout = 0.1", "[[source]]", *lines]) + "\n")
  return path


def counts(path: Path, root: Path) -> tuple[int, dict[str, int]]:
  """Documents and what was skipped, by reason, without the reasons that count nothing."""
  folder = prepare(load_mixture(path), BYTE, root)
  (entry,) = read_manifest(folder)["sources"]
  found = read_manifest(root / "data" / "sources" / entry["source"])
  documents = found["train"]["documents"] + found["heldout"]["documents"]
  return documents, {reason: n for reason, n in found["skipped"].items() if n}


def jsonl(texts: list[str]) -> str:
  return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
  "row, reason",
  [
    (b'{"text": "y", "n": 1, "extra": 1}', None),
    (b'{"text": "y", "n": "a7"}', None),
    (b'{"text": "y", "n": 1.5}', None),
    (b'{"text": "y", "n": {"deep": [1, "a"]}}', None),
    (b'{"text": "\\ud83d", "n": 1}', None),
    (b"\r", None),
    (b'{"text": 7, "n": 1}', "not_text"),
    (b'{"text": ["y"]}', "not_text"),
    (b'{"text": null}', "null"),
    (b'{"n": 1}', "no_field"),
    (b'{"text": "cut', "bad_json"),
    (b'["text"]', "bad_json"),
    (b"[" * 100_000, "bad_json"),
    (b'{"n": ' + b"9" * 5000 + b', "text": "y"}', "bad_json"),
    (b'{"text": "\xff"}', "not_utf8"),
  ],
)
def test_an_odd_row_costs_at_most_itself(tmp_path, row, reason):
  rows = "".join(json.dumps({"text": LONG + str(i), "n": i}) + "\n" for i in range(1500))
  (tmp_path / "a.jsonl").write_bytes(rows.encode() + row + b"\n")
  documents, skipped = counts(mixture(tmp_path, ["a.jsonl"]), tmp_path)
  lost = {} if reason is None else {reason: 1}
  assert (documents, skipped) == (1501 - len(lost) - (row == b"\r"), lost)


@pytest.mark.parametrize("bad, stops", [(1, False), (2, False), (3, True), (40, True)])
def test_beyond_a_share_odd_rows_stop_the_preparation(tmp_path, bad, stops):
  """One in twenty is the limit: 2 of 42."""
  (tmp_path / "a.jsonl").write_text(jsonl(GOOD) + '{"text": 1}\n' * bad)
  path = mixture(tmp_path, ["a.jsonl"])
  if not stops:
    assert counts(path, tmp_path) == (40, {"not_text": bad})
    return
  with pytest.raises(DataError, match=rf"a\.jsonl.* {bad} of {40 + bad} rows.*line 41.*is int"):
    counts(path, tmp_path)


def test_a_file_of_odd_rows_alone_stops_the_preparation(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"txet": "a"}\n')
  (tmp_path / "b.jsonl").write_text(jsonl(GOOD))
  with pytest.raises(DataError, match=r"a\.jsonl.*line 1: no field 'text'.*did you mean 'txet'"):
    counts(mixture(tmp_path, ["*.jsonl"]), tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff\n"])
def test_an_empty_jsonl_is_no_fault(tmp_path, text):
  (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
  (tmp_path / "b.jsonl").write_text("\ufeff" + jsonl(GOOD), encoding="utf-8")
  assert counts(mixture(tmp_path, ["*.jsonl"]), tmp_path) == (40, {})


def test_an_empty_parquet_is_no_fault(tmp_path):
  pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
  pq.write_table(pa.table({"text": pa.array([], pa.null())}), tmp_path / "b.parquet")
  pq.write_table(pa.table({"text": GOOD}), tmp_path / "c.parquet")
  assert counts(mixture(tmp_path, ["*.parquet"], "parquet"), tmp_path) == (40, {})


@pytest.mark.parametrize(
  "kind",
  [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), "dictionary"],
)
def test_every_way_to_store_strings_is_read(tmp_path, kind):
  texts = pa.array([*GOOD, None])
  column = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
  pq.write_table(pa.table({"n": list(range(41)), "text": column}), tmp_path / "a.parquet")
  assert counts(mixture(tmp_path, ["*.parquet"], "parquet"), tmp_path) == (40, {"null": 1})


def test_a_string_of_parquet_that_is_no_utf8_costs_itself(tmp_path):
  data = pa.array([*(text.encode() for text in GOOD), b"\xff"])
  table = pa.table({"text": pa.Array.from_buffers(pa.string(), 41, data.buffers())})
  pq.write_table(table, tmp_path / "a.parquet")
  assert counts(mixture(tmp_path, ["*.parquet"], "parquet"), tmp_path) == (40, {"not_utf8": 1})


@pytest.mark.parametrize("suffix", [".zst", ".gz", ".bz2", ".lz4"])
def test_compressed_files_are_read(tmp_path, suffix):
  codec = {".zst": "zstd", ".gz": "gzip", ".bz2": "bz2", ".lz4": "lz4"}[suffix]
  for name, text in (("a.jsonl", jsonl(GOOD)), ("b.txt", GOOD[0])):
    for _ in range(1 + (name == "a.jsonl")):  # two frames in one file
      with (
        (tmp_path / (name + suffix)).open("ab") as raw,
        pa.output_stream(raw, compression=codec) as out,
      ):
        out.write(text.encode())
  assert counts(mixture(tmp_path, ["*.jsonl*"]), tmp_path) == (40, {"duplicate": 40})
  assert counts(mixture(tmp_path, ["b.txt*"] * 1, "text", max_documents=0), tmp_path / "t")[0] == 1


def test_a_cut_compressed_file_is_an_error_of_its_name(tmp_path):
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(GOOD).encode())[:-20])
  with pytest.raises(DataError, match=r"a\.jsonl\.gz.*[Tt]runcated"):
    counts(mixture(tmp_path, ["*.gz"]), tmp_path)


# --- names ---


@pytest.mark.parametrize("format", ["jsonl", "text", "parquet"])
@pytest.mark.parametrize("name", ["part[0-9]", "part*", "a?b", "a::b", "{x}", "a%20b#c", "hf:x"])
def test_a_name_is_no_pattern(tmp_path, name, format):
  folder = tmp_path / "run [1]*"
  folder.mkdir()
  for stem, texts in ((name, GOOD[:20]), ("other", GOOD[20:])):
    path = folder / f"{stem}.{format}"
    if format == "parquet":
      pq.write_table(pa.table({"text": texts}), path)
    else:
      path.write_text(jsonl(texts) if format == "jsonl" else texts[0])
  documents = 2 if format == "text" else 40
  assert counts(mixture(folder, [f"*.{format}"], format), tmp_path)[0] == documents
  alone = mixture(folder, [f"{name}.{format}"], format)
  if "*" not in name and "?" not in name:
    assert load_mixture(alone) and counts(alone, tmp_path)[0] == documents // 2


def test_a_path_from_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "a.jsonl").write_text(jsonl(GOOD))
  assert counts(mixture(tmp_path, ["~/*.jsonl"]), tmp_path) == (40, {})
  with pytest.raises(ConfigError, match="~nobody-here"):
    load_mixture(mixture(tmp_path, ["~nobody-here/*.jsonl"]))


def test_a_mixture_with_a_byte_order_mark(tmp_path):
  (tmp_path / "a.jsonl").write_text(jsonl(GOOD))
  path = mixture(tmp_path, ["a.jsonl"])
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert counts(path, tmp_path) == (40, {})


# --- documents ---


@pytest.mark.parametrize("text", [" ", "\n\t\n", "\ufeff", "\ufeff \n", "\u2003"])
def test_a_blank_is_no_document(tmp_path, text):
  (tmp_path / "a.jsonl").write_text(jsonl([*GOOD, text]))
  assert counts(mixture(tmp_path, ["a.jsonl"]), tmp_path) == (40, {"empty": 1})
  for i, document in enumerate([*GOOD, text]):
    (tmp_path / f"{i}.txt").write_text(document, encoding="utf-8")
  assert counts(mixture(tmp_path, ["*.txt"], "text"), tmp_path) == (40, {"empty": 1})


def test_max_documents_counts_documents(tmp_path):
  (tmp_path / "a.jsonl").write_text(jsonl(["", GOOD[0], GOOD[0], *GOOD[1:]]))
  documents, skipped = counts(mixture(tmp_path, ["a.jsonl"], max_documents=30), tmp_path)
  assert documents == 30 and skipped == {"empty": 1, "duplicate": 1}


def test_one_file_cut_at_blank_lines(tmp_path):
  """As Shakespeare comes: one file, speeches apart by blank lines."""
  (tmp_path / "input.txt").write_text("\n\n".join(GOOD) + "\r\n\r\n \n" + GOOD[3] + "\nrest\n")
  path = mixture(tmp_path, ["input.txt"], "text", documents="paragraphs")
  assert counts(path, tmp_path) == (41, {})


def test_one_document_cannot_be_split(tmp_path):
  """Neither the share nor the paths are at fault; what can work is said."""
  (tmp_path / "input.txt").write_text(GOOD[0])
  path = mixture(tmp_path, ["input.txt"], "text")
  path.write_text(path.read_text().replace("0.1", "0.999999"))
  with pytest.raises(DataError, match=r'one document, .*several files.*documents = "paragraphs"'):
    counts(path, tmp_path)


def test_paragraphs_are_of_text(tmp_path):
  (tmp_path / "a.jsonl").write_text(jsonl(GOOD))
  with pytest.raises(ConfigError, match='documents = .paragraphs. .*format = "text"'):
    load_mixture(mixture(tmp_path, ["a.jsonl"], documents="paragraphs"))


def test_a_parquet_file_with_the_column_twice_is_an_error_of_its_name(tmp_path):
  table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
  pq.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(DataError, match=r"a\.parquet: field 'text' is there more than once"):
    counts(mixture(tmp_path, ["a.parquet"], "parquet"), tmp_path)


# --- similar ones ---


@pytest.mark.parametrize("newline", ["\r\n", "\r", "\n"])
def test_paragraphs_of_every_kind_of_line(tmp_path, newline):
  (tmp_path / "a.txt").write_bytes((newline + " \t" + newline).join(GOOD).encode())
  assert counts(mixture(tmp_path, ["a.txt"], "text", documents="paragraphs"), tmp_path) == (40, {})


@pytest.mark.parametrize("bad, stops", [(1, False), (2, False), (3, True)])
def test_a_bad_byte_costs_its_paragraph(tmp_path, bad, stops):
  (tmp_path / "a.txt").write_bytes("\n\n".join(GOOD).encode() + b"\n\ncaf\xe9" * bad)
  path = mixture(tmp_path, ["a.txt"], "text", documents="paragraphs")
  if not stops:
    assert counts(path, tmp_path) == (40, {"not_utf8": bad})
    return
  with pytest.raises(DataError, match=rf"{bad} of {40 + bad} rows.*a\.txt, paragraph 41: .*0xe9"):
    counts(path, tmp_path)


def test_beyond_a_share_files_of_text_that_are_no_utf8_stop_the_preparation(tmp_path):
  for i, text in enumerate(GOOD):
    (tmp_path / f"{i:02}.txt").write_text(text)
  path = mixture(tmp_path, ["*.txt"], "text")
  (tmp_path / "x0.txt").write_bytes(b"\xff")
  assert counts(path, tmp_path) == (40, {"not_utf8": 1})
  for i in (1, 2):
    (tmp_path / f"x{i}.txt").write_bytes(b"\xff")
  with pytest.raises(DataError, match=r"3 of 43 rows are no text .*x0\.txt: .*0xff"):
    counts(path, tmp_path)


@pytest.mark.parametrize("suffix", [".GZ", ".zstd"])
def test_other_spellings_of_a_compression(tmp_path, suffix):
  codec = {".GZ": "gzip", ".zstd": "zstd"}[suffix]
  with (
    (tmp_path / f"a.jsonl{suffix}").open("wb") as raw,
    pa.output_stream(raw, compression=codec) as out,
  ):
    out.write(jsonl(GOOD).encode())
  assert counts(mixture(tmp_path, ["a.*"]), tmp_path) == (40, {})


@pytest.mark.parametrize("name", ["a.z.jsonl", "a.tar.notes.jsonl", "a"])
def test_a_name_that_only_holds_an_archive_s_is_read(tmp_path, name):
  (tmp_path / name).write_text(jsonl(GOOD))
  assert counts(mixture(tmp_path, ["a*"]), tmp_path) == (40, {})


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.zip", "a.tar.gz", "a.TGZ"])
def test_what_is_packed_otherwise_is_named_before_it_is_read(tmp_path, name):
  """An archive is text to a reader of lines: a header of tar would be a row that may be odd."""
  (tmp_path / name).write_bytes(jsonl(GOOD).encode())
  with pytest.raises(DataError, match=r"a\..* is not unpacked here; unpack the file"):
    counts(mixture(tmp_path, ["a.*"]), tmp_path)


def test_files_that_change_while_they_are_read(tmp_path, monkeypatch):
  """The digest of the old text would name the new one."""
  file, path = tmp_path / "a.jsonl", mixture(tmp_path, ["a.jsonl"])
  file.write_text(jsonl(GOOD))
  read = sources_files.documents

  def late(source):
    file.write_text(jsonl([text.upper() for text in GOOD]))
    yield from read(source)

  with monkeypatch.context() as patch:
    patch.setattr(sources_files, "documents", late)
    with pytest.raises(DataError, match="source 's' were changed while they were read"):
      counts(path, tmp_path)
  assert counts(path, tmp_path) == (40, {})
  assert not list((tmp_path / "data" / "sources").glob(".*.partial"))


def test_a_mixture_that_is_no_regular_file(tmp_path):
  os.mkfifo(tmp_path / "mix.toml")
  with pytest.raises(ConfigError, match="the mixture cannot be read: it is no regular file"):
    load_mixture(tmp_path / "mix.toml")
