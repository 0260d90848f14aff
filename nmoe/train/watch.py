"""What a run observes of itself: the logged metrics, the progress line, the results."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmoe.config import plan
from nmoe.data.loader import bits_per_byte
from nmoe.distributed.rdep import Rdep
from nmoe.model.decoder import Model
from nmoe.train.clock import Clock
from nmoe.train.graph import Graph
from nmoe.train.guard import Guard
from nmoe.train.progress import Entry
from nmoe.train.schedule import end_of
from nmoe.train.session import Session, TrainState
from nmoe.train.stragglers import LOCAL, TOLD, Stragglers, tags


class StepValues(NamedTuple):
  """A step's values, of all ranks but for the last three."""

  factor: float  # on the peak learning rates
  loss: Tensor  # fp32 0-d: nats per token
  norms: dict[str, Tensor]  # of the gradients, by group and "all"
  count_LE: Tensor  # int [MoE layers, E]: tokens that each expert got
  loss_T: Tensor  # of this rank's last micro-batch
  target_BS: Tensor  # of the same
  wait_s: float  # for data, since the last log


class Watch:
  """Logs what a run observes of itself. start: the run's first step."""

  def __init__(
    self, session: Session, start: int, clock: Clock, guard: Guard, graph: Graph | None = None
  ):
    self.session, self.graph, self.guard, self.clock = session, graph, guard, clock
    self.config, self.target = session.config, session.target
    token_bytes_V = torch.from_numpy(session.data.tokenizer.token_bytes())
    self.token_bytes_V = token_bytes_V.to(session.target.device)
    self.flops_per_token = plan.plan(session.config).flops_per_token
    self.logged_step = start
    self.stragglers = Stragglers(session.config.launch.ranks)

  def log(self, state: TrainState, of: StepValues) -> None:
    """Add one row of every tag, after the step of which these are the values.

    Together with `save` the only place where the loop waits for the device.
    """
    bytes_T = self.token_bytes_V[of.target_BS.flatten()]
    nats = (of.loss_T * (bytes_T > 0)).sum()
    scalars = torch.stack(
      [self.guard.bad_step.float(), of.loss, nats, bytes_T.sum(), *of.norms.values()]
    ).tolist()
    self.guard.check(int(scalars[0]))
    self._replayed(state.step)
    o = self.config.optim
    values = {
      "train/loss": scalars[1],
      "train/bpb": bits_per_byte(scalars[2], scalars[3]),
      "lr/dense": o.dense_lr * of.factor,
      "lr/router": o.router_lr * of.factor,
      "lr/expert": o.expert_lr * of.factor,
      "data/wait_s": of.wait_s,
      **self._memory(),
    }
    values |= {f"grad_norm/{k}": v for k, v in zip(of.norms, scalars[4:], strict=True)}
    count_LE, bias_LE = of.count_LE.cpu(), biases(state.model)
    values |= load_values(count_LE, bias_LE)
    if len(count_LE) and self.session.parallel.rank == 0:
      self.session.metrics.add_loads(state.step, count_LE.numpy())
      self.add_experts(state.step, {"bias": bias_LE.numpy()})
    values |= rdep_values(self.session.parallel.rdep)
    phases = self.clock.read()
    values |= {f"time/{name}_s": s for name, s in phases.items()}
    values |= self._of_all_ranks(state.step, values)
    values |= self._speed(state.step - self.logged_step, phases)
    self.logged_step = state.step
    values |= self.session.startup.first_step()
    self.add(state, values)
    self._progress(state, values)

  def _replayed(self, step: int) -> None:
    """A step that was bad, computed again, was good: the hardware was at fault the first time."""
    replay = self.session.replay
    if replay is not None and step >= replay.step:
      detail = {"why": "computed again the step is good", "ranks": replay.ranks}
      self.session.event("hardware", step=replay.step, rank=replay.rank, detail=detail)
      self.session.replay = None

  def _of_all_ranks(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
    """The phase times and rows of every rank, on rank 0; who becomes a straggler is an event. On a
    CPU other work decides who is slow.
    """
    told = self.session.parallel.gather([values.get(tag, 0.0) for tag in TOLD])
    if not told:
      return {}
    seconds = [row[LOCAL] / (step - self.logged_step) for row in told]
    for rank in self.stragglers.add(seconds):
      if self.target.device.type == "cuda":
        detail = {"step_s": seconds[rank], "best_s": self.stragglers.best[rank]}
        detail |= {"gpus": self.session.look(step)}
        self.session.event("straggler", step=step, rank=rank, detail=detail)
    return tags(told)

  def add(self, state: TrainState, values: dict[str, float]) -> None:
    self.session.metrics.add(state.step, state.tokens, values)

  def add_experts(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Log name -> [MoE layers, E] of a step."""
    for name, value_LE in values.items():
      self.session.metrics.add_experts(step, name, value_LE)

  def evaluated(self, step: int) -> bool:
    """Whether the held-out loss after this step is in the metrics."""
    steps, *_ = self.session.metrics.read().get("val/loss", ([],))
    return step in steps

  def results(self, state: TrainState) -> dict[str, Any]:
    """The run's outcome from what all its attempts logged: what arms are compared by.

    Losses and loads are the last ones, speeds the median; wall_s is the time spent in the loop. A
    run that logged no step has no training loss, speed or peak of memory.
    """
    logged = {tag: values for tag, (_, _, values) in self.session.metrics.read().items()}
    last = {tag: float(values[-1]) for tag, values in logged.items()}
    losses = {k: last[k] for k in ("val/loss", "val/bpb", "train/loss", "train/bpb") if k in last}
    rates = ("train/tokens_per_s", "train/mfu")
    speeds = {k: float(np.median(logged[k])) for k in rates if k in logged}
    loads = [v for k, v in last.items() if k.endswith("/load_max_over_mean")]
    seconds = sum(float(v.sum()) for k, v in logged.items() if k.startswith("time/"))
    suites = {tag: x for tag, x in last.items() if tag.startswith(("eval/", "val/bpb/"))}
    steps = {}
    if "grad_norm/all" in logged:
      clipped = logged["grad_norm/all"] > self.config.optim.clip_norm
      steps["memory/peak_bytes"] = float(logged["memory/peak_bytes"].max())
      steps["optim/clipped"] = float(clipped.mean())
    return {
      **losses,
      **suites,
      **speeds,
      **steps,
      "load/max_over_mean": max(loads, default=math.nan),
      "load/dead": sum(v for k, v in last.items() if k.endswith("/dead")),
      "device": self.target.name,
      "steps": state.step,
      "tokens": state.tokens,
      "wall_s": seconds + sum(self.clock.read().values()),
    }

  def _speed(self, steps: int, phases: dict[str, float]) -> dict[str, float]:
    """Of the steps themselves: evaluations and checkpoints are not in it."""
    seconds = sum(s for name, s in phases.items() if name not in ("eval", "checkpoint"))
    self.session.watchdog.measured(seconds / steps)
    rate = steps * self.config.schedule.batch_tokens / seconds
    speed = {"train/tokens_per_s": rate, "train/flops_per_token": self.flops_per_token}
    peak = self.target.peak_flops * self.config.launch.ranks
    speed["train/mfu"] = rate * self.flops_per_token / peak
    return speed

  def _memory(self) -> dict[str, float]:
    """The peak; on a GPU also how often torch freed its cache to find room, which waits for it."""
    if self.target.device.type != "cuda":
      return {"memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    stats = torch.cuda.memory_stats()
    idle = 0 if self.graph is None else self.graph.idle_bytes
    rdep = self.session.parallel.rdep
    peak = stats["allocated_bytes.all.peak"] + idle + (0 if rdep is None else rdep.nbytes)
    return {"memory/peak_bytes": float(peak), "memory/retries": float(stats["num_alloc_retries"])}

  def _progress(self, state: TrainState, values: dict[str, float]) -> None:
    rate = values["train/tokens_per_s"]
    end = end_of(state.step, state.tokens, self.config.schedule)
    left_s = (end.tokens - state.tokens) / rate
    entry = Entry(state.step, end.step, values["train/loss"], rate, left_s)
    if not self.session.progress.log(entry, tell=self.session.parallel.rank == 0):
      self.session.stop = True


def biases(model: Model) -> Tensor:
  """The routers' biases [MoE layers, E], on the host."""
  none = torch.empty(0, model.config.moe.num_experts)
  return torch.stack([router.bias for router in model.routers]).cpu() if model.routers else none


def rdep_values(rdep: Rdep | None) -> dict[str, float]:
  """Of the last micro-batch on this rank: the most rounds of a layer, the rows received in all
  layers, those of them that backward dispatches again because of rounds, and the rdep.capacity at
  which there would be one round. And, since the process began, the forward passes of training in
  which a rank of this one's group ran full, so that a layer had several rounds, and those whose
  layers waited for their counts (`Rdep.run`). None with one rank.
  """
  if rdep is None:
    return {}
  rows, again, needed = rdep.received()
  rounds = max(rdep.rounds.values(), default=0)
  values = {"rounds": rounds, "rows": rows, "rows_again": again}
  values |= {"capacity_needed": needed}
  values |= {"full_passes": rdep.full, "waiting_passes": rdep.waited}
  return {f"rdep/{name}": float(value) for name, value in values.items()}


def load_values(count_LE: Tensor, bias_LE: Tensor) -> dict[str, float]:
  """Health of each MoE layer's load (arXiv 2408.15664 Eq 4 for max over mean; dead: under 1 % of
  the mean; bias_range: largest less least).
  """
  if not len(count_LE):
    return {}
  count_LE = count_LE.double()
  mean_L = count_LE.mean(1).clamp(min=1e-12)
  share_LE = count_LE / count_LE.sum(1, keepdim=True).clamp(min=1)
  entropy_L = -(share_LE * share_LE.clamp(min=1e-12).log()).sum(1)
  of_mean_LE = count_LE / mean_L[:, None]
  points = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
  p05_L, p50_L, p95_L = of_mean_LE.quantile(points, dim=1)
  found = {
    "load_max_over_mean": of_mean_LE.amax(1),
    "load_p05": p05_L,
    "load_p50": p50_L,
    "load_p95": p95_L,
    "dead": (of_mean_LE < 0.01).sum(1),
    "entropy": entropy_L / math.log(max(count_LE.shape[1], 2)),
    "bias_range": bias_LE.amax(1) - bias_LE.amin(1),
  }
  layers = zip(*(x_L.tolist() for x_L in found.values()), strict=True)
  return {
    f"moe/{layer}/{name}": float(x)
    for layer, row in enumerate(layers)
    for name, x in zip(found, row, strict=True)
  }
