"""What of building kernels needs no CUDA package: when a run starts a build beside itself."""

import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from labs import Lab

from kernels.shapes import Shapes
from kernels.tools import build
from nmoe.config.shapes import kernel_shapes
from stages.launch import local as launch


@pytest.fixture
def shapes(lab: Lab) -> Shapes:
  return kernel_shapes(lab.config)


@pytest.fixture
def child(monkeypatch, tmp_path) -> Path:
  """Builds run this instead: it waits for the file `go`, and leaves the stamps if that says so."""
  go = tmp_path / "go"
  script = (
    "import pathlib, sys, time\n"
    f"go = pathlib.Path({str(go)!r})\n"
    "while not go.exists(): time.sleep(0.01)\n"
    "print('built')\n"
    "if go.read_text(): pathlib.Path(sys.argv[2]).touch()\n"
  )
  monkeypatch.setattr(build, "_child", lambda *_: ([sys.executable, "-c", script], {}))
  return go


def test_one_process_builds_until_it_is_done(shapes, child, tmp_path):
  log = tmp_path / "log.txt"
  arguments = shapes, "sm_90a", tmp_path, {}, log
  first = build.start(*arguments)
  assert build.start(*arguments) is None
  other = build.start(replace(shapes, dim=2 * shapes.dim), *arguments[1:])
  assert other is not None
  child.write_text("")
  assert first.wait(10) == other.wait(10) == 0
  assert log.read_text() == "built\nbuilt\n"
  child.write_text("stamp")
  again = build.start(*arguments)  # the first ended without a stamp
  assert again.wait(10) == 0
  assert build.start(*arguments) is None


def test_what_a_stamp_depends_on(shapes, monkeypatch, tmp_path):
  def stamp(shapes=shapes, arch="sm_90a"):
    return build.stamp(shapes, arch, tmp_path)

  first = stamp()
  assert first == stamp() and first.is_relative_to(tmp_path / "sm_90a")
  others = {stamp(replace(shapes, seq_len=2 * shapes.seq_len)), stamp(arch="sm_100a")}
  with monkeypatch.context() as patch:
    version = SimpleNamespace(version="0.0.1")
    patch.setattr(metadata, "distributions", lambda name: iter([version]))
    others.add(stamp())
  with monkeypatch.context() as patch:
    read = Path.read_bytes
    patch.setattr(Path, "read_bytes", lambda p: read(p) + b"#" * (p.name == "loss.py"))
    others.add(stamp())
  assert first == stamp() and len(others | {first}) == 5


@pytest.mark.parametrize("arch, started", [("cpu", 0), ("sm_90a", 1)])
def test_a_run_on_a_gpu_builds_beside_its_start(lab, monkeypatch, tmp_path, arch, started):
  calls = []
  monkeypatch.setattr(build, "start", lambda *arguments: calls.append(arguments))
  config = replace(lab.config, target=replace(lab.config.target, arch=arch))
  assert launch.compile_beside(tmp_path, config, tmp_path) == []
  assert len(calls) == started
  if started:
    shapes, arch, cache, _, log = calls[0]
    assert (shapes, arch) == (kernel_shapes(config), "sm_90a")
    assert (cache, log) == (tmp_path / "kernel_cache", tmp_path / "kernels.txt")
