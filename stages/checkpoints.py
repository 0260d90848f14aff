"""A run's checkpoint by name, and what of an evaluation, import or export can be refused at once:
without torch, whose import takes seconds.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from nmoe.config import file as configs
from nmoe.errors import CheckpointError, ConfigError
from nmoe.evals.suites import Suite, items_digest, suite_of
from nmoe.files import check_alone, check_empty
from nmoe.model.hf_config import model_type_of
from nmoe.model.hf_folder import described_in
from nmoe.records.manifests import manifest, steps
from nmoe.records.reader import Reader
from nmoe.records.root import Root

DTYPES = {None: None, "bf16": "bfloat16", "fp32": "float32"}
LEVELS = (None, "full", "layers", "tensors")


def step_folder(name: str, step: int | None, root: Path) -> Path:
  """The folder of a run's checkpoint, the newest if no step is named; or `name` is that folder."""
  if len(name) > 4000 or max(map(len, os.fsencode(name).split(b"/"))) > 255:
    raise ConfigError(f"{name:.60}… is longer than any run or folder; name one")
  if (Path(name) / "manifest.json").is_file():
    if step is not None:
      raise ConfigError(f"--step {step}: {name} is one step's folder; leave --step out")
    return Path(name)
  folder = Root(root).checkpoints(name)
  have = steps(folder)
  if not have:
    with closing(Reader(root)) as reader:
      run = reader.run(name)
    raise CheckpointError(
      f"run {run.id} ({run.status}) has no checkpoint in {folder}; with train.keep_checkpoints = 0 "
      "none is kept"
    )
  if step is not None and step not in have:
    raise CheckpointError(f"{folder} has the steps {', '.join(map(str, have))}, not {step}")
  return folder / f"step_{have[-1] if step is None else step:08d}"


def answerable(suite: str, limit: int, root: Path) -> Suite:
  """A suite whose items are in the root. Raises ConfigError or DataError."""
  found = suite_of(suite, limit)
  items_digest(found, Root(root).evals)
  return found


def exportable(
  name: str, out: Path, step: int | None, dtype: str | None, level: str | None, root: Path
) -> Path:
  """The checkpoint that is to be exported. ConfigError or CheckpointError for what cannot be."""
  if dtype not in DTYPES:
    raise ConfigError(f"--dtype {dtype} must be bf16 or fp32")
  if level not in LEVELS:
    raise ConfigError(f"--check {level} must be full, layers or tensors")
  path = step_folder(name, step, root)
  model_type_of(configs.loads(manifest(path)["config"], f"{path}/manifest.json"))
  if out.resolve().is_relative_to(path.resolve()):
    raise ConfigError(f"{out} lies in the checkpoint {path}; name another folder")
  check_empty(out)
  check_alone(out)
  if out.is_symlink() or os.path.ismount(out) or out.resolve() == Path.cwd():
    raise ConfigError(
      f"{out} cannot be replaced by the finished folder, as a link, a mount or the folder that you "
      "are in; name a new folder in it"
    )
  return path


def importable(folder: Path, out: Path) -> None:
  """ConfigError or CheckpointError for a folder that is no model of ours, or a file that cannot be
  written.
  """
  check_new(out)
  if not out.absolute().parent.is_dir():
    raise ConfigError(f"{out.absolute().parent} is no folder; name a file of one that is there")
  check_alone(out)
  described_in(folder)


def check_new(out: Path) -> None:
  """ConfigError if something is where a new file is to be."""
  if os.path.lexists(out):
    raise ConfigError(f"{out} is there already; name a new file")
