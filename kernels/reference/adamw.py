"""AdamW on master weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.copies import Copies
from kernels.ops import check, check_lists


@torch.no_grad()
def adamw(
  params: list[Tensor],
  grads: list[Tensor],
  masters: list[Tensor],
  exp_avgs: list[Tensor],
  exp_avg_sqs: list[Tensor],
  *,
  step: int,
  lr: float,
  betas: tuple[float, float],
  eps: float,
  weight_decay: float,
  grad_scale: Tensor,
  copies: list[Copies | None] | None = None,
) -> None:
  """See Ops.adamw (arXiv 1711.05101 Algorithm 2). Reads grad_scale on the host.

  Arithmetic is in the masters' dtype; bf16 moments are rounded when they are stored. Copies are
  left as they are, to be made anew.
  """
  check(step >= 1, f"adamw: step {step} must count from 1")
  check_lists("adamw", (params, grads, masters, exp_avgs, exp_avg_sqs))
  if grad_scale.isnan():
    return
  beta1, beta2 = betas
  size = lr / (1 - beta1**step)
  root = math.sqrt(1 - beta2**step)
  for param, grad, master, exp_avg, exp_avg_sq in zip(
    params, grads, masters, exp_avgs, exp_avg_sqs, strict=True
  ):
    grad = grad.to(master.dtype) * grad_scale
    m = exp_avg.to(master.dtype).lerp_(grad, 1 - beta1)
    v = exp_avg_sq.to(master.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    master.mul_(1 - lr * weight_decay)
    master.addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-size)
    for stored, value in ((exp_avg, m), (exp_avg_sq, v), (param, master)):
      if stored is not value:
        stored.copy_(value)
