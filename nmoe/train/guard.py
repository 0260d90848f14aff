"""The guard against steps whose loss or gradient is not finite, or whose loss is a spike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nmoe.errors import DivergedError
from nmoe.train.optim import clip_factor


class Guard:
  """`bad_step`, int64 0-d on the device, is the first step that was not finite or a spike, else -1;
  `kept`, fp64 [3], are its loss, its norm, and the sum of this rank's own gradients.

  sigma, window: a loss more than sigma standard deviations above the mean of the last `window` good
  ones is a spike; 0: none is. `losses` and `count` are of these, and belong to a checkpoint.
  """

  def __init__(self, clip_norm: float, device: torch.device, sigma: float = 0.0, window: int = 2):
    self.clip_norm, self.sigma, self.window = clip_norm, sigma, window
    self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    self.kept = torch.zeros(3, dtype=torch.float64, device=device)
    self.losses = torch.zeros(window, device=device)
    self.places = torch.arange(window, device=device)
    self.count = torch.zeros((), dtype=torch.int64, device=device)

  def tensors(self) -> dict[str, Tensor]:
    """What a checkpoint saves, so that a step is judged alike after a restart."""
    return {"guard.losses": self.losses, "guard.count": self.count} if self.sigma else {}

  def factor(self, step: int, loss: Tensor, norm: Tensor, own: Tensor | None = None) -> Tensor:
    """The clip factor as a 0-d tensor; NaN from the first bad step on.

    The optimizer does nothing under a NaN factor, so the state stays that of the last good step
    until the host looks (`check`). On cpu looking is free and happens here. own: see `kept`.
    """
    scale = clip_factor(norm, self.clip_norm)
    good = torch.isfinite(loss) & torch.isfinite(norm) & ~self._spike(loss)
    first = ~good & (self.bad_step < 0)
    self.bad_step = torch.where(first, step, self.bad_step)
    values = torch.stack([x.double() for x in (loss, norm, norm if own is None else own)])
    self.kept = torch.where(first, values, self.kept)
    if self.sigma:
      here = self.places == self.count % self.window  # indexing would wait for the device
      self.losses.copy_(torch.where(here & good, loss, self.losses))
      self.count += good
    if not self.bad_step.is_cuda:
      self.check(int(self.bad_step))
    return torch.where(self.bad_step >= 0, torch.nan, scale)

  def _spike(self, loss: Tensor) -> Tensor:
    if self.sigma == 0:
      return torch.zeros_like(loss, dtype=torch.bool)
    limit = self.losses.mean() + self.sigma * self.losses.std()
    return (self.count >= self.window) & (loss > limit)

  def check(self, bad_step: int) -> None:
    """Raise DivergedError if a step was bad. bad_step: `self.bad_step`, read by the host."""
    if bad_step < 0:
      return
    if self.sigma and all(map(math.isfinite, self.kept[:2].tolist())):
      raise DivergedError(
        f"step {bad_step + 1}: the loss {float(self.kept[0]):.4f} is more than {self.sigma:g} "
        f"standard deviations above the last {self.window} (prod.spike_sigma); the optimizer did "
        "not step"
      )
    raise DivergedError(
      f"step {bad_step + 1}: the loss or a gradient is not finite; the optimizer did not step. "
      "Lower the learning rates or the clip norm (optim.*), or lengthen the warm-up "
      "(schedule.warmup_tokens)"
    )
