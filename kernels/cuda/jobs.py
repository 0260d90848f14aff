"""The operations of a run, each as a call that `kernels.cuda.build` makes on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.build import Shapes
from kernels.cuda.combine import combine
from kernels.cuda.layout import layout
from kernels.cuda.optim import adamw, newton_schulz
from kernels.cuda.router import route
from kernels.ops import RouterSpec

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
  """A tensor without memory, a leaf that wants a gradient if it is floating."""
  t = torch.empty(shape, dtype=dtype, device="meta")
  return t.requires_grad_(grad and dtype.is_floating_point)


def backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
  """Run the backward pass of all differentiable outputs."""
  outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
  roots = [out for out in outputs if out.requires_grad]
  torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])


def _route(s: Shapes) -> None:
  experts = s.num_experts
  spec = RouterSpec(s.top_k, s.score, s.num_groups, s.topk_groups, s.normalize, s.route_scale)
  weight, bias = meta(experts, s.dim, dtype=FP32), meta(experts, dtype=FP32, grad=False)
  backward(route(meta(s.batch * s.seq_len, s.dim), weight, bias, spec)[1:3])
  backward(route(meta(s.batch * s.seq_len, s.dim), weight, bias, spec).gate_TK)


def _layout(s: Shapes) -> None:
  layout(meta(s.batch * s.seq_len, s.top_k, dtype=torch.int32), s.num_experts)


def _combine(s: Shapes) -> None:
  tokens = s.batch * s.seq_len
  backward(combine(meta(tokens, s.top_k, s.dim), meta(tokens, s.top_k, dtype=FP32)))


def _adamw(s: Shapes) -> None:
  moment = BF16 if s.moments == "bf16" else FP32
  for param, grad in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
    tensors = [[meta(s.dim, dtype=t, grad=False)] for t in (param, grad, FP32, moment, moment)]
    scale = meta(dtype=FP32, grad=False)
    adamw(*tensors, step=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_scale=scale)


def _newton_schulz(s: Shapes) -> None:
  newton_schulz(meta(s.num_experts // s.ranks, s.expert_dim, s.dim, grad=False), 1)


def jobs(shapes: Shapes) -> Iterator[tuple[str, Callable[[], None]]]:
  """(name, call) of every operation that a run of these shapes uses."""
  for name, job in (
    ("route", _route),
    ("layout", _layout),
    ("combine", _combine),
    ("adamw", _adamw),
  ):
    yield name, partial(job, shapes)
  if shapes.muon:
    yield "newton_schulz", partial(_newton_schulz, shapes)
