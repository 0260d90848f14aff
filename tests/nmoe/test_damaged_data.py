"""What a damaged folder of prepared data says, and that it can be restored."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from prepared_cases import BYTE, two_sources

from nmoe.data.loader import Loader
from nmoe.data.mixture import FilesSource, Mixture
from nmoe.data.prepare import prepare
from nmoe.data.prepared import (
  open_data,
)
from nmoe.data.shards import digest
from nmoe.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return two_sources(tmp_path_factory.mktemp("data"))


def flip(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[:-10])


def edit(path):
  manifest = json.loads(path.read_text())
  manifest["holdout"] = 0.5
  path.write_text(json.dumps(manifest))


def outdated(path):
  manifest = json.loads(path.read_text()) | {"format": 0}
  del manifest["sha256"]
  path.write_text(json.dumps(manifest | {"sha256": digest(manifest)}))


SHARD, MANIFEST = "train-tokens-00001.npy", "manifest.json"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
  ("name", "damage", "message"),
  [
    (SHARD, flip, "sha256 is [0-9a-f]{64}, the manifest says [0-9a-f]{64}"),
    (SHARD, cut, "holds [0-9]+ bytes, the manifest says [0-9]+"),
    (SHARD, Path.unlink, "cannot be read"),
    ("train-counts.npy", cut, "holds [0-9]+ bytes, the manifest says [0-9]+"),
    (MANIFEST, Path.unlink, "no readable manifest"),
    (MANIFEST, cut, "no readable manifest"),
    (MANIFEST, edit, "hashes to [0-9a-f]{64}, it states [0-9a-f]{64}"),
    (MANIFEST, outdated, "format is 0, this version reads"),
    (MANIFEST, lambda p: p.write_text("[]"), "not a manifest"),
  ],
)
def test_damage_is_found_and_named(folder, tmp_path, name, damage, message, verify):
  copy = tmp_path / "data"
  shutil.copytree(folder.parent, copy)
  source = copy / "sources" / json.loads((folder / MANIFEST).read_text())["sources"][1]["source"]
  damage(source / name)
  if damage is flip and not verify:
    open_data(copy / folder.name, verify=False)  # only sizes are compared
    return
  with pytest.raises(DataError, match=f"{source / name}.*{message}.*delete {source} and prepare"):
    open_data(copy / folder.name, verify=verify)


def test_a_damaged_mixture_is_named(folder, tmp_path):
  copy = tmp_path / "data"
  shutil.copytree(folder.parent, copy)
  cut(copy / folder.name / MANIFEST)
  with pytest.raises(DataError, match=f"{copy / folder.name / MANIFEST}: no readable manifest"):
    open_data(copy / folder.name)


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(DataError, match=f"{tmp_path}/none/manifest.json: no readable manifest"):
    open_data(tmp_path / "none")


def test_deleting_what_is_damaged_and_preparing_again_restores_it(folder, tmp_path):
  sources = tuple(
    FilesSource(name=name, paths=(str(folder.parents[1] / name / "*"),), format="text")
    for name in ("plain", "odd")
  )
  mixture = Mixture(sources=sources, holdout=0.1)
  prepared = prepare(mixture, BYTE, tmp_path)
  before = Loader(open_data(prepared), seq_len=24, seed=0).samples(np.arange(50))
  damaged = open_data(prepared).sources[0].folder
  cut(damaged / "train-tokens-00000.npy")
  with pytest.raises(DataError):
    open_data(prepared)
  shutil.rmtree(damaged)
  data = open_data(prepare(mixture, BYTE, tmp_path))
  assert np.array_equal(Loader(data, seq_len=24, seed=0).samples(np.arange(50)), before)
