"""The router's parameters, its balance loss and its bias (arXiv 2412.19437 section 2.1.2).

The arithmetic of scores, groups and gates is `ops.route`; what is here belongs to the model: the
fp32 weight, the fp32 selection bias, and the ways of keeping experts evenly loaded.
"""

from __future__ import annotations

from typing import Any

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


class _Chosen(torch.autograd.Function):
  """score[t, expert[t, k]] of K different experts: torch's own gradient sorts to be repeatable."""

  @staticmethod
  def forward(ctx: Any, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
    ctx.save_for_backward(expert_TK)
    ctx.num_experts = score_TE.shape[1]
    return score_TE.gather(1, expert_TK)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dgate_TK: Tensor) -> tuple[Tensor, None]:
    (expert_TK,) = ctx.saved_tensors
    zeros_TE = dgate_TK.new_zeros(len(dgate_TK), ctx.num_experts)
    return zeros_TE.scatter_(1, expert_TK, dgate_TK), None


def force_balance(routing: Routing, spec: RouterSpec) -> Routing:
  """The benchmark's routing: expert (t·K + k) mod E, with the gates that its scores give."""
  num_tokens, num_experts = routing.score_TE.shape
  num_rows = num_tokens * spec.top_k
  device = routing.score_TE.device
  row_TK = torch.arange(num_rows, dtype=torch.int64, device=device).view(num_tokens, spec.top_k)
  expert_TK = row_TK % num_experts
  gate_TK = _Chosen.apply(routing.score_TE, expert_TK)
  if spec.normalize:
    gate_TK = gate_TK / (gate_TK.sum(1, keepdim=True) + 1e-20)
  extra_E = torch.arange(num_experts, device=device) < num_rows % num_experts
  count_E = (num_rows // num_experts + extra_E.int()).int()
  return Routing(expert_TK.int(), gate_TK * spec.scale, routing.score_TE, count_E)


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
