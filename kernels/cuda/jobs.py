"""The operations of a run, each as a call that `kernels.tools.compiler` makes on meta tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.buffers import COUNTS, DTYPES, Buffers, Route
from kernels.copies import Copies
from kernels.cuda.adamw import adamw
from kernels.cuda.combine import combine
from kernels.cuda.dense import linear, mlp
from kernels.cuda.exchange import Exchange
from kernels.cuda.experts import (
  experts,
  grouped_mlp,
  grouped_mlp_backward,
  grouped_mlp_forward,
)
from kernels.cuda.layout import layout
from kernels.cuda.loss import linear_cross_entropy
from kernels.cuda.muon import muon
from kernels.cuda.norm import add_rms_norm, rms_norm
from kernels.cuda.quantization import quantize
from kernels.cuda.rope import mla_qkv
from kernels.cuda.router import route
from kernels.formats import quantize_rows
from kernels.ops import Product, Recipe, RouterSpec, Rows
from kernels.shapes import Shapes
from kernels.sizes import PAYLOADS, BufferLayout

BF16, FP32 = torch.bfloat16, torch.float32
GRADIENTS = ("bf16", "fp32", "added")  # of weights: in bf16, made in fp32, added to one in fp32


def meta(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
  """A tensor without memory, a leaf that wants a gradient if it is floating."""
  t = torch.empty(shape, dtype=dtype, device="meta")
  return t.requires_grad_(grad and dtype.is_floating_point)


def backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
  """Run the backward pass of all differentiable outputs."""
  outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
  roots = [out for out in outputs if out.requires_grad]
  torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])


def weights(kind: str, *shapes: tuple[int, ...]) -> list[Tensor]:
  """Weights whose gradients are of a kind of GRADIENTS."""
  made = [meta(*shape) for shape in shapes]
  for weight in made:
    weight.grad_dtype = BF16 if kind == "bf16" else FP32
    weight.grad = meta(*weight.shape, dtype=FP32, grad=False) if kind == "added" else None
  return made


def _route(s: Shapes) -> None:
  experts = s.num_experts
  spec = RouterSpec(s.top_k, s.score, s.num_groups, s.topk_groups, s.normalize, s.route_scale)
  weight, bias = meta(experts, s.dim, dtype=FP32), meta(experts, dtype=FP32, grad=False)
  for with_scores in (True, False):
    out = route(meta(s.batch * s.seq_len, s.dim), weight, bias, spec)
    backward((out.gate_TK, out.x_TD, *([out.score_TE] if with_scores else [])))


def _layout(s: Shapes) -> None:
  layout(meta(s.batch * s.seq_len, s.top_k, dtype=torch.int32), s.num_experts)


def _combine(s: Shapes) -> None:
  tokens = s.batch * s.seq_len
  backward(combine(meta(tokens, s.top_k, s.dim), meta(tokens, s.top_k, dtype=FP32)))


def _mover(s: Shapes, slots: int = 1) -> Exchange:
  rows = s.batch * s.seq_len * s.top_k
  sizes = BufferLayout(s.ranks, s.num_experts, rows, rows, s.dim, "bf16", s.payload, slots)
  fields = sizes.fields.values()
  block = Buffers(*(meta(*shape, dtype=DTYPES[kind], grad=False) for shape, kind in fields))
  return Exchange([block] * s.ranks, 0, 1.0)


def _exchange(s: Shapes) -> None:
  mover = _mover(s)
  expert_TK = meta(s.batch * s.seq_len, s.top_k, dtype=torch.int32)
  gate_TK, x_TD = torch.empty_like(expert_TK, dtype=FP32), meta(*expert_TK.shape[:1], s.dim)
  base_RE = meta(s.ranks, s.num_experts, dtype=torch.int64)
  route = Route(expert_TK, layout(expert_TK, s.num_experts), base_RE, base_RE)
  mover.post_counts(1, meta(s.num_experts, dtype=torch.int32))
  mover.places(1)
  for gate, format in zip((None, gate_TK), PAYLOADS[s.payload], strict=True):
    mover.send(1, x_TD, gate, route, 0, format)
    row_CD, gate_C, origin_C = mover.receive(mover.capacity, format)
    mover.reply(1, origin_C, row_CD, None if gate is None else gate_C, route, 0)
  if s.payload == "bf16":
    _mover(s, slots=2).receive(mover.capacity, s.payload)
  mover.wait(COUNTS, 1)


def _payload(s: Shapes) -> None:
  """What one rank, which sends nothing, does to its rows."""
  for format in PAYLOADS[s.payload]:
    quantize_rows(meta(s.batch * s.seq_len, s.dim, grad=False), format, quantize)


def _norms(s: Shapes) -> None:
  for width in {s.dim, s.kv_lora_rank, s.q_lora_rank} - {0}:
    x, weight = meta(s.batch, s.seq_len, width), meta(width)
    backward(rms_norm(x, weight, 1e-6))
  x, residual = (meta(s.batch, s.seq_len, s.dim) for _ in range(2))
  backward(add_rms_norm(x, residual, meta(s.dim), 1e-6))


def _mla_qkv(s: Shapes) -> None:
  heads, nope, rope, v = s.num_heads, s.qk_nope_dim, s.qk_rope_dim, s.v_dim
  q = meta(s.batch, s.seq_len, heads, nope + rope)
  kv, k_rope = meta(s.batch, s.seq_len, heads, nope + v), meta(s.batch, s.seq_len, rope)
  angles = (meta(s.seq_len, rope // 2, dtype=FP32, grad=False) for _ in range(2))
  backward(mla_qkv(q, kv, k_rope, *angles, rope))


def _attention(s: Shapes) -> None:
  """Through FlashAttention-4's inner functions: it compiles for torch's fake tensors, not meta."""
  with FakeTensorMode():
    lead, qk = (s.batch, s.seq_len, s.num_heads), s.qk_nope_dim + s.qk_rope_dim
    q, k, v, dy = (
      torch.empty(*lead, width, dtype=BF16, device="cuda:0") for width in (qk, qk, s.v_dim, s.v_dim)
    )
    y, lse = _flash_attn_fwd(q, k, v, softmax_scale=0.1, causal=True, return_lse=True)[:2]
    _flash_attn_bwd(q, k, v, y, dy, lse, softmax_scale=0.1, causal=True, deterministic=True)


def _recipes(s: Shapes) -> list[Recipe]:
  """The run's recipes: some layers of a quantized run, and its finish, are bf16."""
  if s.dtype == "bf16":
    return [Recipe()]
  quantized = Recipe(s.dtype, s.emulate_blockscale)
  return [Recipe(), quantized, replace(quantized, forward_only_bf16=True)]


def _mlp(s: Shapes, recipe: Recipe, kind: str) -> None:
  x = meta(s.batch, s.seq_len, s.dim)
  for width in {s.dense_dim, s.num_shared * s.expert_dim} - {0}:
    backward(mlp(x, *weights(kind, (2 * width, s.dim), (s.dim, width)), recipe))
  backward(linear(x, *weights(kind, (s.dim, s.dim)), recipe))


def _expert_weights(s: Shapes, kind: str) -> list[Tensor]:
  local = s.num_experts // s.ranks
  return weights(kind, (local, 2 * s.expert_dim, s.dim), (local, s.dim, s.expert_dim))


def _experts(s: Shapes, recipe: Recipe, kind: str) -> None:
  tokens, w = s.batch * s.seq_len, _expert_weights(s, kind)
  order = layout(meta(tokens, s.top_k, dtype=torch.int32), len(w[0]))
  if s.ranks == 1:
    gate = meta(tokens, s.top_k, dtype=FP32)
    backward(experts(meta(tokens, s.dim), gate, order, *w, recipe))
  else:
    backward(grouped_mlp(meta(tokens * s.top_k, s.dim), order.offset_E1, *w, recipe))


@torch.no_grad()
def _owner(s: Shapes, recipe: Recipe, kind: str) -> None:
  """What RDEP runs on the received rows; the products' rows for a reply, and without one."""
  mover, w = _mover(s), _expert_weights(s, kind)
  x_CD, _, origin_C = mover.receive(mover.capacity, PAYLOADS[s.payload].x)
  gate_C, offset_E1 = (
    meta(len(x_CD), dtype=FP32, grad=False),
    meta(len(w[0]) + 1, dtype=torch.int32),
  )
  y, kept = grouped_mlp_forward(x_CD, offset_E1, *w, recipe, True)
  dx, dgate_C, gradients = grouped_mlp_backward(kept, x_CD, gate_C, *w)
  for mover.fused in (False, True):
    for rows, gate in ((y, None), (dx, dgate_C)):
      if isinstance(rows, Product):
        mover.multiply(rows, origin_C, gate)
  gradients()


def _loss(s: Shapes) -> None:
  tokens = s.batch * s.seq_len
  x, weight = meta(tokens, s.dim), meta(s.vocab_size, s.dim)
  target = meta(tokens, dtype=torch.int64)
  backward(linear_cross_entropy(x, weight, target, s.loss_chunk)[0])


def _copies(s: Shapes, weight: Tensor) -> Copies:
  """What a quantized product of the run keeps of a weight."""
  copies = Copies()
  if s.dtype != "bf16":
    recipe = Recipe(s.dtype, s.emulate_blockscale, copies=copies)
    backward(linear(meta(s.batch, s.seq_len, weight.shape[1]), weight, recipe))
  return copies


def _adamw(s: Shapes) -> None:
  moment = BF16 if s.moments == "bf16" else FP32
  scale = meta(dtype=FP32, grad=False)
  rule = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
  for param, grad in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
    weight = meta(s.dim, s.dim, dtype=param)
    state = [[meta(s.dim, s.dim, dtype=t, grad=False)] for t in (grad, FP32, moment, moment)]
    step = partial(adamw, [weight], *state, step=1, **rule, grad_scale=scale)
    step()
    if param == BF16:
      step(copies=[_copies(s, weight)])


def _muon(s: Shapes) -> None:
  moment = BF16 if s.moments == "bf16" else FP32
  rule = {
    "lr": 0.1,
    "momentum": 0.95,
    "weight_decay": 0.1,
    "grad_scale": meta(dtype=FP32, grad=False),
  }
  shape = s.num_experts // s.ranks, 2 * s.expert_dim, s.dim
  rule |= {"blocks": (Rows(2, 0, 1), Rows(2, 1, 2)), "sizes": (1.0, 1.0), "steps": 1}
  for param, grad in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
    for idle in (False, True):
      state = [[meta(*shape, dtype=t, grad=False)] for t in (param, grad, FP32, moment)]
      muon(*state, experts=idle, **rule)


def jobs(shapes: Shapes) -> Iterator[tuple[str, Callable[[], None]]]:
  """(name, call) of every operation that a run of these shapes uses.

  A kernel of two operations is compiled by the first: short ones that others call, then the rest by
  their length.
  """
  ranks = shapes.ranks > 1
  yield "layout", partial(_layout, shapes)
  yield "combine", partial(_combine, shapes)
  by_weights = {"experts": _experts, "mlp": _mlp} | ({"owner": _owner} if ranks else {})
  for name, job in by_weights.items():
    for recipe, kind in itertools.product(_recipes(shapes), GRADIENTS):
      yield name, partial(job, shapes, recipe, kind)
  for name, job in (
    ("route", _route),
    ("attention", _attention),
    ("loss", _loss),
    ("norms", _norms),
    ("adamw", _adamw),
    ("mla_qkv", _mla_qkv),
  ):
    yield name, partial(job, shapes)
  if ranks:
    yield "exchange", partial(_exchange, shapes)
  elif shapes.payload != "bf16":
    yield "payload", partial(_payload, shapes)
  if shapes.muon:
    yield "muon", partial(_muon, shapes)
