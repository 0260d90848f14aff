"""What kernels.shapes asks of a configuration. Does not import torch."""

from __future__ import annotations

from dataclasses import fields

from kernels.shapes import Shapes
from nmoe.config.sections import Config


def kernel_shapes(config: Config) -> Shapes:
  """What the kernels of a run depend on."""
  sections = (config.model, config.moe, config.data, config.launch, config.target, config.optim)
  sections += (config.rdep,)
  named = {key: value for section in sections for key, value in vars(section).items()}
  named |= {"batch": config.train.micro_batch, "loss_chunk": config.train.loss_chunk}
  named["muon"] = "muon" in (config.optim.matrices, config.optim.experts)
  return Shapes(**{f.name: named[f.name] for f in fields(Shapes)})
