"""The decoder: pre-norm DeepSeek blocks of latent attention and routed experts.

Source: DeepSeek-V3, arXiv 2412.19437 section 2.1. Shape letters as in kernels/ops.py. Every hot
operation goes through `ops`, a module that satisfies kernels.ops.Ops. (branch, residual) pass from
block to block, so that each residual sum is fused with the norm that follows it. The forward pass
never synchronises with the host.

One file: a reader of the model's equations turns no page between a block and its parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.buffers import DTYPES
from kernels.copies import Copies
from kernels.formats import derive
from kernels.gradient import gradient
from kernels.ops import Ops, Recipe, Rows
from nmoe.config.parameters import is_matrix, parameter_dtype, parameter_group
from nmoe.config.scaling import initial_std
from nmoe.config.sections import Config, ModelConfig, YarnConfig
from nmoe.config.yarn import softmax_mscale, yarn_range
from nmoe.distributed.rdep import Rdep
from nmoe.errors import ConfigError
from nmoe.model.init import NormalInit
from nmoe.model.recompute import Source, source
from nmoe.model.router import Router, balance_loss, global_balance_loss


class ModelOutput(NamedTuple):
  loss_sum: Tensor  # fp32 0-d: Σ of the token losses, in nats
  loss_T: Tensor  # fp32 [B·S], no gradient; 0 where the target is -1
  balance_loss: Tensor  # fp32 0-d: Σ over layers of the weighted balance losses
  count_LE: Tensor  # int32 [MoE layers, E]: tokens that this rank's batch sends to each expert


class _Embedding(torch.autograd.Function):
  """weight[token], whose gradient is summed over equal tokens in fp32 and rounded once.

  torch's on a CPU sums in the weight's dtype: in bf16 the sum for a frequent token loses terms.
  """

  @staticmethod
  def forward(ctx: Any, token_BS: Tensor, weight_VD: Tensor) -> Tensor:
    ctx.save_for_backward(token_BS, weight_VD)
    return F.embedding(token_BS, weight_VD)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, dy_BSD: Tensor) -> tuple[None, Tensor | None]:
    token_BS, weight_VD = ctx.saved_tensors
    wide = torch.promote_types(dy_BSD.dtype, torch.float32)
    vocab, token_T, dy_TD = weight_VD.shape[0], token_BS.flatten(), dy_BSD.flatten(0, 1).to(wide)

    def product(out: Tensor, add: bool) -> None:
      if out.dtype == wide and len(token_T) < vocab:  # most rows have no token: leave them alone
        (out if add else out.zero_()).index_add_(0, token_T, dy_TD)
        return
      rows = torch.ops.aten.embedding_dense_backward(dy_TD, token_T, vocab, -1, False)
      (out.add_ if add else out.copy_)(rows)

    return None, gradient(weight_VD, product)


class Linear(nn.Module):
  """weight [O, I], no bias, multiplied in the arithmetic of `recipe`."""

  def __init__(self, in_dim: int, out_dim: int, dtype: torch.dtype, recipe: Recipe, ops: Ops):
    super().__init__()
    self.ops, self.recipe = ops, recipe
    self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=dtype))

  def forward(self, x: Tensor) -> Tensor:
    """Observers see products of the step alone, not what backward computes again."""
    recipe = self.recipe
    if recipe.observe is not None and not torch.is_grad_enabled():
      recipe = replace(recipe, observe=None)
    return self.ops.linear(x, self.weight, recipe)


class Norm(nn.Module):
  """RMSNorm's weight [D]; with a residual, the sum comes first and is returned too."""

  def __init__(self, dim: int, eps: float, dtype: torch.dtype, ops: Ops):
    super().__init__()
    self.ops, self.eps = ops, eps
    self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))

  def forward(self, x: Tensor) -> Tensor:
    return self.ops.rms_norm(x, self.weight, self.eps)

  def add(self, branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual); branch None is zero."""
    if branch is None:
      return self(residual), residual
    return self.ops.add_rms_norm(branch, residual, self.weight, self.eps)


class Mlp(nn.Module):
  """A dense SwiGLU block: w13 [2F, D] with interleaved gate and up rows, w2 [D, F]."""

  def __init__(self, dim: int, width: int, dtype: torch.dtype, recipe: Recipe, ops: Ops):
    super().__init__()
    self.ops, self.recipe = ops, recipe
    self.w13 = nn.Parameter(torch.empty(2 * width, dim, dtype=dtype))
    self.w2 = nn.Parameter(torch.empty(dim, width, dtype=dtype))

  def forward(self, x: Tensor) -> Tensor:
    return self.ops.mlp(x, self.w13, self.w2, self.recipe)


class Attention(nn.Module):
  """Multi-head latent attention (2412.19437 Eq 1-11), with YaRN's softmax scale when extended."""

  def __init__(self, config: Config, layer: int, ops: Ops):
    super().__init__()
    m, dtype = config.model, DTYPES[parameter_dtype(config)]
    self.ops, self.model, self.recompute = ops, m, config.train.recompute
    self.scale = (m.qk_nope_dim + m.qk_rope_dim) ** -0.5 * softmax_mscale(config.yarn) ** 2

    def linear(in_dim: int, out_dim: int, name: str) -> Linear:
      return Linear(in_dim, out_dim, dtype, recipe_for(config, name, layer), ops)

    q_dim = m.num_heads * (m.qk_nope_dim + m.qk_rope_dim)
    if m.q_lora_rank:
      self.q_a = linear(m.dim, m.q_lora_rank, "q")
      self.q_norm = Norm(m.q_lora_rank, m.norm_eps, dtype, ops)
      self.q_b = linear(m.q_lora_rank, q_dim, "q")
    else:
      self.q = linear(m.dim, q_dim, "q")
    self.kv_a = linear(m.dim, m.kv_lora_rank + m.qk_rope_dim, "kv_a")
    self.kv_norm = Norm(m.kv_lora_rank, m.norm_eps, dtype, ops)
    self.kv_b = linear(m.kv_lora_rank, m.num_heads * (m.qk_nope_dim + m.v_dim), "kv_b")
    self.o = linear(m.num_heads * m.v_dim, m.dim, "o")

  def forward(self, x_BSD: Tensor, x: Source, cos: Tensor, sin: Tensor) -> Tensor:
    """x: what backward has of x_BSD."""
    with x.unsaved():
      low_q = self.q_a(x_BSD) if self.model.q_lora_rank else None
      low_kv = self.kv_a(x_BSD)
      qkv = self._qkv(low_q if low_q is not None else x_BSD, low_kv, cos, sin)
    kept_q, kept_kv = None if low_q is None else low_q.detach(), low_kv.detach()

    def compute() -> tuple[Tensor, ...]:
      return self._qkv(x.again()[0] if kept_q is None else kept_q, kept_kv, cos, sin)

    with source("qkv" in self.recompute, qkv, compute).unsaved():
      y = self.ops.attention(*qkv, self.scale)
    return self.o(y.flatten(2))

  def _qkv(self, low_q: Tensor, low_kv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Attention's operands, from the latent of q, or the block's input, and that of k and v."""
    m = self.model
    heads = (*low_kv.shape[:2], m.num_heads, -1)
    q = self._expanded(low_q, self.q_norm, self.q_b) if m.q_lora_rank else self.q(low_q)
    latent, k_rope = low_kv.split([m.kv_lora_rank, m.qk_rope_dim], dim=-1)
    kv = self._expanded(latent, self.kv_norm, self.kv_b)
    return self.ops.mla_qkv(q.view(heads), kv.view(heads), k_rope, cos, sin, m.qk_rope_dim)

  def _expanded(self, latent: Tensor, norm: Norm, linear: Linear) -> Tensor:
    """linear(norm(latent))."""
    normed, kept = norm(latent), latent.detach()
    with source("norm" in self.recompute, (normed,), lambda: (norm(kept),)).unsaved():
      return linear(normed)


class Experts(nn.Module):
  """The routed experts of this rank: w13 [E_local, 2F, D], w2 [E_local, D, F].

  Rank r of R holds the global experts r·E/R … (r + 1)·E/R - 1.
  """

  def __init__(self, config: Config, layer: int, rdep: Rdep):
    super().__init__()
    dtype, e, dim = DTYPES[parameter_dtype(config)], config.moe, config.model.dim
    self.rdep, self.layer = rdep, layer
    self.recipe = recipe_for(config, "experts", layer)
    num_local = e.num_experts // rdep.num_ranks
    self.first = num_local * rdep.rank
    self.w13 = nn.Parameter(torch.empty(num_local, 2 * e.expert_dim, dim, dtype=dtype))
    self.w2 = nn.Parameter(torch.empty(num_local, dim, e.expert_dim, dtype=dtype))

  def forward(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, shared: Mlp | None) -> Tensor:
    """Σ_k gate · expert(x), plus shared(x): [T, D]."""
    return self.rdep.experts(
      x_TD, expert_TK, gate_TK, self.w13, self.w2, self.recipe, layer=self.layer, shared=shared
    )


class Loads(NamedTuple):
  """What the model keeps of a layer's routing: not x, which would live on."""

  score_TE: Tensor
  count_E: Tensor


class Moe(nn.Module):
  """Router, routed experts, and the shared experts as one block of num_shared · expert_dim."""

  def __init__(self, config: Config, layer: int, ops: Ops, rdep: Rdep):
    super().__init__()
    e, dim = config.moe, config.model.dim
    self.router = Router(dim, e, ops)
    self.experts = Experts(config, layer, rdep)
    self.shared = None
    if e.num_shared:
      recipe = recipe_for(config, "shared", layer)
      dtype = DTYPES[parameter_dtype(config)]
      self.shared = Mlp(dim, e.num_shared * e.expert_dim, dtype, recipe, ops)

  def forward(self, x_BSD: Tensor) -> tuple[Tensor, Loads]:
    """The output [B, S, D], and what the router loaded the experts with."""
    routing = self.router(x_BSD.flatten(0, 1))
    y_TD = self.experts(routing.x_TD, routing.expert_TK, routing.gate_TK, self.shared)
    return y_TD.view_as(x_BSD), Loads(routing.score_TE, routing.count_E)


class Normed(NamedTuple):
  """A norm's result, what backward has of it, and the sum that it is of."""

  x_BSD: Tensor
  x: Source
  total_BSD: Tensor


class Block(nn.Module):
  """One layer: attention, then a dense MLP or experts, each after its norm."""

  def __init__(self, config: Config, layer: int, ops: Ops, rdep: Rdep):
    super().__init__()
    m, dtype = config.model, DTYPES[parameter_dtype(config)]
    self.attention_norm = Norm(m.dim, m.norm_eps, dtype, ops)
    self.attention = Attention(config, layer, ops)
    self.mlp_norm = Norm(m.dim, m.norm_eps, dtype, ops)
    self.recompute_norms = config.recomputes_residual_norms
    self.dense = layer < m.num_dense_layers
    if self.dense:
      self.mlp = Mlp(m.dim, m.dense_dim, dtype, recipe_for(config, "dense", layer), ops)
    else:
      self.moe = Moe(config, layer, ops, rdep)

  def mlp_or_moe(self, x_BSD: Tensor) -> tuple[Tensor, Loads | None]:
    """The layer's second half, and what its router loaded the experts with, if it has one."""
    return (self.mlp(x_BSD), None) if self.dense else self.moe(x_BSD)

  def normed(self, norm: Norm, branch: Tensor | None, residual: Tensor) -> Normed:
    """One of the block's norms of branch + residual, and the sum."""
    x_BSD, total_BSD = norm.add(branch, residual)
    kept = total_BSD.detach()
    x = source(self.recompute_norms, (x_BSD,), lambda: (norm(kept),))
    return Normed(x_BSD, x, total_BSD)


class Model(nn.Module):
  """The decoder with its loss. Parameters are uninitialised until `init_weights`.

  `rdep` (None: of one rank) runs the experts. Parameters are created on torch's default device, be
  it `meta` with `to_empty` after.
  """

  def __init__(self, config: Config, ops: Ops, rdep: Rdep | None = None):
    super().__init__()
    m, dtype = config.model, DTYPES[parameter_dtype(config)]
    self.config, self.ops = config, ops
    rdep = rdep or Rdep(config, ops)
    self.embed = nn.Module()
    self.embed.weight = nn.Parameter(torch.empty(m.vocab_size, m.dim, dtype=dtype))
    self.layers = nn.ModuleList(Block(config, i, ops, rdep) for i in range(m.num_layers))
    self.quantized = _quantized(self.layers)
    self.on_final: Callable[[int], None] | None = None  # of backward: blocks i, i+1, … are done
    self.on_use: Callable[[int], None] = lambda block: None  # its weights are read from here on
    # From this batch's count_LE to that of the whole step, for the global-batch balance loss.
    self.step_counts: Callable[[Tensor], Tensor] = lambda count_LE: count_LE
    self.norm = Norm(m.dim, m.norm_eps, dtype, ops)
    if not m.tie_embeddings:
      self.head = nn.Module()
      self.head.weight = nn.Parameter(torch.empty(m.vocab_size, m.dim, dtype=dtype))
    shape = (config.data.seq_len, m.qk_rope_dim // 2)
    self.cos = nn.Buffer(torch.empty(shape, dtype=torch.float32), persistent=False)
    self.sin = nn.Buffer(torch.empty(shape, dtype=torch.float32), persistent=False)

  @property
  def routers(self) -> list[Router]:
    """The routers of the MoE layers, in the order of ModelOutput.count_LE."""
    return [block.moe.router for block in self.layers if not block.dense]

  @property
  def head_weight(self) -> Tensor:
    return self.embed.weight if self.config.model.tie_embeddings else self.head.weight

  def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The normed last states [B, S, D]; of the MoE layers the scores [T, E], none if no balance
    loss wants them, and the counts [E].
    """
    num_positions = tokens_BS.shape[1]
    if num_positions > self.cos.shape[0]:
      raise ConfigError(
        f"sequences of {num_positions} tokens, but data.seq_len is {self.cos.shape[0]}; "
        "raise data.seq_len"
      )
    cos, sin = self.cos[:num_positions], self.sin[:num_positions]
    self.on_use(-1)
    branch, residual = None, _Embedding.apply(tokens_BS, self.embed.weight)
    scores, counts = [], []
    for i, block in enumerate(self.layers):
      if self.on_final is not None and residual.requires_grad:
        residual.register_hook(partial(_tell, self.on_final, i))
      self.on_use(i)
      x_BSD, x, residual = block.normed(block.attention_norm, branch, residual)
      branch = block.attention(x_BSD, x, cos, sin)
      x_BSD, x, residual = block.normed(block.mlp_norm, branch, residual)
      with x.unsaved():
        branch, loads = block.mlp_or_moe(x_BSD)
      if loads is not None:
        scores += [loads.score_TE] if self.config.moe.has_balance_loss else []
        counts.append(loads.count_E)
    self.on_use(sys.maxsize)
    return self.norm.add(branch, residual)[0], scores, counts

  def forward(self, tokens_BS: Tensor, target_BS: Tensor) -> ModelOutput:
    """Losses of tokens against targets, int64 [B, S]; a target of -1 is ignored."""
    x_BSD, scores, counts = self.hidden(tokens_BS)
    loss_sum, loss_T = self.ops.linear_cross_entropy(
      x_BSD.flatten(0, 1), self.head_weight, target_BS.flatten(), self.config.train.loss_chunk
    )
    empty_LE = torch.empty(0, self.config.moe.num_experts, dtype=torch.int32, device=loss_T.device)
    count_LE = torch.stack(counts) if counts else empty_LE
    balance = loss_sum.new_zeros(())
    if scores:  # of all layers at once: many small operations, which are the host's time
      balance = self._balance(torch.stack(scores), count_LE, tokens_BS.shape[0])
    return ModelOutput(loss_sum, loss_T, balance, count_LE)

  def _balance(self, score_LTE: Tensor, count_LE: Tensor, num_sequences: int) -> Tensor:
    """The weighted balance losses of all layers; the global one where there is a step."""
    e, total = self.config.moe, score_LTE.new_zeros(())
    if e.balance_alpha:
      total = e.balance_alpha * balance_loss(score_LTE, num_sequences, e.top_k).sum()
    if e.global_balance_alpha and torch.is_grad_enabled():
      losses_L = global_balance_loss(score_LTE, self.step_counts(count_LE))
      total = total + e.global_balance_alpha * losses_L.sum()
    return total

  def logits(self, tokens_BS: Tensor) -> Tensor:
    """The next-token logits [B, S, V] in the parameters' dtype, for short texts and tests."""
    return self.ops.linear(self.hidden(tokens_BS)[0], self.head_weight, Recipe())

  def set_forward_bf16(self, on: bool) -> None:
    """Whether quantized products run forward in bf16 (precision.finish_tokens)."""
    for module in self.quantized.values():
      module.recipe = replace(module.recipe, forward_only_bf16=on)

  def set_draw(self, *place: int) -> None:
    """Draw stochastic rounding anew for the forward and backward pass that comes.

    The noise is a function of train.seed, of these integers (step, micro-batch, rank) and of the
    product, so a resumed run repeats it.
    """
    for i, module in enumerate(self.quantized.values()):
      module.recipe = replace(module.recipe, draw=derive(*place, i))

  @torch.no_grad()
  def init_weights(self, seed: int) -> None:
    """Matrices normal (std: nmoe.config.scaling), norms 1, router biases 0, and the RoPE tables.

    Bit-equal on any device. A parameter depends on the seed, its name and its shape, an expert's
    also on its global id: arms of an ablation, and runs on other numbers of ranks, share them.
    """
    m = self.config.model
    normal = NormalInit(seed, self.cos.device)
    for name, parameter in self.named_parameters():
      if parameter.ndim == 1:
        parameter.fill_(1.0)
        continue
      std = initial_std(self.config, name)
      if parameter_group(name) == "expert":
        first = self.get_submodule(name.rpartition(".")[0]).first
        for i, matrix in enumerate(parameter):
          normal.fill_(matrix, f"{name}.{first + i}", std)
      else:
        normal.fill_(parameter, name, std)
    for router in self.routers:
      router.bias.zero_()
    cos, sin = rope_tables(m, self.config.yarn, self.config.data.seq_len)
    self.cos.copy_(cos)
    self.sin.copy_(sin)


def _tell(on_final: Callable[[int], None], block: int, _: Tensor) -> None:
  """A hook on a block's input: its gradient comes after those of the block's parameters."""
  on_final(block)


def _quantized(layers: nn.ModuleList) -> dict[tuple[int, str], Linear | Mlp | Experts]:
  """The block-scaled modules by layer and product: the module's own name, "dense" for a block's."""
  return {
    (layer, "dense" if name == "mlp" else name.rpartition(".")[2]): module
    for layer, block in enumerate(layers)
    for name, module in block.named_modules()
    if isinstance(module, (Linear, Mlp, Experts)) and module.recipe.format != "bf16"
  }


def copies_of(model: nn.Module) -> dict[str, Copies]:
  """What keeps the quantized copies of a parameter, by its name."""
  return {
    f"{path}.{name}": module.recipe.copies
    for path, module in model.named_modules()
    if isinstance(module, (Linear, Mlp, Experts)) and module.recipe.copies is not None
    for name, _ in module.named_parameters(recurse=False)
  }


def recipe_for(config: Config, name: str, layer: int) -> Recipe:
  """The arithmetic of one module's products, and if quantized the keeper of its weights' copies.

  `name` is "experts" or one of precision.linears' names.
  """
  t = config.target
  if not config.quantizes(name, layer):
    return Recipe(recompute="swiglu" in config.train.recompute)
  return Recipe(t.dtype, emulate=t.emulate_blockscale, seed=config.train.seed, copies=Copies())


def rope_tables(m: ModelConfig, yarn: YarnConfig, seq_len: int) -> tuple[Tensor, Tensor]:
  """cos and sin, fp32 [S, rope / 2] on the CPU; frequencies by YaRN (arXiv 2309.00071)."""
  half = m.qk_rope_dim // 2
  j = torch.arange(half, dtype=torch.float64)
  frequency = m.rope_theta ** (-j / half)
  if yarn.factor > 1:
    low, high = yarn_range(m, yarn)
    ramp = ((j - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequency = frequency / yarn.factor * ramp + frequency * (1 - ramp)
  angle = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequency
  return angle.cos().float(), angle.sin().float()


def matrix_blocks(name: str, shape: tuple[int, ...], config: Config) -> tuple[Rows, ...]:
  """The logical matrices in a parameter [..., O, I] that Muon orthogonalises one by one.

  Leading dims (experts) are a batch. The matrices are those of the equations, not of the storage
  (2412.19437 Eq 1-9): q into W_UQ and W_QR, kv_a into W_DKV and W_KR, kv_b into W_UK and W_UV, each
  with the rows of all its heads (blocks of one head are the unstable case of arXiv 2502.16982), and
  w13 into gate and up. () for what stays with AdamW: norms, embedding, head, router.
  """
  m = config.model
  if not is_matrix(name, shape):
    return ()
  part = name.removesuffix(".weight").rpartition(".")[2]
  sizes = {
    "q": (m.qk_nope_dim, m.qk_rope_dim),
    "q_b": (m.qk_nope_dim, m.qk_rope_dim),
    "kv_a": (m.kv_lora_rank, m.qk_rope_dim),
    "kv_b": (m.qk_nope_dim, m.v_dim),
    "w13": (1, 1),
  }.get(part)
  if sizes is None:
    return (Rows(shape[-2], 0, shape[-2]),)
  first, second = sizes
  return (Rows(first + second, 0, first), Rows(first + second, first, first + second))
