"""Checkpoints: what is stored, what is verified, and that nothing half written is ever believed.

One file: every test reads, spoils or follows up one small checkpoint.
"""

import errno
import json
import os
import pickle
import resource
import shutil
import warnings
from enum import Enum
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from labs import same_bits
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nmoe.errors import CheckpointError, CorruptError, DiskFullError, FencedError
from nmoe.records import checkpoint, hashing
from nmoe.records.checkpoint import Part
from nmoe.records.root import Root

META = {"config": "[model]", "run": "r"}


def a_state(seed: int = 0, experts: int = 4) -> dict[str, Tensor]:
  """Every dtype that a run stores, among them values that == would not tell apart."""
  random = torch.Generator().manual_seed(seed)
  w13 = torch.randn(experts, 6, 4, generator=random)
  return {
    "embed.weight": torch.randn(7, 4, generator=random).bfloat16(),
    "layers.1.moe.experts.w13": w13,
    "layers.1.moe.experts.w13.exp_avg": w13 * 0.1,
    "layers.1.moe.experts.w2": torch.randn(experts, 4, 3, generator=random),
    "layers.1.moe.router.bias": torch.tensor([-0.0, 0.0, 1e-40, -1.0]),
    "optimizer.steps": torch.tensor(7 + seed),
  }


def empty(state: dict[str, Tensor]) -> dict[str, Tensor]:
  return {name: torch.full_like(x, 99) for name, x in state.items()}


@pytest.fixture
def saved(tmp_path):
  """A folder with checkpoints of steps 10 and 20."""
  for step in (10, 20):
    checkpoint.save(tmp_path, step, a_state(step), 0, META)
  return tmp_path


def check_intact(folder: Path, step: int) -> None:
  state = empty(a_state())
  checkpoint.load(folder, step, state, 0)
  assert same_bits(state, a_state(step))


def test_round_trip_is_exact(saved):
  check_intact(saved, 10)
  check_intact(saved, 20)
  assert checkpoint.steps(saved) == [10, 20]
  assert checkpoint.manifest(saved / "step_00000020")["step"] == 20
  assert checkpoint.manifest(saved / "step_00000020")["config"] == "[model]"


def test_experts_are_stored_by_global_id(tmp_path):
  """What rank 1 of two wrote is found under its experts' names, one by one."""
  state = a_state(experts=2)
  checkpoint.save(tmp_path, 1, state, 2, META)
  stored = checkpoint.read(tmp_path / "step_00000001")
  assert {name for name in stored if ".experts." in name} == {
    f"layers.1.moe.experts.{e}.{part}" for e in (2, 3) for part in ("w13", "w13.exp_avg", "w2")
  }
  assert torch.equal(stored["layers.1.moe.experts.3.w2"], state["layers.1.moe.experts.w2"][1])
  assert torch.equal(stored["layers.1.moe.router.bias"], state["layers.1.moe.router.bias"])
  with pytest.raises(CheckpointError, match=r"does not hold this run's state"):
    checkpoint.load(tmp_path, 1, empty(state), 0)


def test_another_number_of_ranks_reads_it(saved):
  """Four experts of one rank, read as the last two of a second rank."""
  whole, part = a_state(20), empty(a_state(experts=2))
  checkpoint.load(saved, 20, part, 2)
  assert torch.equal(part["layers.1.moe.experts.w13"], whole["layers.1.moe.experts.w13"][2:])
  assert torch.equal(part["embed.weight"], whole["embed.weight"])


def parts(state: dict[str, Tensor], rows: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
  """The rows start … stop - 1 of some tensors, as Parts."""
  return {name: Part.of(state[name][a:b], a, len(state[name])) for name, (a, b) in rows.items()}


def test_a_part_is_filled_from_its_place(saved):
  """Rows of a plain tensor, and some of the experts that a rank holds, in place."""
  whole, mine = a_state(20), empty(a_state(20))
  rows = {"embed.weight": (2, 5), "layers.1.moe.experts.w13.exp_avg": (1, 3)}
  checkpoint.load(saved, 20, parts(mine, rows), 0)
  for name, (start, stop) in rows.items():
    assert torch.equal(mine[name][start:stop], whole[name][start:stop])
    assert (mine[name][:start] == 99).all() and (mine[name][stop:] == 99).all()


def test_a_part_of_a_second_rank_s_experts_has_their_global_ids(tmp_path):
  name, state = "layers.1.moe.experts.w13.exp_avg", a_state()
  checkpoint.save(tmp_path, 1, parts(state, {name: (1, 3)}), 4, META)
  stored = checkpoint.read(tmp_path / "step_00000001")
  assert stored.keys() == {f"layers.1.moe.experts.{e}.w13.exp_avg" for e in (5, 6)}
  assert torch.equal(stored["layers.1.moe.experts.6.w13.exp_avg"], state[name][2])


def lose_rows(group, folder: str) -> tuple[str, bool]:
  """Two ranks save seven rows: first without the fourth, then all."""
  rank, state = group.rank(), a_state()
  whole, lacking = (0, 4) if rank == 0 else (4, 7), (0, 3) if rank == 0 else (4, 7)
  with pytest.raises(CheckpointError) as caught:
    checkpoint.save(Path(folder), 1, parts(state, {"embed.weight": lacking}), 0, META)
  checkpoint.save(Path(folder), 2, parts(state, {"embed.weight": whole}), 0, META)
  stored = checkpoint.read(Path(folder) / "step_00000002")
  return str(caught.value), same_bits(stored, {"embed.weight": state["embed.weight"]})


def test_rows_that_no_rank_stores_are_noticed(tmp_path):
  for said, complete in ranks.run(lose_rows, 2, str(tmp_path)):
    assert "Failed to validate global plan" in said
    assert complete
  assert checkpoint.steps(tmp_path) == [2]


def test_a_part_of_another_shape_is_refused(saved):
  other = {"embed.weight": torch.zeros(8, 4).bfloat16()}
  with pytest.raises(CheckpointError, match="does not hold this run's state"):
    checkpoint.load(saved, 20, parts(other, {"embed.weight": (0, 2)}), 0)


def test_nothing_is_said_of_torch_distributed(tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    checkpoint.save(tmp_path, 1, a_state(), 0, META)
    checkpoint.load(tmp_path, 1, empty(a_state()), 0)
    checkpoint.read(tmp_path / "step_00000001")


def flip(file: Path) -> None:
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def truncate(file: Path) -> None:
  file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
  ("damage", "said"), [(flip, "is corrupt: sha256"), (truncate, "is corrupt: size")]
)
@pytest.mark.parametrize("pattern", [".metadata", "*.distcp"])
def test_a_damaged_file_is_named(saved, damage, said, pattern):
  newest = saved / "step_00000020"
  file = next(newest.glob(pattern))
  damage(file)
  state = empty(a_state())
  with pytest.raises(CheckpointError) as caught:
    checkpoint.load(saved, 20, state, 0)
  message = str(caught.value)
  assert message.startswith(f"{file} {said}")
  assert f"delete {newest} to resume from an earlier step" in message
  assert same_bits(state, empty(a_state()))  # verified before anything is filled
  with pytest.raises(CheckpointError):
    checkpoint.read(newest)
  check_intact(saved, 10)


def test_a_missing_file_is_named(saved):
  file = next((saved / "step_00000020").glob("*.distcp"))
  file.unlink()
  with pytest.raises(CheckpointError, match=f"{file} is missing; delete"):
    checkpoint.load(saved, 20, empty(a_state()), 0)
  check_intact(saved, 10)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda file: file.write_text("")])
def test_a_damaged_manifest_is_named(saved, damage):
  file = saved / "step_00000020" / "manifest.json"
  damage(file)
  with pytest.raises(CheckpointError, match=f"{file} cannot be read .* delete "):
    checkpoint.load(saved, 20, empty(a_state()), 0)


def test_another_format_is_refused(saved):
  file = saved / "step_00000020" / "manifest.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
  with pytest.raises(CheckpointError, match="has format 1, this version reads 2"):
    checkpoint.load(saved, 20, empty(a_state()), 0)


def test_a_state_of_another_model_is_refused(saved):
  for change in ({"head.weight": torch.zeros(3)}, {"embed.weight": torch.zeros(7, 5)}):
    with pytest.raises(CheckpointError, match="step_00000010 does not hold this run's state"):
      checkpoint.load(saved, 10, empty(a_state()) | change, 0)


@pytest.mark.faults
def test_a_full_disk_leaves_the_earlier_ones(saved):
  """The file size limit stands in for it: writing fails half way through the first file."""
  state = a_state(30) | {"embed.weight": torch.ones(1 << 16)}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
  try:
    with pytest.raises(CheckpointError) as caught:
      checkpoint.save(saved, 30, state, 0, META)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  message = str(caught.value)
  assert f"checkpoint step 30 was not written to {saved} (" in message
  assert "File too large" in message
  assert "GiB free); earlier checkpoints are intact" in message
  assert sorted(p.name for p in saved.iterdir()) == ["step_00000010", "step_00000020"]
  check_intact(saved, 20)
  checkpoint.save(saved, 30, a_state(30), 0, META)
  check_intact(saved, 30)


def test_a_disk_that_fills_up_at_the_manifest(saved, monkeypatch):
  def full(path, text):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
      checkpoint.save(saved, 30, a_state(30), 0, META)
  assert checkpoint.steps(saved) == [10, 20]


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="NotADirectoryError|FileExistsError"):
    checkpoint.save(tmp_path / "file" / "run", 1, a_state(), 0, META)


def test_a_half_written_one_is_never_read(saved):
  """What a kill while saving leaves: the next save clears it."""
  half = saved / "step_00000030.partial"
  shutil.copytree(saved / "step_00000020", half)
  (half / "manifest.json").unlink()
  assert checkpoint.steps(saved) == [10, 20]
  checkpoint.save(saved, 30, a_state(30), 0, META)
  check_intact(saved, 30)
  assert not half.exists()


def test_prune_keeps_the_newest(saved):
  for step in (30, 40):
    checkpoint.save(saved, step, a_state(step), 0, META)
  (saved / "step_00000050.partial").mkdir()
  checkpoint.prune(saved, 2)
  assert sorted(p.name for p in saved.iterdir()) == ["step_00000030", "step_00000040"]
  check_intact(saved, 30)


def test_a_run_without_checkpoints(tmp_path):
  assert checkpoint.steps(tmp_path / "none") == []


def test_the_metadata_names_no_path(saved):
  """Python 3.13 pickles one as pathlib._local's, which no other Python has."""
  assert b"pathlib" not in (saved / "step_00000020" / ".metadata").read_bytes()


# --- what others wrote ---


class Code:
  """A pickle that runs a command when it is read."""

  def __init__(self, ran: Path):
    self.ran = ran

  def __reduce__(self):
    return os.system, (f"touch {self.ran}",)


def resealed(path: Path) -> None:
  """The manifest of files as they are now, as whoever forges one would write it."""
  meta = json.loads((path / "manifest.json").read_text())
  meta = {key: value for key, value in meta.items() if key not in ("files", "sha256")}
  (path / "manifest.json").unlink()
  checkpoint._seal(path, meta)


@pytest.mark.faults
@pytest.mark.parametrize("call", ["load", "read", "stored"])
def test_the_metadata_of_a_checkpoint_is_no_code(saved, call):
  path, ran = saved / "step_00000020", saved / "ran"
  (path / ".metadata").write_bytes(pickle.dumps(Code(ran)))
  resealed(path)
  with pytest.raises(CheckpointError, match=r"\.metadata.*system"):
    match call:
      case "load":
        checkpoint.load(saved, 20, empty(a_state()), 0)
      case "read":
        checkpoint.read(path)
      case "stored":
        checkpoint.Stored.open(path)
  assert not ran.exists()


class Old(pickle.Pickler):
  """As Python 3.11.0 to 3.11.3 pickle members of enumerations; Debian 12 has 3.11.2."""

  def reducer_override(self, of):
    return (getattr, (type(of), of.name)) if isinstance(of, Enum) else NotImplemented


@pytest.mark.faults
def test_a_checkpoint_that_debians_python_wrote(saved):
  """Every one was refused there: its description names getattr. Of anything else it still is."""
  path = saved / "step_00000020"
  metadata = pickle.loads((path / ".metadata").read_bytes())
  with (path / ".metadata").open("wb") as file:
    Old(file).dump(metadata)
  assert b"getattr" in (path / ".metadata").read_bytes()
  resealed(path)
  check_intact(saved, 20)
  (path / ".metadata").write_bytes(pickle.dumps(Attribute()))
  resealed(path)
  with pytest.raises(CheckpointError, match="load_state.*is no enumeration"):
    checkpoint.read(path)


class Attribute:
  def __reduce__(self):
    return getattr, (Metadata, "load_state")


@pytest.mark.faults
def test_a_tensor_of_a_checkpoint_is_no_pickle(saved):
  """DCP unpickles, without limits, what the metadata calls bytes."""
  path = saved / "step_00000020"
  metadata = pickle.loads((path / ".metadata").read_bytes())
  metadata.state_dict_metadata["embed.weight"] = BytesStorageMetadata()
  (path / ".metadata").write_bytes(pickle.dumps(metadata))
  resealed(path)
  with pytest.raises(CheckpointError, match=r"\.metadata.*BytesStorageMetadata"):
    checkpoint.load(saved, 20, empty(a_state()), 0)


@pytest.mark.faults
def test_a_stray_file_is_no_checkpoint(tmp_path):
  """Of a name like one, beyond the newest; nor what a file manager leaves."""
  folder = Root(tmp_path).checkpoints("run")
  (folder / "step_00000012").mkdir(parents=True)
  for name in ("step_00000099", ".DS_Store", "step_00000015.partial", "step_15"):
    (folder / name).write_text("")
  assert checkpoint.steps(folder) == Root(tmp_path).checkpoint_steps("run") == [12]


@pytest.mark.faults
def test_a_checkpoint_in_another_step_s_place(saved):
  (saved / "step_00000020").rename(saved / "step_00000030")
  with pytest.raises(CheckpointError, match=r"step_00000030 holds step 20.*rename"):
    checkpoint.load(saved, 30, empty(a_state()), 0)


@pytest.mark.faults
@pytest.mark.parametrize("text", ["{}", "[]", "7", "null", '{"format": 1}'])
def test_a_manifest_of_another_shape(saved, text):
  path = saved / "step_00000020"
  (path / "manifest.json").write_text(text)
  with pytest.raises(CheckpointError, match=r"manifest\.json.*delete .*earlier step"):
    checkpoint.manifest(path)


@pytest.mark.faults
@pytest.mark.parametrize("key, value", [("files", {}), ("step", 19), ("run", "another")])
def test_an_edited_manifest(saved, key, value):
  path = saved / "step_00000020"
  edited = json.loads((path / "manifest.json").read_text()) | {key: value}
  (path / "manifest.json").write_text(json.dumps(edited))
  with pytest.raises(CheckpointError, match=r"manifest\.json.*hashes to"):
    checkpoint.load(saved, 20, empty(a_state()), 0)


# --- several ranks, several attempts ---


class Reads:
  """Counts the files that `checkpoint` reads to hash them."""

  def __init__(self):
    self.names, sha256 = [], checkpoint.sha256

    def counted(path):
      self.names.append(path.name)
      return sha256(path)

    checkpoint.sha256 = counted


def save_and_load(group, folder: str) -> tuple[list[str], list[str], list[str]]:
  """The files that this rank read to hash them, while saving and loading; all that there are."""
  state, reads = a_state(group.rank()), Reads()
  named = {f"{name}.{group.rank()}": x for name, x in state.items() if "experts" not in name}
  checkpoint.save(Path(folder), 1, named, 0, META)
  saving, reads.names = reads.names, []
  back = empty(named)
  checkpoint.load(Path(folder), 1, back, 0)
  assert same_bits(back, named)
  path = Path(folder) / "step_00000001"
  return saving, reads.names, sorted(checkpoint.manifest(path)["files"])


def test_each_rank_hashes_what_it_writes_and_verifies_its_share(tmp_path):
  (saving_0, loading_0, files), (saving_1, loading_1, _) = ranks.run(
    save_and_load, 2, str(tmp_path)
  )
  assert files == [".metadata", "__0_0.distcp", "__1_0.distcp"]
  assert (saving_0, saving_1) == ([".metadata"], [])  # DCP renames it
  assert (loading_0, loading_1) == ([".metadata", "__1_0.distcp"], ["__0_0.distcp"])
  checkpoint.verify(tmp_path / "step_00000001")  # what was hashed on its way is what lies there


def find_damage(group, folder: str) -> str:
  checkpoint.save(Path(folder), 1, a_state(), 0, META)
  file = Path(folder) / "step_00000001" / "__0_0.distcp"
  if group.rank() == 0:
    flip(file)
  dist.barrier()
  with pytest.raises(CorruptError) as caught:
    checkpoint.load(Path(folder), 1, empty(a_state()), 0)
  return str(caught.value)


def test_what_one_rank_finds_damaged_all_hear(tmp_path):
  said = ranks.run(find_damage, 2, str(tmp_path))
  assert said[0] == said[1] and "__0_0.distcp is corrupt" in said[0]


def be_fenced(group, folder: str) -> str:
  def check():
    raise FencedError("attempt 1 writes no more")

  with pytest.raises(FencedError) as caught:
    checkpoint.save(Path(folder), 1, a_state(), 0, META, fence=checkpoint.Fence(1, check))
  return str(caught.value)


def test_a_fenced_attempt_finishes_no_checkpoint(tmp_path):
  """Rank 0 asks; all ranks leave with its error, and what a newer attempt writes stays."""
  newer = tmp_path / "step_00000001.partial-2"
  newer.mkdir()
  assert ranks.run(be_fenced, 2, str(tmp_path)) == ["attempt 1 writes no more"] * 2
  assert list(tmp_path.iterdir()) == [newer]


def test_an_attempt_clears_what_earlier_ones_left(saved):
  for name in ("30.partial", "30.partial-1", "30.partial-2", "30.partial-3"):
    (saved / f"step_000000{name}").mkdir()
  checkpoint.prune(saved, 2, attempt=2)
  assert [p.name for p in saved.glob("*.partial*")] == ["step_00000030.partial-3"]


def test_a_disk_that_is_full_is_told_from_other_failures(saved, monkeypatch):
  for number in (errno.ENOSPC, errno.EDQUOT):
    with monkeypatch.context() as patch:
      patch.setattr(Path, "write_text", Raiser(OSError(number, "full")))
      with pytest.raises(DiskFullError):
        checkpoint.save(saved, 30, a_state(30), 0, META)
  monkeypatch.setattr(Path, "write_text", Raiser(OSError(errno.EIO, "broken")))
  with pytest.raises(CheckpointError) as caught:
    checkpoint.save(saved, 30, a_state(30), 0, META)
  assert not isinstance(caught.value, DiskFullError)


@pytest.mark.faults
@pytest.mark.parametrize("room", [0, 100, 600, 700, 1000, 3000])
def test_a_disk_that_fills_within_a_tensor_is_told_to_all_ranks(tmp_path, monkeypatch, room):
  """torch's archive turns the OSError into its own error of a position, and what the other ranks
  hear of it passes through pickle, which keeps no error behind another.
  """

  def write(self, data):
    self.size += memoryview(data).nbytes
    if self.size > room:
      raise OSError(errno.ENOSPC, "No space left on device")
    return self.file.write(data)

  monkeypatch.setattr(hashing.HashedFile, "write", write)
  with pytest.raises(checkpoint.dcp.api.CheckpointException) as caught:
    writer = hashing.HashingWriter(tmp_path / "step")
    checkpoint.dcp.save({"x": torch.ones(500)}, storage_writer=writer, no_dist=True)
  told = pickle.loads(pickle.dumps(caught.value.failures[0][0]))
  assert isinstance(told, OSError) and told.errno == errno.ENOSPC


class Raiser:
  def __init__(self, error: OSError):
    self.error = error

  def __call__(self, *_):
    raise self.error
