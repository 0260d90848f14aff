"""Provenance holds the code of a run, and never what else lies around."""

import os
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


@pytest.mark.parametrize(
  "key, value",
  [
    ("diff.noprefix", "true"),
    ("diff.mnemonicPrefix", "true"),
    ("diff.up.textconv", "tr a-z A-Z <"),
  ],
)
def test_the_diff_is_the_same_whatever_git_is_told_to_show(checkout, key, value):
  (checkout / "nmoe" / "a.py").write_text("x = 2\n")
  plain = provenance(checkout)[1]
  git(checkout, "config", key, value)
  (checkout / ".git" / "info" / "attributes").write_text("*.py diff=up\n")
  assert provenance(checkout)[1] == plain
  assert "--- a/nmoe/a.py\n+++ b/nmoe/a.py\n" in plain and "+x = 2\n" in plain


def test_the_repository_that_answers_is_the_code_s(checkout, tmp_path, monkeypatch):
  """Neither the one that a hook's environment names nor one around an installed package."""
  other = tmp_path / "other"
  installed = other / ".venv" / "site-packages"
  (installed / "nmoe").mkdir(parents=True)
  (installed / "nmoe" / "a.py").write_text("x = 1\n")
  (other / ".gitignore").write_text(".venv\n")
  git(tmp_path, "init", "-q", str(other))
  git(other, "add", ".")
  git(other, "commit", "-q", "-m", "theirs")
  ours = provenance(checkout)
  assert len(ours[0]) == 40 and provenance(installed)[:2] == ("", "")
  monkeypatch.setenv("GIT_DIR", str(other / ".git"))
  monkeypatch.setenv("GIT_WORK_TREE", str(other))
  assert provenance(checkout) == ours


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_checkout_of_another_user_has_its_commit(checkout):
  """As in a container; git says "dubious ownership" and nothing more."""
  commit = provenance(checkout)[0]
  for path in (checkout, checkout / ".git"):
    os.chown(path, 12345, 12345)
  assert provenance(checkout)[0] == commit != ""


def test_what_is_no_file_is_no_code(checkout):
  """Emacs marks a file that it changes by a link to nowhere, .#name.py."""
  before = provenance(checkout)
  (checkout / "nmoe" / ".#a.py").symlink_to("somebody@host.1234:5678")
  (checkout / "kernels" / "loop.py").symlink_to("loop.py")
  (checkout / "stages" / "d.py").mkdir()
  (checkout / "nmoe" / "e.py").mkdir()
  os.mkfifo(checkout / "nmoe" / "f.py")
  assert provenance(checkout) == before
