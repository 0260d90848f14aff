"""The guard against steps whose loss or gradient is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.errors import DivergedError
from nmoe.train.optim import clip_factor


class Guard:
  """`bad_step`, int64 0-d on the device, is the first step that was not finite, else -1."""

  def __init__(self, clip_norm: float, device: torch.device):
    self.clip_norm = clip_norm
    self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

  def factor(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
    """The clip factor as a 0-d tensor; NaN from the first step whose loss or gradient is not
    finite.

    The optimizer does nothing under a NaN factor, so the state stays that of the last good step
    until the host looks (`check`). On cpu looking is free and happens here.
    """
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    first = ~finite & (self.bad_step < 0)
    self.bad_step = torch.where(first, step, self.bad_step)
    if not self.bad_step.is_cuda:
      self.check(int(self.bad_step))
    scale = clip_factor(norm, self.clip_norm)
    return torch.where(self.bad_step >= 0, torch.nan, scale)

  def check(self, bad_step: int) -> None:
    """Raise DivergedError if a step was not finite. bad_step: `self.bad_step`, read by the host."""
    if bad_step >= 0:
      raise DivergedError(
        f"step {bad_step + 1}: the loss or a gradient is not finite; the optimizer did not step. "
        "Lower the learning rates or the clip norm (optim.*), or lengthen the warm-up "
        "(schedule.warmup_tokens)"
      )
