"""Imported weights as a run begins from them: where they lie, and whether they are of its model.
Does not import torch.
"""

from __future__ import annotations

from pathlib import Path

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff
from nmoe.errors import CheckpointError
from nmoe.records.manifests import manifest, steps
from nmoe.records.root import Root

FREE = (  # keys of the model under which imported weights may go on
  "model.init",
  "model.init_std",
  "model.embed_std",
  "moe.bias_update_rate",
  "moe.balance_alpha",
  "moe.global_balance_alpha",
  "moe.forced_balance",
)


def imported_at(config: Config, root: Root) -> Path:
  """Where the weights lie that model.init names."""
  return root.imported(config.model.init.removeprefix("import:"))


def imported_config(config: Config, root: Root) -> Config:
  """The configuration that the weights which model.init names were stored with.

  CheckpointError if they are not there, or are of another model.
  """
  folder = imported_at(config, root)
  if not steps(folder):
    raise CheckpointError(f"{folder} is not there; run `nmoe import` on the model's folder again")
  written = configs.loads(manifest(folder / "step_00000000")["config"])
  differing = {
    key: pair
    for key, pair in diff(written, config).items()
    if key.startswith(("model.", "moe.", "yarn.")) and key not in FREE
  }
  if differing:
    told = "; ".join(f"{key}: {was!r}, now {now!r}" for key, (was, now) in differing.items())
    raise CheckpointError(
      f"{folder} holds weights of another model: {told}; set these keys as they were, or import "
      "other weights"
    )
  return written
