"""The target: what a machine must be, and what the error says when it is not."""

import re
import subprocess
import sys
from email.message import Message
from types import ModuleType

import pytest
import torch

from kernels import reference
from nmoe.config.file import changed, load
from nmoe.config.sections import Config
from nmoe.errors import TargetError
from nmoe.machine import target
from nmoe.machine.versions import (
  NVSHMEM,
  Requirement,
  python_clauses,
  requirements,
  satisfies,
)
from nmoe.model.decoder import Model
from nmoe.records.provenance import REPO

SMALL = {"data.seq_len": 32, "train.micro_batch": 1, "schedule.batch_tokens": 128}


@pytest.fixture(autouse=True)
def restore_torch():
  threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
  yield
  torch.set_num_threads(threads)
  torch.use_deterministic_algorithms(deterministic)


def config(**values) -> Config:
  return changed(load("configs/moonlet/cpu.toml", env={}), values)


def gpu(
  monkeypatch, name: str, capability: tuple[int, int], versions: dict[str, str | None]
) -> None:
  """A machine with one GPU and the pinned packages but for `versions`."""
  pinned = {
    r.name: re.search(r"[=>]=([\w.]+)", r.line)[1] for r in requirements() if r.extra == "cuda"
  }
  monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
  monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
  monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
  monkeypatch.setattr(target, "installed", (pinned | versions).get)


def test_cpu_is_the_reference_with_determinism_and_threads():
  chosen = target.select(config(**{"launch.threads": 1}))
  assert chosen.ops is reference and chosen.device == torch.device("cpu")
  assert 1e8 < chosen.peak_flops < 1e14 and chosen.name
  assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
  target.select(config(**{"target.deterministic": False}))
  assert not torch.are_deterministic_algorithms_enabled()


def test_threads_default_to_the_cores_shared_by_the_ranks(monkeypatch):
  monkeypatch.setattr(target.os, "sched_getaffinity", lambda _: set(range(8)))
  target.select(config(**SMALL, **{"launch.ranks": 4}))
  assert torch.get_num_threads() == 2


def test_many_cores_are_not_many_threads(monkeypatch):
  """A check of 64 small experts took 27 s with 2 threads and over 190 s with the 64 of its host."""
  monkeypatch.setattr(target.os, "sched_getaffinity", lambda _: set(range(64)))
  target.select(config(**{"launch.threads": 0}))
  assert torch.get_num_threads() == target.MOST_THREADS
  target.select(config(**{"launch.threads": 12}))
  assert torch.get_num_threads() == 12


def test_a_training_step_runs_under_determinism():
  c = config(**SMALL)
  model = Model(c, target.select(c).ops)
  model.init_weights(0)
  tokens = torch.arange(32)[None] % 7
  out = model(tokens, tokens)
  (out.loss_sum + out.balance_loss).backward()
  assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arch", ["sm_100a", "sm_90a"])
def test_no_gpu(arch, monkeypatch):
  monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
  with pytest.raises(
    TargetError, match=rf'target.arch = "{arch}" needs .* finds no CUDA device'
  ) as e:
    target.select(config(**{"target.arch": arch, "target.dtype": "bf16"}))
  assert 'set arch = "cpu" under [target]' in str(e.value)


@pytest.mark.parametrize(
  ("arch", "name", "capability", "line"),
  [
    ("sm_100a", "NVIDIA H200", (9, 0), 'arch = "sm_90a"'),
    ("sm_90a", "NVIDIA B200", (10, 0), 'arch = "sm_100a"'),
    ("sm_100a", "NVIDIA B300", (10, 3), 'arch = "cpu"'),
    ("sm_90a", "NVIDIA A100", (8, 0), 'arch = "cpu"'),
  ],
)
def test_another_gpu_is_never_a_downshift(arch, name, capability, line, monkeypatch):
  gpu(monkeypatch, name, capability, {})
  found = f"{capability[0]}.{capability[1]}"
  with pytest.raises(TargetError, match=rf"found {name} \({found}\)") as error:
    target.select(config(**{"target.arch": arch, "target.dtype": "bf16"}))
  assert line in str(error.value)


@pytest.mark.parametrize(
  ("versions", "found", "pip"),
  [
    ({"quack-kernels": None}, "quack-kernels not installed", "'quack-kernels==0.6.5'"),
    (
      {"nvidia-cutlass-dsl": "4.7.1"},
      "nvidia-cutlass-dsl 4.7.1",
      "'nvidia-cutlass-dsl[cu13]==4.8.1'",
    ),
  ],
)
def test_missing_or_other_packages(versions, found, pip, monkeypatch):
  gpu(monkeypatch, "NVIDIA H200", (9, 0), versions)
  with pytest.raises(TargetError) as error:
    target.examine("sm_90a")
  assert f"found {found}. Run: pip install {pip}" in str(error.value)


def test_nvshmem_is_needed_from_two_ranks_on(monkeypatch):
  gpu(monkeypatch, "NVIDIA H200", (9, 0), {"nvshmem4py-cu13": None})
  assert target.examine("sm_90a", ranks=1) == "NVIDIA H200"
  with pytest.raises(TargetError, match="nvshmem4py-cu13 not installed"):
    target.examine("sm_90a", ranks=2)


def test_a_gpu_picks_the_cuda_operations(monkeypatch):
  """The one import by name: kernels.cuda, on the rank's device; or what failed."""
  gpu(monkeypatch, "NVIDIA H200", (9, 0), {})
  ops, used = ModuleType("kernels.cuda"), []
  monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
  monkeypatch.setattr(torch.cuda, "set_device", used.append)
  monkeypatch.setitem(sys.modules, "kernels.cuda", ops)
  c = config(**{"target.arch": "sm_90a", "target.dtype": "bf16"})
  chosen = target.select(c, rank=3)
  assert chosen.ops is ops and chosen.name == "NVIDIA H200" and chosen.peak_flops == 989e12
  assert used == [torch.device("cuda", 1)]
  monkeypatch.setitem(sys.modules, "kernels.cuda", None)
  with pytest.raises(TargetError, match="kernels.cuda cannot be imported"):
    target.select(c)


def test_the_cpu_target_never_imports_the_cuda_stack():
  code = (
    "import sys; from nmoe.config.file import load; from nmoe.machine.target import select; "
    "select(load('configs/moonlet/cpu.toml')); "
    "print([m for m in ('cutlass', 'quack', 'nvshmem', 'kernels.cuda') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
  ("version", "clauses", "ok"),
  [
    ("2.13.0+cu130", "==2.13.0", True),
    ("2.13", "==2.13.0", True),
    ("2.11.0", "==2.13.0", False),
    ("6.0.0", ">=5.2,<6", False),
    ("5.10", ">=5.2,<6", True),
    ("3.11.7", ">=3.11,<3.13", True),
    ("6", "==6.0.0", True),
    ("3.13.0rc1", ">=3.11,<3.13", False),
    ("4.0.0b36", "==4.0.0b36", True),
    ("4.0.0b35", "==4.0.0b36", False),
  ],
)
def test_versions_compare_by_release(version, clauses, ok):
  assert satisfies(version, clauses) == ok


def test_torch_pins_another_nvshmem():
  """pip refuses an extra that asks for ours beside torch's CUDA wheel, so it is installed after, of
  one version. Python has it twice: `kernels` knows nothing of `nmoe`, and the doctor must not need
  `kernels`, since a foreign package of that name is one of the things that it finds.
  """
  name, _, version = NVSHMEM.partition("==")
  assert f'"{name}' not in (REPO / "pyproject.toml").read_text()
  for file in ("Dockerfile", ".ci/run", "README.md", "nmoe/machine/versions.py"):
    found = re.findall(rf"--no-deps ({name}==[\d.]+\d)", (REPO / file).read_text())
    assert set(found) == {NVSHMEM}, file
  assert f'LIBRARY = "{version}"' in (REPO / "kernels/cuda/symmetric.py").read_text()


def test_requirements_are_the_project_files(monkeypatch, tmp_path):
  """The checkout's file and an installed wheel's metadata say the same."""
  from_file = requirements()
  assert Requirement("torch", "torch==2.13.0", "") in from_file
  assert Requirement("nvidia-cutlass-dsl", "nvidia-cutlass-dsl[cu13]==4.8.1", "cuda") in from_file
  assert python_clauses() == ">=3.11,<3.15"
  declared = [r for r in from_file if r.line != NVSHMEM]
  lines = [f'{r.line}; extra == "{r.extra}"' if r.extra else r.line for r in declared]
  monkeypatch.setattr("nmoe.machine.versions._PROJECT", tmp_path / "pyproject.toml")
  about = Message()
  for extra in {r.extra for r in from_file if r.extra}:
    about["Provides-Extra"] = extra
  monkeypatch.setattr("nmoe.machine.versions.metadata.requires", lambda name: lines)
  monkeypatch.setattr("nmoe.machine.versions.metadata.metadata", lambda name: about)
  assert requirements() == from_file
