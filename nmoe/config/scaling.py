"""The transfer rule: initial size, learning rate and weight decay of each tensor from a base's.

"completep-moe" keeps what was tuned on a small base right for a larger model. A matrix's rate goes
with 1 / fan_in (muP, arXiv 2203.03466), residual branches with 1 / layers (CompleteP, 2505.01618),
routers are outputs and experts' down projections mean-field (2601.20205), Muon's step has the
spectral norm √(fan_out / fan_in) (2310.17813). Multipliers of the forward pass are folded into the
initial std and the rate, W → c·W with lr → c·lr and decay → decay / c, which changes nothing that
AdamW or Muon computes: kernels, checkpoints and exports stay as they are.

"embed-only" is a control: the embedding's rate times the width and nothing else, which is said to
be most of what a transfer rule gains (2605.21486).

Ratios of the model to its base: n width, L layers, f of a feed-forward width, b batch tokens, t
total tokens. Does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nmoe.config.parameters import is_matrix, parameter_group, parameter_shapes
from nmoe.config.sections import Config

BETA2 = (0.9, 0.9999)  # between which the batch moves it


@dataclass(frozen=True)
class Ratios:
  """The model over the base of [scaling]; 1 where the base names no size, and all without rule."""

  width: float = 1.0
  layers: float = 1.0
  dense: float = 1.0
  expert: float = 1.0
  kv_rank: float = 1.0
  q_rank: float = 1.0
  batch: float = 1.0
  tokens: float = 1.0

  @classmethod
  def of(cls, c: Config) -> Ratios:
    s = c.scaling
    if s.rule != "completep-moe":
      return cls()
    pairs = (
      (c.model.dim, s.base_dim),
      (c.model.num_layers, s.base_layers),
      (c.model.dense_dim, s.base_dense_dim),
      (c.moe.expert_dim, s.base_expert_dim),
      (c.model.kv_lora_rank, s.base_kv_rank),
      (c.model.q_lora_rank, s.base_q_rank),
      (c.schedule.batch_tokens, s.base_batch_tokens),
      (c.schedule.total_tokens, s.base_total_tokens),
    )
    return cls(*(own / base if base else 1.0 for own, base in pairs))

  def fans(self, name: str) -> tuple[float, float]:
    """How fan_out and fan_in of a matrix have grown."""
    part, n = _part(name), self.width
    f = self.dense if ".mlp." in name else self.expert
    return {
      "embed": (n, 1.0),  # its input is a token, its output a row
      "head": (1.0, n),
      "router": (1.0, n),
      "q_a": (self.q_rank, n),
      "q_b": (n, self.q_rank),
      "kv_a": (self.kv_rank, n),
      "kv_b": (n, self.kv_rank),
      "w13": (f, n),
      "w2": (n, f),
    }.get(part, (n, n))

  @property
  def step(self) -> float:
    """b / t: how lr · decay changes, so that the decay's horizon stays a share of the run
    (arXiv 2405.13698).
    """
    return self.batch / self.tokens


@dataclass(frozen=True)
class Factors:
  """On [model] init_std (or embed_std), the group's rate and its weight decay."""

  std: float
  lr: float
  weight_decay: float


def factors(config: Config, name: str, ndim: int, muon: bool = False) -> Factors:
  """Those of a parameter. With Muon `lr` is that of every block; `muon_factor` is apart."""
  s, r = config.scaling, Ratios.of(config)
  if s.rule == "embed-only" and s.base_dim and _part(name) == "embed":
    width = config.model.dim / s.base_dim
    return Factors(1.0, width, 1 / width)
  rate = r.batch**0.5 * r.tokens**-config.scaling.horizon
  if ndim == 1:
    return Factors(1.0, rate, 1.0)
  _, fan_in = r.fans(name)
  depth = _depth(name, r)
  own = 1.0 if muon else 1 / (fan_in * depth)
  return Factors(_std(name, r) / depth, own * rate, r.step / (own * rate))


def muon_factor(config: Config, name: str, block: int, matrix: tuple[int, int]) -> float:
  """On nmoe.train.optim's update 0.2 · √max(A, B) · O of a block [A, B], the block-th of a matrix.

  The step gets the spectral norm 0.2 · √max(A₀, B₀) · √(fan_out / fan_in) in units of the base's
  block [A₀, B₀], and 1 / L where it ends a residual branch.
  """
  r = Ratios.of(config)
  fan_out, fan_in = r.fans(name)
  if _part(name) == "kv_a" and block == 1:
    fan_out = 1.0  # W_KR: qk_rope_dim rows at any width
  a, b = matrix
  grown = max(a, b) / max(a / fan_out, b / fan_in)
  return math.sqrt(fan_out / fan_in / grown) / _depth(name, r)


def initial_std(config: Config, name: str) -> float:
  """Of a matrix's weights."""
  m = config.model
  base = m.embed_std if _part(name) == "embed" and m.embed_std else m.init_std
  return base * factors(config, name, 2).std


def rates(config: Config, name: str, ndim: int, muon: bool = False) -> tuple[float, float]:
  """Peak learning rate and weight decay of a parameter; 1-D parameters have no decay."""
  o, group = config.optim, parameter_group(name)
  lr = {"dense": o.dense_lr, "router": o.router_lr, "expert": o.expert_lr}[group]
  if _part(name) in ("embed", "head") and o.embed_lr:
    lr = o.embed_lr
  decay = {
    "dense": o.dense_weight_decay,
    "router": o.router_weight_decay,
    "expert": o.expert_weight_decay,
  }[group]
  f = factors(config, name, ndim, muon)
  return lr * f.lr, decay * f.weight_decay if ndim > 1 else 0.0


def beta2(config: Config) -> float:
  """AdamW's average of squares over as many tokens as the base's: β₂ to the power b."""
  b = Ratios.of(config).batch
  if b == 1:
    return config.optim.beta2
  return min(max(config.optim.beta2**b, BETA2[0]), BETA2[1])


@dataclass(frozen=True)
class Role:
  """What the tensors of one name have in all layers of a kind; `muon` is None under AdamW."""

  name: str
  shape: tuple[int, ...]
  std: float
  lr: float
  weight_decay: float
  muon: float | None


def roles(config: Config) -> list[Role]:
  """One of each name, in the model's order. Muon's factor is that of a first block."""
  found: dict[str, Role] = {}
  for name, shape in parameter_shapes(config).items():
    role = ".".join(p for p in name.split(".") if not p.isdigit()).removeprefix("layers.")
    if role in found:
      continue
    chosen = config.optim.experts if ".experts." in name else config.optim.matrices
    muon = chosen == "muon" and is_matrix(name, shape)
    lr, decay = rates(config, name, len(shape), muon)
    std = initial_std(config, name) if len(shape) > 1 else 1.0
    factor = muon_factor(config, name, 0, first_block(config, name, shape)) if muon else None
    found[role] = Role(role.removesuffix(".weight"), shape, std, lr, decay, factor)
  return list(found.values())


def first_block(config: Config, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """The first matrix that Muon orthogonalises of a weight (nmoe.model.decoder.matrix_blocks)."""
  m, (rows, columns) = config.model, shape[-2:]
  rows = {
    "q": m.num_heads * m.qk_nope_dim,
    "q_b": m.num_heads * m.qk_nope_dim,
    "kv_a": m.kv_lora_rank,
    "kv_b": m.num_heads * m.qk_nope_dim,
    "w13": rows // 2,
  }.get(_part(name), rows)
  return rows, columns


def _part(name: str) -> str:
  return name.removesuffix(".weight").rpartition(".")[2]


def _depth(name: str, r: Ratios) -> float:
  """What ends a residual branch is divided by the layers' ratio."""
  return r.layers if _part(name) in ("o", "w2") else 1.0


def _std(name: str, r: Ratios) -> float:
  part, (fan_out, fan_in) = _part(name), r.fans(name)
  if part in ("head", "router"):
    return 1 / fan_in
  if part == "w2":
    return math.sqrt(fan_out) / fan_in  # mean-field in the expert's width (2601.20205)
  return fan_in**-0.5
