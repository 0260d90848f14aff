"""The contract of the hot operations.

Two packages implement it: `kernels.reference` (plain PyTorch, any device and dtype) and
`kernels.cuda` (CuTeDSL and QuACK on sm_90a and sm_100a). Each exports one module-level function for
every method of `Ops`, with the same name and parameters; `tests/kernels/test_ops.py` compares them.
A target picks one package, once, at start (`nmoe.machine.target`).

Shape letters: T tokens, D model width, F expert width, E experts on this rank, K top-k, N = T·K
rows, H heads, S sequence, B batch, V vocabulary. Every function that returns a floating tensor is
differentiable with respect to its floating inputs unless it says otherwise.

Gradients of weights have the weight's dtype, but for a bf16 leaf whose `grad_dtype` is fp32 (a view
is no leaf). In `linear`, `mlp`, `grouped_mlp`, its two halves, `experts` and the norms of
kernels.cuda, in every format, and in `linear_cross_entropy` of both packages, such a leaf's
gradient is the fp32 sum, never rounded to bf16; and if the leaf has a `.grad`, backward adds to it
in place, once an element and call, and returns no gradient: Tensor.backward is right there,
torch.autograd.grad gets None. Elsewhere, in the rest of kernels.reference too, the gradient is
rounded to bf16, and autograd widens and adds it.

Gate and up projections share one weight `w13` whose rows are interleaved: row 2i is the gate's row
i, row 2i+1 the up projection's row i. So swiglu(h)[..., i] = silu(h[..., 2i]) · h[..., 2i+1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.copies import Copies, Key
from kernels.errors import KernelError as KernelError


class Rows(NamedTuple):
  """A logical matrix inside a stored weight: the rows r with start <= r mod period < stop."""

  period: int
  start: int
  stop: int

  def view(self, weight: Tensor) -> Tensor:
    """A writable view [..., O / period, stop - start, I] of weight [..., O, I].

    Its flatten(-3, -2) is the matrix.
    """
    return weight.unflatten(-2, (-1, self.period))[..., self.start : self.stop, :]


@dataclass(frozen=True)
class RouterSpec:
  """How a router turns logits into experts and gates (DeepSeek-V3, arXiv 2412.19437 Eq 12-16)."""

  top_k: int
  score: str = "sigmoid"  # "sigmoid" or "softmax", over fp32 logits
  num_groups: int = 1  # groups of E / num_groups neighbouring experts
  topk_groups: int = 1  # groups a token may choose from
  normalize: bool = True  # divide the K gates by their sum (+1e-20)
  scale: float = 1.0  # factor on the gates, after normalisation


class Operand(NamedTuple):
  """A quantized operand as a recipe's observer sees it, during forward or backward."""

  leg: str  # "fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_x" or "wgrad_dy"
  salt: int  # the product within the operation: 0 is a linear's or w13's, 1 is w2's
  x: Tensor  # before quantization: sorted rows [N', C] or weights [E, R, C]
  quantized: Any  # its BlockScaled (kernels.formats)
  offset_E1: Sequence[int] | Tensor | None  # the experts' rows in x; None for weights
  hadamard: int | None  # the seed of the rotation that came before quantization


@dataclass(frozen=True)
class Recipe:
  """The arithmetic of a matrix product's operands.

  format "bf16" multiplies in the tensors' own dtype. "fp8" is MXFP8 (arXiv 2506.08027): E4M3
  operands of all three products, scaled per 32 along the product's sum. "nvfp4" is NVFP4 (arXiv
  2509.25149): weights in 16 x 16 blocks, activations and gradients per 16, gradients rounded
  stochastically, both operands of the weight gradient rotated along tokens. A tensor's scale is
  that of the argument, all experts' rows or weights together; blocks along tokens start anew at
  each expert.

  With `emulate` the operands are quantized, and their values multiplied in fp32 or wider: the
  products are those of the tensor cores, exactly; only the order of the sum differs. Without it
  block-scaled tensor cores are required (sm_100a). `forward_only_bf16` keeps the forward product in
  the tensors' own dtype while both gradients stay quantized (2509.25149 section 5).

  With `copies`, which serve one module, its weights are quantized once for each change of them.

  With `recompute`, in format "bf16", `mlp`, `grouped_mlp`, its halves and `experts` keep their
  input rows and not the pre-activation w13 · x: backward computes it again, with the same bits.
  """

  format: str = "bf16"
  emulate: bool = False
  forward_only_bf16: bool = False
  seed: int = 0  # of the Hadamard signs: one for the whole run
  draw: int = 0  # of stochastic rounding, with `seed`: another one for each layer and step
  recompute: bool = False  # bf16 SwiGLU blocks: backward computes the pre-activation again
  observe: Callable[[Operand], None] | None = field(default=None, compare=False)  # sees operands
  copies: Copies | None = field(default=None, compare=False)  # None: quantize at every use

  def quantized(self, leg: str, salt: int, weight: Tensor, make: Callable[[], Any]) -> Any:
    """What `make()` quantizes the weight of a leg and product (`Operand`) to."""
    if self.copies is None:
      return make()
    return self.copies.get(Key(self.format, self.emulate, leg, salt), weight, make)


class Routing(NamedTuple):
  expert_TK: Tensor  # int32, the chosen experts, best biased score first
  gate_TK: Tensor  # fp32, differentiable
  score_TE: Tensor  # fp32, unbiased scores of all experts, differentiable (for the balance loss)
  count_E: Tensor  # int32, tokens per expert
  x_TD: Tensor  # x, in the same memory, for what reads it next


class Layout(NamedTuple):
  """Expert-sorted order of the N = T·K rows: by expert, then token, then k. No padding."""

  offset_E1: Tensor  # int32 [E + 1], rows of expert e are offset[e] : offset[e + 1]
  row_TK: Tensor  # int32, the row of (t, k)
  source_N: Tensor  # int32, t·K + k of each row


class Product(NamedTuple):
  """The rows a[n] · w[e]ᵀ of every expert e, not computed yet: an exchange stores them."""

  a_NI: Tensor
  w_EOI: Tensor  # a transposed view serves
  offset_E1: Tensor


class Ops(Protocol):
  def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x², -1) + eps) · weight in fp32, rounded once. x [..., D], weight [D]."""

  def add_rms_norm(
    self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
  ) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) with total = x + residual, rounded to x's dtype."""

  def linear(self, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """x [..., I] · weight [O, I]ᵀ in the recipe's arithmetic, fp32 accumulation, x's dtype out."""

  def mlp(self, x: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe) -> Tensor:
    """A dense SwiGLU block w2 · swiglu(w13 · x). x [..., D], w13 [2F, D] interleaved, w2 [D, F]."""

  def mla_qkv(
    self, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, rope_dim: int
  ) -> tuple[Tensor, Tensor, Tensor]:
    """Split and rotate MLA's projections (arXiv 2412.19437 Eq 1-9), RoPE pairs (2j, 2j+1).

    q [B, S, H, nope + rope], kv [B, S, H, nope + v], k_rope [B, S, rope] (one key for all heads,
    not yet rotated), cos and sin fp32 [S, rope / 2].
    Returns q and k [B, S, H, nope + rope], v [B, S, H, v].
    """

  def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax(q kᵀ · scale) v, fp32 softmax. q, k [B, S, H, QK], v [B, S, H, V] -> v."""

  def route(self, x: Tensor, weight: Tensor, bias: Tensor, spec: RouterSpec) -> Routing:
    """Scores, groups, top-k, gates and counts. x [T, D], weight fp32 [E, D], bias fp32 [E].

    Logits are fp32 products of x and the fp32 weight. Selection uses score + bias (without
    gradient), gates the score. A group's score is the sum of its best two biased scores; groups
    outside the best topk_groups are masked with -inf. Ties go to the lower index.

    Whatever reads x next reads x_TD, which nobody changes in place: the gradient that comes back
    to it and the logits' own are then summed where the latter is made (kernels.cuda: in the
    product, in fp32, rounded once).
    """

  def layout(self, expert_TK: Tensor, num_experts: int) -> Layout:
    """The expert-sorted order of a routing. No host synchronisation; not differentiable."""

  def grouped_mlp(
    self, x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe
  ) -> Tensor:
    """SwiGLU experts over sorted rows. x [N', D], w13 [E, 2F, D], w2 [E, D, F] -> [N', D].

    N' >= offset[-1]; rows at and beyond it are ignored, their outputs and gradients are zero. Empty
    experts get zero gradients.
    """

  def grouped_mlp_forward(
    self, x_ND: Tensor, offset_E1: Tensor, w13: Tensor, w2: Tensor, recipe: Recipe, keep: bool
  ) -> tuple[Tensor | Product, Any]:
    """grouped_mlp without autograd: y as rows or as their product, and what backward needs.

    Both halves run under torch.no_grad. Without `keep` no backward follows. Rows at and beyond
    offset[-1] are undefined in the results of both.
    """

  def grouped_mlp_backward(
    self, kept: Any, dy_ND: Tensor, gate_N: Tensor, w13: Tensor, w2: Tensor
  ) -> tuple[Tensor | Product, Tensor, Callable[[], tuple[Tensor | None, Tensor | None]]]:
    """The gradients of Σ_n gate[n] · y[n] · dy[n]: dx, as rows or as their product; of gate, fp32
    [N']; and a call for those of w13 and w2, so that dx may travel meanwhile.

    gate fp32 [N']. w13 and w2 are the forward pass's; the gradients of weights are as said above.
    """

  def combine(self, y_TKD: Tensor, gate_TK: Tensor) -> Tensor:
    """Σ_k gate[t, k] · y[t, k] in fp32, k ascending, rounded once: [T, D]. Repeats its bits."""

  def experts(
    self, x_TD: Tensor, gate_TK: Tensor, layout: Layout, w13: Tensor, w2: Tensor, recipe: Recipe
  ) -> Tensor:
    """The routed experts of one rank: gather, grouped SwiGLU, combine -> [T, D].

    Equal to combine(grouped_mlp(x[source // K])[row], gate). The gathered [N, D] input is not kept.
    """

  def linear_cross_entropy(
    self, x: Tensor, weight: Tensor, target: Tensor, chunk: int
  ) -> tuple[Tensor, Tensor]:
    """Σ of -log softmax(weight · x)[target] over targets >= 0, and each token's loss.

    x [T, D], weight [V, D], target int64 [T]; -1 is ignored (loss 0). Logits live for `chunk`
    tokens at a time, [T, V] never; logits and softmax are fp32. Returns (sum fp32 scalar, losses
    fp32 [T] without gradient).
    """

  def muon(
    self,
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    momenta: list[Tensor],
    *,
    blocks: Sequence[Rows],
    sizes: Sequence[float],
    steps: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor,
    experts: bool,
  ) -> None:
    """Muon in place on fp32 masters of one shape [..., O, I]; params and grads as adamw's.

    m += (1 - momentum) (g - m); of Nesterov's point g + momentum (m - g) each block is made nearly
    orthogonal by `steps` of Newton-Schulz (quintic 3.4445, -4.7750, 2.0315 on the block over its
    Frobenius norm + 1e-7; bf16 on CUDA): O. Then W = (1 - lr weight_decay) W - lr size O. The
    blocks cover all rows, sizes are theirs. Momenta may be bf16. experts: a matrix of [E, O, I]
    whose gradient is zero throughout stays as it is, its momentum too. NaN grad_scale: as adamw's.
    """

  def adamw(
    self,
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
    """Decoupled AdamW in place on fp32 masters; params (maybe the same tensors) get them rounded.

    grad_scale is a 0-d fp32 tensor on the device (the clip factor); if it is NaN, nothing changes.
    step counts from 1. Moments may be bf16, and grads fp32 where params are bf16. copies: of each
    parameter that keeps some (`Recipe.copies`), which may be brought up to date with it.
    """

  def quantize(
    self,
    x: Tensor,
    format: str,
    *,
    axis: int = -1,
    tensor_amax: Tensor | None = None,
    square: bool = False,
    seed: int | None = None,
    hadamard: int | None = None,
  ):
    """Block-scale x [..., R, C] along axis -1 or -2, to "fp8" or "nvfp4". Not differentiable.

    kernels.formats defines the formats and the result, a BlockScaled;
    kernels.reference.blockscale the arguments.
    """


FUNCTIONS = tuple(name for name in vars(Ops) if not name.startswith("_"))


def check(condition: bool, message: str) -> None:
  """Raise KernelError(message) unless the condition holds."""
  if not condition:
    raise KernelError(message)


def check_lists(operation: str, lists: Sequence[Sequence[Tensor]]) -> None:
  """KernelError unless an optimizer's lists have one tensor each of every parameter."""
  lengths = [len(tensors) for tensors in lists]
  check(len(set(lengths)) == 1, f"{operation}: lists of different lengths {lengths}")


def check_scale(operation: str, grad_scale: Tensor) -> None:
  """KernelError unless an optimizer's grad_scale is one fp32 number."""
  check(
    grad_scale.dtype == torch.float32 and grad_scale.numel() == 1,
    f"{operation}: grad_scale is {grad_scale.dtype} {tuple(grad_scale.shape)}; "
    "need one torch.float32",
  )


def check_same_device(*tensors: Tensor) -> torch.device:
  """The tensors' one device, or KernelError."""
  device = tensors[0].device
  if any(t.device != device for t in tensors):
    found = sorted({str(t.device) for t in tensors})
    raise KernelError(f"tensors are on {found}; put them on one device")
  return device
