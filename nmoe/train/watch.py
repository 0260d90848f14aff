"""What a run observes of itself: the guard against non-finite values, the logged metrics, the
progress line.
"""

from __future__ import annotations

import math
import resource
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmoe.config import plan
from nmoe.data.loader import bits_per_byte
from nmoe.distributed.rdep import Rdep
from nmoe.errors import DivergedError
from nmoe.model.decoder import Model
from nmoe.train.clock import Clock
from nmoe.train.graph import Graph
from nmoe.train.optim import clip_factor
from nmoe.train.progress import Entry


class Watch:
  """`session` is a nmoe.train.loop.Session; start, total: the run's first step and their number."""

  def __init__(self, session: Any, start: int, total: int, graph: Graph | None):
    self.session, self.total, self.graph = session, total, graph
    self.config, self.target = session.config, session.target
    device = session.target.device
    self.token_bytes_V = torch.from_numpy(session.data.tokenizer.token_bytes()).to(device)
    self.flops_per_token = plan.plan(session.config).flops_per_token
    self.clock = Clock(device)
    self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    self.logged_step = start

  def guard(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
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
    scale = clip_factor(norm, self.config.optim.clip_norm)
    return torch.where(self.bad_step >= 0, torch.nan, scale)

  def check(self, bad_step: int) -> None:
    """Raise DivergedError if a step was not finite."""
    if bad_step >= 0:
      raise DivergedError(
        f"step {bad_step + 1}: the loss or a gradient is not finite; the optimizer did not step. "
        "Lower the learning rates or the clip norm (optim.*), or lengthen the warm-up "
        "(schedule.warmup_tokens)"
      )

  def log(
    self,
    state: Any,
    factor: float,
    loss: Tensor,
    norms: dict[str, Tensor],
    count_LE: Tensor,
    loss_T: Tensor,
    target_BS: Tensor,
    wait_s: float,
  ) -> None:
    """Add one row of every tag, after the step of which these are the values.

    loss and count_LE are of the whole step; loss_T [B·S] and target_BS of its last micro-batch, for
    bits per byte. Together with `save` the only place where the loop waits for the device.
    """
    bytes_T = self.token_bytes_V[target_BS.flatten()]
    nats = (loss_T * (bytes_T > 0)).sum()
    scalars = torch.stack(
      [self.bad_step.float(), loss, nats, bytes_T.sum(), *norms.values()]
    ).tolist()
    self.check(int(scalars[0]))
    o = self.config.optim
    values = {
      "train/loss": scalars[1],
      "train/bpb": bits_per_byte(scalars[2], scalars[3]),
      "lr/dense": o.dense_lr * factor,
      "lr/router": o.router_lr * factor,
      "lr/expert": o.expert_lr * factor,
      "data/wait_s": wait_s,
      "memory/peak_bytes": float(self._peak()),
    }
    values |= {f"grad_norm/{k}": v for k, v in zip(norms, scalars[4:], strict=True)}
    values |= load_values(count_LE.cpu(), bias_ranges(state.model))
    values |= rdep_values(self.session.parallel.rdep)
    phases = self.clock.read()
    values |= {f"time/{name}_s": s for name, s in phases.items()}
    values |= self._speed(state.step - self.logged_step, phases)
    self.logged_step = state.step
    values |= self.session.startup.first_step()
    self.add(state.step, values)
    self._progress(state.step, values)

  def add(self, step: int, values: dict[str, float]) -> None:
    self.session.metrics.add(step, step * self.config.schedule.batch_tokens, values)

  def results(self, step: int) -> dict[str, Any]:
    """The run's outcome from what all its attempts logged: what arms are compared by.

    Losses and loads are the last ones, speeds the median; wall_s is the time spent in the loop.
    """
    logged = {tag: values for tag, (_, _, values) in self.session.metrics.read().items()}
    last = {tag: float(values[-1]) for tag, values in logged.items()}
    losses = {k: last[k] for k in ("val/loss", "val/bpb", "train/loss", "train/bpb")}
    rates = ("train/tokens_per_s", "train/mfu")
    speeds = {k: float(np.median(logged[k])) for k in rates if k in logged}
    loads = [v for k, v in last.items() if k.endswith("/load_max_over_mean")]
    seconds = sum(float(v.sum()) for k, v in logged.items() if k.startswith("time/"))
    return {
      **losses,
      **speeds,
      "memory/peak_bytes": float(logged["memory/peak_bytes"].max()),
      "load/max_over_mean": max(loads, default=math.nan),
      "load/dead": sum(v for k, v in last.items() if k.endswith("/dead")),
      "device": self.target.name,
      "steps": step,
      "tokens": step * self.config.schedule.batch_tokens,
      "wall_s": seconds + sum(self.clock.read().values()),
    }

  def _speed(self, steps: int, phases: dict[str, float]) -> dict[str, float]:
    """Of the steps themselves: evaluations and checkpoints are not in it."""
    seconds = sum(s for name, s in phases.items() if name not in ("eval", "checkpoint"))
    rate = steps * self.config.schedule.batch_tokens / seconds
    speed = {"train/tokens_per_s": rate, "train/flops_per_token": self.flops_per_token}
    peak = self.target.peak_flops * self.config.launch.ranks
    speed["train/mfu"] = rate * self.flops_per_token / peak
    return speed

  def _peak(self) -> int:
    if self.target.device.type == "cuda":
      idle = 0 if self.graph is None else self.graph.idle_bytes
      rdep = self.session.parallel.rdep
      heap = 0 if rdep is None else rdep.heap.nbytes  # NVSHMEM's, which torch does not count
      return torch.cuda.max_memory_allocated() + idle + heap
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

  def _progress(self, step: int, values: dict[str, float]) -> None:
    rate = values["train/tokens_per_s"]
    left_s = (self.total - step) * self.config.schedule.batch_tokens / rate
    entry = Entry(step, self.total, values["train/loss"], rate, left_s)
    if not self.session.progress.log(entry, tell=self.session.parallel.rank == 0):
      self.session.stop = True


def bias_ranges(model: Model) -> list[float]:
  """max - min of each router's bias."""
  if not model.routers:
    return []
  bias_LE = torch.stack([router.bias for router in model.routers])
  return (bias_LE.amax(1) - bias_LE.amin(1)).tolist()


def rdep_values(rdep: Rdep | None) -> dict[str, float]:
  """Of the last micro-batch on this rank: the most rounds of a layer, the rows received in all
  layers, and those of them that backward dispatches again because of rounds. None with one rank.
  """
  if rdep is None:
    return {}
  rows, again = rdep.received()
  rounds = max(rdep.rounds.values(), default=0)
  return {"rdep/rounds": float(rounds), "rdep/rows": float(rows), "rdep/rows_again": float(again)}


def load_values(count_LE: Tensor, bias_range: list[float]) -> dict[str, float]:
  """Health of each MoE layer's load (arXiv 2408.15664 Eq 4 for max over mean; dead: under 1 % of
  the mean).
  """
  values = {}
  for layer, (count_E, spread) in enumerate(zip(count_LE.double(), bias_range, strict=True)):
    mean = count_E.mean().clamp(min=1e-12)
    share = count_E / count_E.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum() / math.log(max(len(share), 2))
    p05, p50, p95 = (count_E / mean).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    values |= {
      f"moe/{layer}/load_max_over_mean": float(count_E.max() / mean),
      f"moe/{layer}/load_p05": float(p05),
      f"moe/{layer}/load_p50": float(p50),
      f"moe/{layer}/load_p95": float(p95),
      f"moe/{layer}/dead": float((count_E < 0.01 * mean).sum()),
      f"moe/{layer}/entropy": float(entropy),
      f"moe/{layer}/bias_range": spread,
    }
  return values
