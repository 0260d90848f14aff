"""The doctor's findings: each fault is seen, named, and comes with a remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe import files
from nmoe.config.file import changed, load
from nmoe.config.sections import Config
from nmoe.machine import doctor


def config(root: Path, **values) -> Config:
  values = {"run.root": str(root), "target.dtype": "bf16"} | values
  return changed(load("configs/moonlet/cpu.toml", env={}), values)


def found(checks, name: str) -> doctor.Check:
  return next(check for check in checks if check.name == name)


@pytest.fixture
def no_probe(monkeypatch):
  """Child processes answer at once: every target works, no driver."""

  def run(command):
    if command[0] == "nvidia-smi":
      raise FileNotFoundError(command[0])
    return json.dumps({arch: {"name": "a machine"} for arch in ("cpu", "sm_90a", "sm_100a")})

  monkeypatch.setattr(doctor, "_run", run)


def test_this_machine_is_well(tmp_path):
  """The real thing, child process and all, for the cpu target."""
  checks = doctor.examine(config(tmp_path / "root"))
  assert [c for c in checks if not c.ok] == []
  names = [c.name for c in checks]
  assert {"python", "torch", "package kernels", "target cpu", "root", "locks"} <= set(names)
  assert "target sm_90a" not in names and not (tmp_path / "root").exists()
  assert list(tmp_path.iterdir()) == []


def test_without_a_configuration_every_target_is_named(no_probe):
  names = [c.name for c in doctor.examine()]
  assert {"target cpu", "target sm_90a", "target sm_100a"} <= set(names)
  assert "root" not in names


def test_a_gpu_configuration_wants_driver_and_packages(no_probe, tmp_path, monkeypatch):
  monkeypatch.setattr(doctor, "installed", {"torch": "2.11.0+cu130"}.get)
  checks = doctor.examine(config(tmp_path, **{"target.arch": "sm_90a"}))
  assert not found(checks, "nvidia driver").ok
  quack = found(checks, "quack-kernels")
  assert not quack.ok and quack.remedy == "pip install 'quack-kernels==0.6.5'"
  assert "not installed (wanted: quack-kernels==0.6.5)" in quack.found
  assert found(checks, "torch").ok
  on_cpu = doctor.examine(config(tmp_path))
  assert found(on_cpu, "quack-kernels").ok and found(on_cpu, "nvidia driver").ok
  assert not found(on_cpu, "duckdb").ok


def test_an_old_torch_is_refused(no_probe, monkeypatch):
  monkeypatch.setattr(doctor, "installed", {"torch": "2.10.0"}.get)
  check = found(doctor.examine(), "torch")
  assert not check.ok and check.remedy == "pip install 'torch==2.13.0'"


def test_a_foreign_package_that_shadows_ours_is_named(no_probe, tmp_path):
  """A `kernels` earlier on the path, as PyPI has one, in a process of its own."""
  (tmp_path / "kernels").mkdir()
  (tmp_path / "kernels" / "__init__.py").write_text("")
  code = (
    "import sys; sys.path.insert(0, sys.argv[1]); from nmoe.machine import doctor; "
    "print([(c.name, c.found) for c in doctor._shadows() if not c.ok])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
  )
  assert "package kernels" in done.stdout and str(tmp_path) in done.stdout
  assert "package nmoe" not in done.stdout


def test_a_foreign_distribution_in_the_same_folder_is_named(monkeypatch):
  monkeypatch.setattr(
    doctor.metadata, "packages_distributions", lambda: {"kernels": ["kernels", "nmoe"]}
  )
  (check,) = [c for c in doctor._shadows() if not c.ok]
  assert check.name == "package kernels" and "pip uninstall kernels" in check.remedy


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch):
  def run(command):
    raise subprocess.CalledProcessError(1, command, stderr="Traceback\nOSError: libcudart.so.13")

  monkeypatch.setattr(doctor, "_run", run)
  check = found(doctor.examine(), "target")
  assert not check.ok and "libcudart.so.13" in check.found


def test_the_wrong_target_is_reported_with_its_message(tmp_path, monkeypatch):
  answers = {"cpu": {"name": "x"}, "sm_100a": {"error": "needs compute capability 10.0"}}
  monkeypatch.setattr(doctor, "_run", lambda command: json.dumps(answers))
  check = found(doctor.examine(config(tmp_path, **{"target.arch": "sm_100a"})), "target sm_100a")
  assert not check.ok and "10.0" in check.found


def test_a_root_that_is_a_file_or_too_small(no_probe, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  check = found(doctor.examine(config(tmp_path / "file")), "root")
  assert not check.ok and "run.root" in check.remedy
  usage = doctor.shutil.disk_usage(tmp_path)._replace(free=1 << 20)
  monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
  check = found(doctor.examine(config(tmp_path)), "root")
  assert not check.ok and "0.0 GB free" in check.found


def test_a_filesystem_without_locks(no_probe, tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(37, "No locks available")

  monkeypatch.setattr(files.fcntl, "flock", refuse)
  check = found(doctor.examine(config(tmp_path)), "locks")
  assert not check.ok and "No locks available" in check.found and "local disk" in check.remedy
  monkeypatch.setattr(files.fcntl, "flock", lambda *_: None)
  check = found(doctor.examine(config(tmp_path)), "locks")
  assert not check.ok and "ignored" in check.found


def test_nvshmem_reports_its_version(no_probe, tmp_path, monkeypatch):
  """Two ranks on GPUs: the library's own version, or its absence with the pip line."""

  def missing(name):
    raise doctor.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(doctor.metadata, "distribution", missing)
  small = {"data.seq_len": 32, "train.micro_batch": 1, "schedule.batch_tokens": 64}
  c = config(tmp_path, **small, **{"target.arch": "sm_90a", "launch.ranks": 2})
  check = found(doctor.examine(c), "nvshmem library")
  assert not check.ok and check.remedy == "pip install --no-deps 'nvidia-nvshmem-cu13==3.8.0'"


@pytest.mark.parametrize(
  ("driver", "library", "module", "said"),
  [
    ("580.159.03", False, False, "through peer memory only: UCX wants GDRCopy"),
    ("580.159.03", True, False, "through peer memory only: UCX wants GDRCopy"),
    ("580.159.03", True, True, "through peer memory; GDRCopy is there"),
    ("610.12", False, False, "through peer memory; driver 610.12 serves UCX"),
  ],
)
def test_puts_say_how_far_they_reach(tmp_path, monkeypatch, driver, library, module, said):
  def load(name):
    if not library:
      raise OSError(name)

  def run(command):
    return driver + "\n" if command[0] == "nvidia-smi" else json.dumps({"sm_90a": {"name": "x"}})

  monkeypatch.setattr(doctor.ctypes, "CDLL", load)
  monkeypatch.setattr(doctor, "GDRCOPY", str(tmp_path if module else tmp_path / "none"))
  monkeypatch.setattr(doctor, "_run", run)
  monkeypatch.setattr(doctor, "_nvshmem", lambda: doctor.Check("nvshmem library", True, "3.8.0"))
  small = {"data.seq_len": 32, "train.micro_batch": 1, "schedule.batch_tokens": 64}
  small |= {"target.arch": "sm_90a", "launch.ranks": 2}
  assert "rdep puts" not in [c.name for c in doctor.examine(config(tmp_path, **small))]
  check = found(
    doctor.examine(config(tmp_path, **small, **{"rdep.peer_access": False})), "rdep puts"
  )
  assert check.ok and check.found.startswith(said)
