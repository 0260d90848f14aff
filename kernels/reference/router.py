"""Routing, the expert-sorted layout and the combination of expert outputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.arithmetic import wide
from kernels.ops import Layout, RouterSpec, Routing, check


def route(x: Tensor, weight: Tensor, bias: Tensor, spec: RouterSpec) -> Routing:
  """See Ops.route (arXiv 2412.19437 Eq 12-16). float64 inputs give float64 scores and gates."""
  num_experts = weight.shape[0]
  check_spec(spec, num_experts)
  dtype = wide(x, weight)
  logits_TE = F.linear(x.to(dtype), weight.to(dtype))
  score_TE = logits_TE.sigmoid() if spec.score == "sigmoid" else logits_TE.softmax(-1)
  expert_TK = _select(score_TE.detach() + bias.to(dtype), spec)
  gate_TK = score_TE.gather(1, expert_TK)
  if spec.normalize:
    gate_TK = gate_TK / (gate_TK.sum(-1, keepdim=True) + 1e-20)
  count_E = torch.bincount(expert_TK.flatten(), minlength=num_experts)
  return Routing(expert_TK.int(), gate_TK * spec.scale, score_TE, count_E.int(), x)


def check_spec(spec: RouterSpec, num_experts: int) -> None:
  """KernelError unless the experts divide into groups that leave room for top_k."""
  check(
    spec.score in ("sigmoid", "softmax"),
    f'route: score {spec.score!r} is unknown; use "sigmoid" or "softmax"',
  )
  check(
    1 <= spec.topk_groups <= spec.num_groups and num_experts % spec.num_groups == 0,
    f"route: {spec.topk_groups} of {spec.num_groups} groups of {num_experts} experts; groups must "
    "divide the experts and be at least the chosen ones",
  )
  room = num_experts // spec.num_groups * spec.topk_groups
  check(
    1 <= spec.top_k <= room,
    f"route: top_k {spec.top_k} exceeds the {room} experts of {spec.topk_groups} groups",
  )


def _select(biased_TE: Tensor, spec: RouterSpec) -> Tensor:
  """The top_k experts of each token from its best groups, best first; ties to the lower index."""
  if spec.topk_groups < spec.num_groups:
    grouped_TGE = biased_TE.unflatten(1, (spec.num_groups, -1))
    best = grouped_TGE.topk(min(2, grouped_TGE.shape[2]), dim=2).values.sum(2)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _best(best, spec.topk_groups), True)
    biased_TE = grouped_TGE.masked_fill(~kept[..., None], -torch.inf).flatten(1)
  return _best(biased_TE, spec.top_k)


def _best(values: Tensor, count: int) -> Tensor:
  return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :count]


def layout(expert_TK: Tensor, num_experts: int) -> Layout:
  """See Ops.layout. Experts must be in [0, num_experts); checking it would need the host."""
  device = expert_TK.device
  sorted_N, source_N = expert_TK.flatten().sort(stable=True)
  edges = torch.arange(num_experts + 1, dtype=sorted_N.dtype, device=device)
  offset_E1 = torch.searchsorted(sorted_N, edges, out_int32=True)
  row_N = torch.empty_like(source_N, dtype=torch.int32)
  row_N[source_N] = torch.arange(source_N.numel(), dtype=torch.int32, device=device)
  return Layout(offset_E1, row_N.view(expert_TK.shape), source_N.int())


def combine(y_TKD: Tensor, gate_TK: Tensor) -> Tensor:
  """See Ops.combine."""
  check(
    y_TKD.shape[:2] == gate_TK.shape,
    f"combine: y {tuple(y_TKD.shape)} and gate {tuple(gate_TK.shape)} must agree in [T, K]",
  )
  return _Combine.apply(y_TKD, gate_TK)


class _Combine(torch.autograd.Function):
  @staticmethod
  def forward(ctx, y_TKD: Tensor, gate_TK: Tensor) -> Tensor:
    ctx.save_for_backward(y_TKD, gate_TK)
    return _weighted_sum(y_TKD.unbind(1), gate_TK).to(y_TKD.dtype)

  @staticmethod
  @once_differentiable
  def backward(ctx, dout_TD: Tensor):
    y_TKD, gate_TK = ctx.saved_tensors
    dtype = wide(y_TKD, gate_TK)
    dout_T1D = dout_TD.to(dtype)[:, None]
    dy_TKD = gate_TK.to(dtype)[..., None] * dout_T1D
    dgate_TK = (y_TKD.to(dtype) * dout_T1D).sum(-1)
    return dy_TKD.to(y_TKD.dtype), dgate_TK.to(gate_TK.dtype)


def sum_rows(y_ND: Tensor, row_TK: Tensor, gate_TK: Tensor) -> Tensor:
  """Σ_k gate[t, k] · y[row[t, k]], k ascending, in fp32 or wider: [T, D]."""
  return _weighted_sum((y_ND.index_select(0, row_T) for row_T in row_TK.unbind(1)), gate_TK)


def _weighted_sum(columns: Iterable[Tensor], gate_TK: Tensor) -> Tensor:
  """Σ_k gate[:, k] · columns[k], in the order given."""
  total = 0.0
  for y_TD, gate_T in zip(columns, gate_TK.unbind(1), strict=True):
    gate_T1 = gate_T.to(wide(y_TD, gate_T))[:, None]
    total = total + gate_T1 * y_TD
  return total
