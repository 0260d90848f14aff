"""Export and import of models larger than memory: bits, peak memory, and a disk that fills up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from labs import whole_experts
from model_configs import tiny
from safetensors.torch import save_file

from kernels import reference
from nmoe.config import file as configs
from nmoe.errors import CheckpointError
from nmoe.model import export, imports
from nmoe.model.decoder import Model
from nmoe.model.export import Source, compare_tensors, write_folder
from nmoe.model.imports import import_folder
from nmoe.model.names import to_hf
from nmoe.records import checkpoint
from nmoe.records.root import Root

WIDE = {
  "model__dim": 256,
  "model__num_layers": 13,
  "model__vocab_size": 257,
  "moe__num_experts": 16,
  "moe__expert_dim": 1024,
  "target__dtype": "bf16",
}
LAYER = 16 * 3 * 256 * 1024 * 2  # bytes of the experts, nearly all of a layer
SLACK = 128 << 20  # pages of libraries, and of the one file that is mapped
FREED = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed is given back, as are large layers
CHILD = """
import sys
from pathlib import Path
from nmoe.model import safetensors
from nmoe.model.export import Source, compare_tensors, write_folder
from nmoe.model.imports import import_folder
from nmoe.records.root import Root

def peak():  # KiB; that of getrusage has the parent's in it
  status = Path("/proc/self/status").read_text()
  return int(status.partition("VmHWM:")[2].split()[0])

safetensors.MAPPED = 16 << 20
folder = Path(sys.argv[1])
before = peak()
peaks = []
source = Source.open(folder / "step_00000000", None)
(folder / "hf").mkdir()
write_folder(source, folder / "hf", 50_000_000)
peaks.append(peak() - before)
compare_tensors(source, folder / "hf")
peaks.append(peak() - before)
import_folder(folder / "hf", Root(folder / "root"))
peaks.append(peak() - before)
if len(sys.argv) > 2:
  source.read([name for part in source.parts() for name in part])
  peaks.append(peak() - before)
print(*peaks)
"""


def state_of(config):
  model = Model(config, reference)
  model.init_weights(3)
  for router in model.routers:
    router.bias.copy_(torch.linspace(-0.1, 0.1, len(router.bias)))
  return model.state_dict()


def written(folder, config, state):
  meta = {"run": "r", "config": configs.to_toml(config)}
  return checkpoint.save(folder, 0, state, 0, meta)


def write_half(group, folder, toml):
  """A rank of two with its half of the experts, as in a run of expert parallelism."""
  config, rank = configs.loads(toml), group.rank()
  state = state_of(config)
  half = config.moe.num_experts // 2
  mine = {
    name: tensor[rank * half :][:half] if ".experts." in name else tensor
    for name, tensor in state.items()
  }
  meta = {"run": "r", "config": toml}
  checkpoint.save(Path(folder), 0, mine, rank * half, meta, group)


def test_one_and_two_writers_export_and_import_the_same_bits(tmp_path):
  config = tiny(model__vocab_size=257)
  state = state_of(config)
  (tmp_path / "one").mkdir()
  (tmp_path / "two").mkdir()
  written(tmp_path / "one", config, state)
  ranks.run(write_half, 2, str(tmp_path / "two"), configs.to_toml(config))
  assert len(list((tmp_path / "two" / "step_00000000").glob("__1_*.distcp"))) == 1
  files, digests = [], []
  for name in ("one", "two"):
    out = tmp_path / name / "hf"  # its name is part of the digest
    out.mkdir()
    source = Source.open(tmp_path / name / "step_00000000", None)
    files.append(write_folder(source, out, 20_000).files)
    assert compare_tensors(source, out) == len(state)
    digests.append(import_folder(out, Root(tmp_path / "root")).digest)
  assert files[0] == files[1] and digests[0] == digests[1]
  back = checkpoint.read(Root(tmp_path / "root").imported(digests[0]) / "step_00000000")
  whole = whole_experts(back)
  assert whole.keys() == state.keys()
  assert all(torch.equal(whole[name], state[name]) for name in state)


def test_the_host_holds_two_layers_whatever_their_number(tmp_path):
  """Of twelve layers of experts: writing, reading again and importing."""
  config = tiny(**WIDE)
  written(tmp_path, config, state_of(config))
  command = [sys.executable, "-c", CHILD, str(tmp_path), "whole"]
  told = {"env": os.environ | FREED, "capture_output": True, "text": True}
  done = subprocess.run(command, check=True, **told)
  peaks = [int(peak) * 1024 for peak in done.stdout.split()]
  assert max(peaks[:3]) < 2 * LAYER + SLACK < 8 * LAYER, [peak / LAYER for peak in peaks]
  assert peaks[3] > 12 * LAYER  # of the whole model at once: the measure sees it


LIMITED = """
import resource, signal, sys
from pathlib import Path
from nmoe.errors import CheckpointError
from nmoe.model.export import Source, unfinished, write_folder
from nmoe.model.imports import import_folder
from nmoe.records.root import Root

folder = Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
  if sys.argv[1] == "export":
    source = Source.open(folder / "step_00000000", None)
    with unfinished(folder / "out") as out:
      write_folder(source, out, 5_000_000_000)
  else:
    import_folder(folder / "hf", Root(folder / "root"))
except CheckpointError as error:
  print(error)
"""


@pytest.mark.parametrize("what", ["export", "import"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path, what):
  """The kernel refuses to make a file longer than 1 MiB."""
  config = tiny(**(WIDE | {"model__num_layers": 2}))
  state = state_of(config)
  written(tmp_path, config, state)
  hf = tmp_path / "hf"
  hf.mkdir()
  tensors = {name: x.clone().contiguous() for name, x in to_hf(state).items()}
  save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
  (hf / "config.json").write_text(json.dumps(export.hf_config(config, 256, "bfloat16")))
  done = subprocess.run(
    [sys.executable, "-c", LIMITED, what, str(tmp_path)], capture_output=True, text=True, check=True
  )
  assert "not written" in done.stdout and "GiB free" in done.stdout and not done.stderr
  left = [p for p in tmp_path.rglob("*") if "out" in p.name or "partial" in str(p)]
  assert not left and not list((tmp_path / "root").glob("imports/*"))


def test_room_is_asked_for_before_the_first_byte(tmp_path, monkeypatch):
  config = tiny(model__vocab_size=257)
  source = Source.open(written(tmp_path, config, state_of(config)), None)
  out = tmp_path / "hf"
  out.mkdir()
  write_folder(source, out, 1 << 30)
  usage = export.shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage)
  (tmp_path / "more").mkdir()
  with pytest.raises(CheckpointError, match=r"needs [\d.,]+ MB, 0.0 MB are free; make room"):
    write_folder(source, tmp_path / "more", 1 << 30)
  with pytest.raises(CheckpointError, match=r"imports needs .* MB, .* are free"):
    import_folder(out, Root(tmp_path / "root"))
  assert not list((tmp_path / "more").iterdir())
  assert not list((tmp_path / "root").glob("imports/*"))
  assert imports.state_bytes(config) == sum(x.nbytes for x in state_of(config).values())
