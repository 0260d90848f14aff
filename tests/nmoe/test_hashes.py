"""What is remembered of files: nothing that their size, time or inode contradicts."""

import hashlib
import os
from pathlib import Path

import pytest
from test_sources import BYTE, GOOD, jsonl, mixture

from nmoe.data import hashes
from nmoe.data.hashes import Hashes
from nmoe.data.mixture import load_mixture
from nmoe.data.prepare import prepare
from nmoe.data.prepared import open_data
from nmoe.errors import DataError
from nmoe.files import sha256

pytestmark = pytest.mark.faults


def old(path: Path, age: float = 100.0) -> None:
  stat = path.stat()
  os.utime(path, (stat.st_atime - age, stat.st_mtime - age))


@pytest.fixture
def count(monkeypatch) -> list[str]:
  """The names of the files that are hashed, as they are."""
  names = []

  def counted(file):
    names.append(Path(file).name)
    return sha256(file)

  monkeypatch.setattr(hashes, "sha256", counted)
  return names


def test_unchanged_files_are_hashed_once(tmp_path, count):
  (tmp_path / "a.jsonl").write_text(jsonl(GOOD))
  old(tmp_path / "a.jsonl")
  source = load_mixture(mixture(tmp_path, ["a.jsonl"]))
  folder = prepare(source, BYTE, tmp_path)
  for file in tmp_path.rglob("*.npy"):
    old(file)
  open_data(folder)
  count.clear()
  assert prepare(source, BYTE, tmp_path) == folder and open_data(folder)
  assert count == []
  prepare(source, BYTE, tmp_path, anew=True)
  assert set(count) >= {"a.jsonl", "train-tokens-00000.npy"}, "on demand all are read"


@pytest.mark.parametrize("change", ["size", "time", "inode", "young"])
def test_what_may_have_changed_is_read(tmp_path, count, change):
  file = tmp_path / "a"
  file.write_bytes(b"one")
  if change != "young":
    old(file)
  with Hashes(tmp_path / "hashes.json") as hash_of:
    hash_of(file)
  stat = file.stat()
  if change == "inode":
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "b").rename(file)
  else:
    file.write_bytes(b"three" if change == "size" else b"two")
  if change != "time":
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  found = Hashes(tmp_path / "hashes.json")(file)
  assert found == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 1}', b"\xff", b"[" * 10**5])
def test_a_damaged_memory_costs_time_only(tmp_path, damage):
  (tmp_path / "hashes.json").write_bytes(damage)
  (tmp_path / "a").write_bytes(b"one")
  old(tmp_path / "a")
  with Hashes(tmp_path / "hashes.json") as hash_of:
    assert hash_of(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
  assert str(tmp_path / "a") in (tmp_path / "hashes.json").read_text()


def test_rot_behind_the_memory_is_found_on_demand(tmp_path):
  """The same size, time and inode with another bit: only reading tells."""
  (tmp_path / "a.jsonl").write_text(jsonl(GOOD))
  source = load_mixture(mixture(tmp_path, ["a.jsonl"]))
  folder = prepare(source, BYTE, tmp_path)
  shard = next(tmp_path.rglob("train-tokens-00000.npy"))
  old(shard)
  open_data(folder)
  stat, data = shard.stat(), bytearray(shard.read_bytes())
  data[-1] ^= 1
  with shard.open("r+b") as file:
    file.write(data)
  os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  open_data(folder)
  with pytest.raises(DataError, match=r"train-tokens-00000\.npy: sha256 is"):
    prepare(source, BYTE, tmp_path, anew=True)
