"""Provenance holds the code of a run, and never what else lies around."""

import subprocess

import pytest

from nmoe.records import provenance as module
from nmoe.records.provenance import provenance

pytestmark = pytest.mark.faults


def git(folder, *arguments):
  who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
  subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
  folder = tmp_path / "checkout"
  for package in ("nmoe", "stages", "kernels", "configs"):
    (folder / package).mkdir(parents=True)
    (folder / package / "a.py").write_text("x = 1\n")
  (folder / "notes.md").write_text("public\n")
  git(tmp_path, "init", "-q", str(folder))
  git(folder, "add", ".")
  git(folder, "commit", "-q", "-m", "first")
  return folder


def test_it_is_of_the_code_only(checkout):
  (checkout / "venv" / "lib").mkdir(parents=True)
  (checkout / "venv" / "lib" / "a.py").write_text("x = 1\n")
  (checkout / "secrets.toml").write_text('t = "hf_x"\n')
  (checkout / "notes.md").write_text("hf_x\n")
  (checkout / "nmoe" / "new.py").write_text("y = 2\n")
  diff = provenance(checkout)[1]
  assert "nmoe/new.py" in diff and "venv/" not in diff and "hf_x" not in diff


def test_the_diff_makes_the_code_again(checkout, tmp_path):
  changed = {
    "nmoe/a.py": "x = 2\n",
    "nmoe/new.py": "y = 2\nz = 3",
    "kernels/deep/empty.py": "",
    "configs/ü b.toml": "[a]\n",
    "stages/one.py": "\n",
  }
  for name, text in changed.items():
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text(text)
  (tmp_path / "changes.patch").write_text(provenance(checkout)[1])
  git(tmp_path, "clone", "-q", str(checkout), str(tmp_path / "clone"))
  git(tmp_path / "clone", "apply", str(tmp_path / "changes.patch"))
  for name, text in changed.items():
    assert (tmp_path / "clone" / name).read_text() == text


def test_many_untracked_files_cost_one_call(checkout, monkeypatch):
  for i in range(50):
    (checkout / "nmoe" / f"n{i}.py").write_text("x = 1\n")
  calls, run = [], module.subprocess.run
  monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
  assert provenance(checkout)[1].count("+x = 1") == 50
  assert len(calls) <= 4


def test_what_is_too_large_is_named_and_left_out(checkout):
  (checkout / "configs" / "big.toml").write_text("# " + "x" * module.LARGEST + "\n")
  (checkout / "nmoe" / "new.py").write_text("y = 2\n")
  diff = provenance(checkout)[1]
  assert len(diff) < 2000 and "left out: configs/big.toml" in diff and "+y = 2" in diff
