"""What a configuration costs, by arithmetic alone: parameters, FLOPs per token, memory of a rank.

Nothing is built and torch is not imported. Every figure is a list of terms with the formula that gave
it, so that a reader can check the sum. Bytes are of one rank; T is the tokens of one micro-batch on it.

FLOPs follow Megatron-LM's convention: 6 per active parameter of a matrix product (forward 2, backward
4; the embedding's lookup is free), and for the attention core 6·H·(d_qk + d_v)·S/2 per layer, the
causal half. Recomputation does not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nmoe.config import Config


@dataclass(frozen=True)
class Term:
  name: str
  formula: str
  value: float


@dataclass(frozen=True)
class Parameters:
  """Counts. `active` are those that one token meets: K of the E routed experts, the rest whole."""

  embedding: int
  head: int  # 0 when tied
  attention: int
  dense: int
  router: int
  shared: int
  experts: int
  norms: int
  active_experts: int

  @property
  def total(self) -> int:
    return self.embedding + self.head + self.body

  @property
  def body(self) -> int:
    """All but embedding and head."""
    parts = self.attention + self.dense + self.router + self.shared + self.experts
    return parts + self.norms

  @property
  def active_body(self) -> int:
    return self.body - self.experts + self.active_experts

  @property
  def active(self) -> int:
    return self.total - self.experts + self.active_experts


@dataclass(frozen=True)
class RdepBytes:
  """Symmetric buffers of one rank, in bytes, for three numbers of rows received."""

  balanced: int
  capacity: int
  worst: int


@dataclass(frozen=True)
class Plan:
  config: Config
  parameters: Parameters
  flops: tuple[Term, ...]  # per token, forward and backward
  memory: tuple[Term, ...]  # bytes of a rank that live together at the step's peak
  rdep: RdepBytes

  @property
  def flops_per_token(self) -> float:
    return sum(term.value for term in self.flops)

  @property
  def peak_bytes(self) -> int:
    return int(sum(term.value for term in self.memory))


@dataclass(frozen=True)
class Remedy:
  """The one line that makes a configuration fit."""

  key: str
  old: object
  new: object
  peak_bytes: int  # after the change


@dataclass(frozen=True)
class Misfit:
  needed: int
  available: int
  remedy: Remedy | None

  def __str__(self) -> str:
    found = (
      f"the step needs {_gib(self.needed)} of memory and {_gib(self.available)} are there: "
      f"{_gib(self.needed - self.available)} too much"
    )
    if self.remedy is None:
      return f"{found}; no single line makes it fit: lower model.num_layers or use more ranks"
    r = self.remedy
    return f"{found}; set {r.key} = {r.new} (now {r.old}), which needs {_gib(r.peak_bytes)}"


@dataclass(frozen=True)
class Device:
  """An accelerator: memory in bytes, dense peaks in FLOP/s (NVIDIA data sheets, without sparsity)."""

  name: str
  arch: str
  memory_bytes: int
  peak: dict[str, float]


DEVICES = (
  Device("B200", "sm_100a", 183359 << 20, {"bf16": 2.25e15, "fp8": 4.5e15, "nvfp4": 9e15}),
  Device("H200", "sm_90a", 143771 << 20, {"bf16": 989e12}),
  Device("H100", "sm_90a", 81559 << 20, {"bf16": 989e12}),
)


def peak_flops(config: Config) -> float | None:
  """Dense peak FLOP/s of one device in the arithmetic that runs; emulation runs in bf16.

  None for arch = "cpu", whose peak is measured.
  """
  dtype = "bf16" if config.target.emulate_blockscale else config.target.dtype
  peaks = {device.peak[dtype] for device in DEVICES if device.arch == config.target.arch}
  assert len(peaks) <= 1
  return peaks.pop() if peaks else None


def plan(config: Config) -> Plan:
  return Plan(
    config, parameters(config), flops(config), tuple(memory(config)), rdep_bytes(config)
  )


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every parameter of nmoe.model.Model(config) with all experts, in its order."""
  m, e = config.model, config.moe
  shapes = {"embed.weight": (m.vocab_size, m.dim)}
  for layer in range(m.num_layers):
    block = _attention_shapes(config)
    if layer < m.num_dense_layers:
      block |= _mlp_shapes("mlp.", m.dim, m.dense_dim)
    else:
      block["moe.router.weight"] = (e.num_experts, m.dim)
      block |= _mlp_shapes("moe.experts.", m.dim, e.expert_dim, (e.num_experts,))
      if e.num_shared:
        block |= _mlp_shapes("moe.shared.", m.dim, e.num_shared * e.expert_dim)
    shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
  shapes["norm.weight"] = (m.dim,)
  if not m.tie_embeddings:
    shapes["head.weight"] = (m.vocab_size, m.dim)
  return shapes


def _attention_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  m = config.model
  q_dim = m.num_heads * (m.qk_nope_dim + m.qk_rope_dim)
  shapes = {"attention_norm.weight": (m.dim,)}
  if m.q_lora_rank:
    shapes["attention.q_a.weight"] = (m.q_lora_rank, m.dim)
    shapes["attention.q_norm.weight"] = (m.q_lora_rank,)
    shapes["attention.q_b.weight"] = (q_dim, m.q_lora_rank)
  else:
    shapes["attention.q.weight"] = (q_dim, m.dim)
  shapes["attention.kv_a.weight"] = (m.kv_lora_rank + m.qk_rope_dim, m.dim)
  shapes["attention.kv_norm.weight"] = (m.kv_lora_rank,)
  shapes["attention.kv_b.weight"] = (m.num_heads * (m.qk_nope_dim + m.v_dim), m.kv_lora_rank)
  shapes["attention.o.weight"] = (m.dim, m.num_heads * m.v_dim)
  shapes["mlp_norm.weight"] = (m.dim,)
  return shapes


def _mlp_shapes(
  prefix: str, dim: int, width: int, lead: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
  return {f"{prefix}w13": (*lead, 2 * width, dim), f"{prefix}w2": (*lead, dim, width)}


def _part(name: str, shape: tuple[int, ...]) -> str:
  """The field of Parameters that a parameter counts under."""
  if len(shape) == 1:
    return "norms"
  if name in ("embed.weight", "head.weight"):
    return {"embed.weight": "embedding", "head.weight": "head"}[name]
  part = name.split(".")[2]
  return {"attention": "attention", "mlp": "dense"}.get(part) or name.split(".")[3]


def parameters(config: Config) -> Parameters:
  counts = dict.fromkeys(
    ("embedding", "head", "attention", "dense", "router", "shared", "experts", "norms"), 0
  )
  for name, shape in parameter_shapes(config).items():
    counts[_part(name, shape)] += math.prod(shape)
  e = config.moe
  return Parameters(**counts, active_experts=counts["experts"] // e.num_experts * e.top_k)


def flops(config: Config) -> tuple[Term, ...]:
  """FLOPs of one token, forward and backward, by term."""
  m, p, seq_len = config.model, parameters(config), config.data.seq_len
  terms = [
    Term(name, f"6 · {count:,} active parameters", 6 * count)
    for name, count in (
      ("attention projections", p.attention),
      ("dense blocks", p.dense),
      ("routers", p.router),
      ("shared experts", p.shared),
      ("routed experts", p.active_experts),
      ("head", m.vocab_size * m.dim),
    )
    if count
  ]
  qk = m.qk_nope_dim + m.qk_rope_dim
  core = m.num_layers * 6 * m.num_heads * (qk + m.v_dim) * seq_len / 2
  formula = (
    f"{m.num_layers} layers · 6 · {m.num_heads} heads · ({qk} + {m.v_dim}) · {seq_len} / 2 causal"
  )
  return (*terms, Term("attention core", formula, core))


def memory(config: Config) -> Iterator[Term]:
  """Bytes that live together at the peak of a step, which lies in the first layer of a backward pass
  or, with little activation memory, at its end. Ranks hold E/R experts and whole dense parameters."""
  ranks = config.launch.ranks
  p = parameters(config)
  experts, others = p.experts // ranks, p.total - p.experts
  count, fp32 = experts + others, config.target.dtype == "fp32"
  held = f"{others:,} dense + {experts:,} of experts"
  width = 4 if fp32 else 2
  # the router is fp32 in any case: it needs no master, and 2 bytes more in a bf16 model
  yield Term("parameters", f"{held}, {width} bytes", count * width + p.router * (4 - width))
  if not fp32:
    yield Term("fp32 masters", f"{count:,} · 4", (count - p.router) * 4)
  yield from _moments(config, count)
  yield from _transient(config, count, width)
  received = rdep_bytes(config).capacity
  if received:
    yield Term("rdep buffers", f"capacity {config.rdep.capacity} of the balanced load", received)


def _moments(config: Config, count: int) -> Iterator[Term]:
  o, p, ranks = config.optim, parameters(config), config.launch.ranks
  muon = 0
  if o.matrices == "muon":
    muon += p.attention + p.dense + p.shared
  if o.experts == "muon":
    muon += p.experts // ranks
  width = 2 if o.moments == "bf16" else 4
  yield Term(
    "moments",
    f"({count - muon:,} AdamW · 2 + {muon:,} Muon · 1) · {width}",
    (2 * (count - muon) + muon) * width,
  )


def _transient(config: Config, count: int, width: int) -> Iterator[Term]:
  """Activations, gradients and loss workspace where their sum is largest during backward."""
  m, e = config.model, config.moe
  tokens = config.train.micro_batch * config.data.seq_len
  several = config.schedule.batch_tokens > tokens * config.launch.ranks
  grad_width = 4 if several else width
  layers = [_layer_bytes(config, layer) * tokens for layer in range(m.num_layers)]
  shapes = parameter_shapes(config)
  grads = [0] * m.num_layers
  for name, shape in shapes.items():
    if name.startswith("layers."):
      share = config.launch.ranks if ".experts." in name else 1
      grads[int(name.split(".")[1])] += math.prod(shape) // share * grad_width
  head = m.vocab_size * m.dim
  held, made = sum(layers), head * grad_width
  best = (held, made)
  for layer in reversed(range(m.num_layers)):
    made += grads[layer]
    held -= layers[layer]
    best = max(best, (held, made), key=sum)
  held, made = (sum(layers), count * grad_width) if several else best
  per_layer = ", ".join(f"{bytes_:,.0f} · {n} {kind}" for bytes_, n, kind in _kinds(config))
  yield Term("activations", f"{tokens:,} tokens · ({per_layer}) bytes", held)
  yield Term("gradients", f"{grad_width} bytes, those alive with the activations", made)
  chunk = min(config.train.loss_chunk, tokens)
  logits = chunk * m.vocab_size * (4 + width)
  yield Term("loss", f"{chunk:,} tokens · {m.vocab_size:,} logits · {4 + width} bytes", logits)
  states = tokens * m.dim * width * 3
  yield Term("last states", f"{tokens:,} · {m.dim} · {width} · 3", states)


def _kinds(config: Config) -> Iterator[tuple[float, int, str]]:
  m = config.model
  for count, layer, kind in (
    (m.num_dense_layers, 0, "dense"),
    (m.num_layers - m.num_dense_layers, m.num_layers - 1, "MoE"),
  ):
    if count:
      yield _layer_bytes(config, layer), count, kind


def rdep_bytes(config): return RdepBytes(0,0,0)
def _layer_bytes(config, layer): return 0
