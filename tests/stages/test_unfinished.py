"""Commands that fill a folder and are killed: the next of their kind removes what they left, and
says so; those that live lose nothing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from nmoe import files
from nmoe.errors import CheckpointError, NmoeError
from nmoe.records.provenance import REPO
from nmoe.records.root import Root
from stages import evals, export, imports, workbench
from stages.checkpoints import exportable

pytestmark = pytest.mark.faults
CHILD = """
import signal, sys
from nmoe.data import prepare
from nmoe.evals import sources
from nmoe.model import export as writing
from nmoe.records import checkpoint
from stages.cli import app
from stages.launch import local

def stop(*_):
  local.wait = waits
  print("half", flush=True)
  signal.pause()

waits = local.wait

checkpoint._seal = writing.write_tokenizer = prepare.write_manifest = sources.digest = stop
local.wait = stop
app(sys.argv[1:])
"""
ITEM = {"task": "pets", "context": "a", "choices": [" cat", " dog"], "gold": 0}


@pytest.fixture
def made(lab, tmp_path):
  """By kind: what the command reads, where it leaves a folder unfinished, and the command."""
  run, root = lab.record(), lab.root
  lab.attempt(run)
  quiet = Console(quiet=True)
  export.run(run, tmp_path / "hf", None, None, 5.0, "tensors", root, quiet)
  (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n")
  step = lab.checkpoints(run) / "step_00000012"
  out = tmp_path / "out"
  return {
    "import": (
      tmp_path / "hf",
      Root(root).imports,
      lambda c: imports.run(tmp_path / "hf", tmp_path / "a.toml", root, c),
    ),
    "export": (
      step,
      tmp_path,
      lambda c: export.run(str(step), out, None, None, 5.0, "tensors", root, c),
    ),
    "prep-mixture": (
      lab.file.with_name("mixture.toml"),
      Root(tmp_path / "fresh").data / "sources",
      lambda c: workbench.prepared(
        lab.file.with_name("mixture.toml"), "byte", tmp_path / "fresh", c
      ),
    ),
    "prep-evals": (
      tmp_path / "items.jsonl",
      Root(root).evals,
      lambda c: evals.prep(tmp_path / "items.jsonl", root, c),
    ),
  }


def begun(kind: str, source: Path, root: Path, out: str = "a.toml") -> subprocess.Popen:
  """A command in another process that stands still in the midst of its folder."""
  here = root.parent
  words = {
    "import": (source, here / out, "--root", root),
    "export": (source, here / "out", "--check", "tensors", "--root", root),
    "prep-evals": (source, "--root", root),
    "prep-mixture": (source, "--tokenizer", "byte", "--root", here / "fresh"),
    "eval": (source, "--suite", here / "mine.toml", "--root", root),
  }[kind]
  command = [sys.executable, "-c", CHILD, kind, *map(str, words)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  process = subprocess.Popen(command, cwd=REPO, **pipes)
  assert process.stdout.readline() == "half\n"
  return process


def partials(folder: Path) -> list[Path]:
  return sorted(folder.glob(".*.partial"))


@pytest.mark.parametrize("kind", ["import", "export", "prep-evals", "prep-mixture"])
def test_what_a_killed_command_left_the_next_one_removes_and_names(lab, made, kind):
  source, where, command = made[kind]
  process = begun(kind, source, lab.root)
  (left,) = partials(where)
  assert sum(f.stat().st_size for f in left.rglob("*")) > 50
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert partials(where) == [left]
  console = Console(record=True, width=300)
  command(console)
  assert f"removed {left}: a killed {kind} had left it" in console.export_text()
  assert partials(where) == partials(lab.root.parent) == []


INT, TERM = signal.SIGINT, signal.SIGTERM
INTERRUPTED = [("export", INT), ("export", TERM), ("import", TERM), ("prep-evals", INT)]
INTERRUPTED += [("prep-mixture", TERM), ("eval", INT), ("eval", TERM)]


@pytest.mark.parametrize(("kind", "number"), INTERRUPTED)
def test_a_command_that_is_interrupted_leaves_nothing(lab, made, tmp_path, kind, number):
  """Its exit status is 128 + the signal, as shells expect; nothing of it stays, or was recorded."""
  (tmp_path / "mine.toml").write_text('tasks = ["pets"]\n')
  run = lab.records.runs(lab.experiment.id)[0].id
  if kind == "eval":
    made["prep-evals"][2](Console(quiet=True))
  source, where, _ = made.get(kind, (run, tmp_path, None))
  before = files_of(tmp_path)
  process = begun(kind, source, lab.root)
  process.send_signal(number)
  _, said = process.communicate(timeout=60)
  assert (process.returncode, said) == (128 + number, "")
  remembered = Root(tmp_path / "fresh").data / "hashes.json"
  kept = {remembered, Root(lab.root).logs(run) / "rank_0.txt"}  # of the files read, of the ranks
  assert partials(where) == [] and files_of(tmp_path) - before <= kept
  assert lab.records.evaluations(run) == [] and len(lab.records.exports(run)) == 1


def files_of(folder: Path) -> set[Path]:
  """But those of locks, which stay."""
  return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("kind", ["import", "export"])
def test_of_several_that_begin_to_write_one_place_at_once_one_does(
  lab, made, tmp_path, monkeypatch, kind
):
  """All have looked, and found nobody, before the first begins; it ends once the others gave up."""
  _, where, command = made[kind]
  module, look = {"import": (imports, "importable"), "export": (export, "exportable")}[kind]
  looked, began, errors, ended = threading.Barrier(4), [], [], []
  seen, over = getattr(module, look), threading.Event()

  def all_look(*words):
    answer = seen(*words)
    looked.wait(30)
    return answer

  def one() -> None:
    try:
      command(Console(quiet=True))
      ended.append(kind)
    except NmoeError as error:
      errors.append(str(error))
      if len(errors) == 3:
        over.set()

  def waits(*words):
    began.append(words)
    assert over.wait(30), "the others did not give up"
    return work(*words)

  monkeypatch.setattr(module, look, all_look)
  name = {"import": "import_folder", "export": "write_folder"}[kind]
  work = getattr(module, name)
  monkeypatch.setattr(module, name, waits)
  threads = [threading.Thread(target=one) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  place = tmp_path / {"import": "a.toml", "export": "out"}[kind]
  said = rf"another process is writing {place}, in {tmp_path}/\.{place.name}-\w+\.partial; wait for"
  assert (len(began), ended) == (1, [kind])
  assert all(re.match(said, error) for error in errors), errors
  assert place.exists() and partials(tmp_path) == partials(where) == []


@pytest.mark.parametrize("kind", ["import", "export"])
def test_what_another_program_made_meanwhile_is_left_and_named(made, tmp_path, monkeypatch, kind):
  _, where, command = made[kind]
  module, name = {"import": (imports, "import_folder"), "export": (export, "write_folder")}[kind]
  place, work = tmp_path / {"import": "a.toml", "export": "out"}[kind], getattr(module, name)

  def meanwhile(*words):
    theirs = place if kind == "import" else place / "theirs"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("theirs")
    return work(*words)

  monkeypatch.setattr(module, name, meanwhile)
  with pytest.raises(NmoeError, match=f"^{place} is there already; name"):
    command(Console(quiet=True))
  kept = place if kind == "import" else place / "theirs"
  assert kept.read_text() == "theirs" and partials(tmp_path) == partials(where) == []


@pytest.mark.parametrize("kind", ["import", "prep-evals"])
def test_two_at_once_both_end(lab, made, kind):
  """The second neither removes what the first fills nor waits for it."""
  source, where, command = made[kind]
  process = begun(kind, source, lab.root, "other.toml")
  (left,) = partials(where)
  console = Console(record=True, width=300)
  command(console)
  assert "removed" not in console.export_text() and partials(where) == [left]
  process.kill()
  process.wait()


def test_a_second_export_to_one_folder_is_refused_at_once(lab, made, tmp_path):
  source, _, command = made["export"]
  process = begun("export", source, lab.root)
  (left,) = partials(tmp_path)
  with pytest.raises(
    CheckpointError, match="another process is writing .*out, in .*; wait for it, or"
  ):
    exportable(str(source), tmp_path / "out", None, None, None, lab.root)
  with pytest.raises(CheckpointError, match="another process is writing"):
    command(Console(quiet=True))
  assert partials(tmp_path) == [left]
  more = (None, None, 5.0, "tensors", lab.root, Console(quiet=True))
  export.run(str(source), tmp_path / "other", *more)
  assert partials(tmp_path) == [left]
  process.kill()
  process.wait()


def test_an_import_that_another_was_faster_with_ends_well(lab, made, tmp_path, monkeypatch):
  """The folder of the same digest appears between the look and the rename."""
  source, where, command = made["import"]
  renamed = Path.rename

  def faster(self, target):
    if self.name.endswith(".partial") and self.parent == where:
      target.mkdir()
      (target / "theirs").touch()
    return renamed(self, target)

  with monkeypatch.context() as patched:
    patched.setattr(Path, "rename", faster)
    command(Console(quiet=True))
  (there,) = where.iterdir()
  assert [f.name for f in there.iterdir()] == ["theirs"]


def test_folders_of_many_threads_and_a_cleaner(tmp_path):
  """Whoever fills a folder keeps it, however often others clear meanwhile."""
  errors, over = [], threading.Event()

  def fill(number: int) -> None:
    try:
      for i in range(40):
        with files.unfinished(tmp_path, "x") as folder:
          (folder / "a").write_text("a")
          folder.rename(tmp_path / f"{number}-{i}")
    except OSError as error:
      errors.append(error)

  def clear() -> None:
    while not over.is_set():
      files.clear_unfinished(tmp_path, "x")

  workers = [threading.Thread(target=fill, args=(n,)) for n in range(4)]
  cleaner = threading.Thread(target=clear)
  for thread in (cleaner, *workers):
    thread.start()
  for thread in workers:
    thread.join()
  over.set()
  cleaner.join()
  assert errors == [] and len(list(tmp_path.iterdir())) == 160
  (tmp_path / ".y-01234567.partial").mkdir()
  (tmp_path / ".x-01234567.partial").mkdir()
  (tmp_path / ".x-0123456.partial").mkdir()
  assert [p.name for p in files.clear_unfinished(tmp_path, "x")] == [".x-01234567.partial"]


def test_on_a_filesystem_without_locks_nothing_is_taken_for_left(tmp_path, monkeypatch):
  def none(*_):
    raise OSError(95, "Operation not supported")

  left = tmp_path / ".x-01234567.partial"
  left.mkdir()
  monkeypatch.setattr("fcntl.flock", none)
  with files.unfinished(tmp_path, "x") as folder:
    assert files.clear_unfinished(tmp_path, "x") == [] and folder.is_dir()
  assert files.under_way(tmp_path, "x") == [left]
