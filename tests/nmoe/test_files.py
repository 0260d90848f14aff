"""Files that several processes write, or that a killed one left."""

import os
import threading
import time
from pathlib import Path

import pytest

from nmoe import files

pytestmark = pytest.mark.faults


def test_several_that_write_one_file_do_not_meet(tmp_path):
  """Each whole, the last one stays, nothing beside it."""
  path, texts, errors = tmp_path / "index.html", [str(n) * 100_000 for n in range(8)], []

  def write(text: str) -> None:
    try:
      for _ in range(20):
        files.replace(path, text)
        assert path.read_text(encoding="utf-8") in texts
    except (OSError, AssertionError) as error:
      errors.append(error)

  threads = [threading.Thread(target=write, args=(text,)) for text in texts]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert errors == [] and os.listdir(tmp_path) == ["index.html"]


def test_what_a_kill_left_is_removed_once_nobody_can_be_at_it(tmp_path):
  old, young = tmp_path / ".a-0123.new", tmp_path / ".a-4567.new"
  for path in (old, young):
    path.write_text("half")
  os.utime(old, (time.time() - 2 * files.STALE_S,) * 2)
  assert files.replace(tmp_path / "a", "whole") == tmp_path / "a"
  assert sorted(os.listdir(tmp_path)) == [".a-4567.new", "a"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  path = files.replace(tmp_path / "a", "before")

  def full(self, *_, **__):
    self.touch()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Path, "write_text", full)
  with pytest.raises(OSError, match="No space"):
    files.replace(path, "after")
  assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]
