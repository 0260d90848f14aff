"""The router's parameters, its balance loss and its bias (arXiv 2412.19437 section 2.1.2).

The arithmetic of scores, groups and gates is `ops.route`; what is here belongs to the model: the
fp32 weight, the fp32 selection bias, and the ways of keeping experts evenly loaded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.ops import Ops, RouterSpec, Routing
from nmoe.config.sections import MoeConfig


class Router(nn.Module):
  """fp32 weight [E, D] and selection bias [E]; the bias is a buffer without gradient."""

  def __init__(self, dim: int, config: MoeConfig, ops: Ops):
    super().__init__()
    self.ops = ops
    self.forced_balance = config.forced_balance
    self.spec = RouterSpec(
      top_k=config.top_k,
      score=config.score,
      num_groups=config.num_groups,
      topk_groups=config.topk_groups,
      normalize=config.normalize,
      scale=config.route_scale,
    )
    self.weight = nn.Parameter(torch.empty(config.num_experts, dim, dtype=torch.float32))
    self.bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

  def forward(self, x_TD: Tensor) -> Routing:
    routing = self.ops.route(x_TD, self.weight, self.bias, self.spec)
    return force_balance(routing, self.spec) if self.forced_balance else routing


class _Forced(NamedTuple):
  """Where the benchmark's routing sends T tokens: what depends on sizes alone."""

  expert_TK: Tensor  # int32: (t·K + k) mod E
  index_TK: Tensor  # the same, int64
  place_TE: Tensor  # int64: the k of which expert e is, 0 if of none
  chosen_TE: Tensor  # bool
  count_E: Tensor  # int32


@lru_cache
def _forced(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> _Forced:
  """Made once, for all layers: a dozen small kernels that a real routing has not."""
  index_TK = torch.arange(num_tokens * top_k, device=device).view(num_tokens, top_k) % num_experts
  first_T1 = torch.arange(num_tokens, device=device)[:, None] * top_k
  k_TE = (torch.arange(num_experts, device=device) - first_T1) % num_experts
  chosen_TE = k_TE < top_k
  place_TE, count_E = k_TE.where(chosen_TE, 0), chosen_TE.sum(0, dtype=torch.int32)
  return _Forced(index_TK.int(), index_TK, place_TE, chosen_TE, count_E)


class _Gates(torch.autograd.Function):
  """The gates of K different experts. torch's gradient of the choice sorts, to be repeatable."""

  @staticmethod
  def forward(ctx: Any, score_TE: Tensor, to: _Forced, spec: RouterSpec) -> Tensor:
    gate_TK, sum_T1 = score_TE.gather(1, to.index_TK), None
    if spec.normalize:
      sum_T1 = gate_TK.sum(1, keepdim=True).add_(1e-20)
      gate_TK /= sum_T1
    ctx.save_for_backward(gate_TK, sum_T1)
    ctx.to, ctx.scale = to, spec.scale
    return gate_TK * spec.scale

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy_TK: Tensor) -> tuple[Tensor, None, None]:
    gate_TK, sum_T1 = ctx.saved_tensors
    d_TK = dy_TK * ctx.scale
    if sum_T1 is not None:  # of g = s / Σ s: (dg - Σ g · dg) / Σ s
      d_TK = d_TK.sub((gate_TK * d_TK).sum(1, keepdim=True)).div_(sum_T1)
    return d_TK.gather(1, ctx.to.place_TE).where(ctx.to.chosen_TE, 0.0), None, None


def force_balance(routing: Routing, spec: RouterSpec) -> Routing:
  """The benchmark's routing: expert (t·K + k) mod E, with the gates that its scores give."""
  score_TE = routing.score_TE
  to = _forced(len(score_TE), spec.top_k, score_TE.shape[1], score_TE.device)
  gate_TK = _Gates.apply(score_TE, to, spec)
  return routing._replace(expert_TK=to.expert_TK, gate_TK=gate_TK, count_E=to.count_E)


def balance_loss(score_LTE: Tensor, num_sequences: int, top_k: int) -> Tensor:
  """The sequence-wise balance losses (2412.19437 Eq 17-20) of L layers before their weight: fp32
  [L], 1 when even.

  score_LTE holds the unbiased scores of `num_sequences` sequences of equal length, over which a
  loss is averaged. Counts come from the unbiased top-k over all experts, whatever the bias or the
  groups then select.
  """
  num_experts = score_LTE.shape[2]
  with torch.no_grad():
    chosen_LTK = score_LTE.topk(top_k).indices
    chosen_LTE = torch.zeros_like(score_LTE).scatter_(2, chosen_LTK, 1.0)
    load_LBE = chosen_LTE.unflatten(1, (num_sequences, -1)).mean(2) * (num_experts / top_k)
  share_LTE = score_LTE / score_LTE.sum(2, keepdim=True)
  share_LBE = share_LTE.unflatten(1, (num_sequences, -1)).mean(2)
  return (load_LBE * share_LBE).sum(2).mean(1)


def global_balance_loss(score_LTE: Tensor, count_LE: Tensor) -> Tensor:
  """The global-batch balance losses (arXiv 2501.11873 section 3) of L layers before their weight:
  fp32 [L], 1 when even.

  E · Σ_i f_i P_i: f_i is expert i's share of what the router chose in the whole optimizer step, on
  all ranks, as count_LE [L, E] counts it; it has no gradient. P_i is i's mean share of the scores
  [L, T, E] of some of the step's tokens. Averaged over equal parts of the step it is the loss of
  the whole step, since f_i is the same in all.
  """
  share_LTE = score_LTE / score_LTE.sum(2, keepdim=True)
  load_LE = count_LE.double() * count_LE.shape[1] / count_LE.double().sum(1, keepdim=True)
  return (load_LE.to(share_LTE.dtype) * share_LTE.mean(1)).sum(1)


@torch.no_grad()
def update_bias(routers: list[Router], count_LE: Tensor, rate: float) -> None:
  """b += rate · sign(mean load - load), once per optimizer step (arXiv 2408.15664 Algorithm 1).

  count_LE [num routers, E] counts the tokens of the whole optimizer step on all ranks: every
  micro-batch once, recomputation excluded. No host synchronisation.
  """
  load_LE = count_LE.double()
  step_LE = rate * torch.sign(load_LE.mean(1, keepdim=True) - load_LE).float()
  for router, step_E in zip(routers, step_LE, strict=True):
    router.bias += step_E
