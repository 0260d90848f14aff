"""What a configuration costs, by arithmetic alone: parameters, FLOPs per token, memory of a rank.

Nothing is built and torch is not imported. Every figure is a list of terms with the formula that
gave it, so that a reader can check the sum.

FLOPs follow Megatron-LM's convention: 6 per active parameter of a matrix product (forward 2,
backward 4; the embedding's lookup is free), and for the attention core 6·H·(d_qk + d_v)·S/2 per
layer, the causal half. Recomputation does not count.

Memory is that of one rank at the moment of a step when most is alive, with what kernels.cuda keeps
for backward; the cpu target's plain operations use more beside it.

One file: the terms of parameters, FLOPs and memory share their sizes, and are read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kernels import arch, costs
from nmoe.config.buffers import buffer_layout, row_slots
from nmoe.config.parameters import (
  BUCKET,
  is_matrix,
  owned_rows,
  parameter_shapes,
  parameter_width,
)
from nmoe.config.sections import Config
from nmoe.wording import counted


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
class Device:
  """An accelerator: dense peaks in FLOP/s (data sheets, without sparsity), and bytes of memory that
  CUDA lets a process have, 0.6 GiB less than nvidia-smi tells: seen on an H200, by what others
  report of an H100 and a B200, the data sheet's of a GB200.
  """

  name: str
  arch: str
  memory_bytes: int
  peak: dict[str, float]


GIB = 2**30
DEVICES = (  # GB300 and B300 are no sm_100a: their capability is 10.3
  Device("B200", "sm_100a", int(178.35 * GIB), {"bf16": 2.25e15, "fp8": 4.5e15, "nvfp4": 9e15}),
  Device("GB200", "sm_100a", 186 * 10**9, {"bf16": 2.5e15, "fp8": 5e15, "nvfp4": 1e16}),
  Device("H200", "sm_90a", int(139.80 * GIB), {"bf16": 989e12}),
  Device("H100", "sm_90a", int(79.18 * GIB), {"bf16": 989e12}),
)


def peak_flops(config: Config, processor: str = "") -> float | None:
  """Dense peak FLOP/s of one device in the arithmetic that runs; emulation runs in bf16.

  processor: its name as the driver tells it; the target's first device in DEVICES if it is none of
  them. None for arch = "cpu", whose peak is measured.
  """
  dtype = "bf16" if config.target.emulate_blockscale else config.target.dtype
  found = [device for device in DEVICES if device.arch == config.target.arch]
  named = [device for device in found if device.name in processor.split()]
  return next((device.peak[dtype] for device in (*named, *found)), None)


def plan(config: Config) -> Plan:
  return Plan(config, parameters(config), flops(config), memory(config), rdep_bytes(config))


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
    f"{counted(m.num_layers, 'layer')} · 6 · {counted(m.num_heads, 'head')} · ({qk} + {m.v_dim}) · "
    f"{seq_len} / 2 causal"
  )
  return (*terms, Term("attention core", formula, core))


def memory(config: Config) -> tuple[Term, ...]:
  """Bytes of a rank that live together at the step's peak: what is always held, then the peak's.

  A rank holds all dense parameters and E/G experts, and the masters and moments of what it owns.
  """
  held = [*_held(config)]
  peak = max(_moments_of_step(config), key=lambda moment: moment.total)
  held.append(Term("activations", f"{peak.name}: {_kept_formula(config)}", peak.activations))
  held.append(Term("gradients", f"{peak.name}: {_grad_width(config)} bytes each", peak.gradients))
  held.append(Term("workspace", f"{peak.name}: {peak.formula}", peak.workspace))
  if config.train.cuda_graph:
    held += [_arriving(config), _evaluation(config)]
  return tuple(term for term in held if term.value)


def _alike(config: Config) -> int:
  """Elements of a rank's parameters that other ranks hold too."""
  p, ranks = parameters(config), config.launch.ranks
  replicated = p.experts // config.expert_ranks if config.expert_ranks < ranks else 0
  return p.total - p.experts + replicated if ranks > 1 else 0


def _arriving(config: Config) -> Term:
  """Updated weights on their way from their owners, all at once, with all that a graph keeps."""
  alike, width = _alike(config), parameter_width(config)
  return Term("arriving", f"{alike:,} weights from their owners · {width}", alike * width)


def _evaluation(config: Config) -> Term:
  """A forward pass without gradients, which cannot use the memory that a graph keeps.

  The loss stores no logits then (kernels.cuda.loss).
  """
  m, tokens, width = config.model, config.rank_tokens, parameter_width(config)
  residual = 2 * tokens * m.dim * width
  layer = max(_kept_per_token(config, i) * tokens for i in range(m.num_layers))
  return Term("evaluation", f"{residual:,} residual, {layer:,.0f} of a layer", residual + layer)


def rdep_bytes(config: Config) -> RdepBytes:
  """The symmetric heap of one rank (kernels.sizes). One rank alone copies no rows."""
  c = config
  if c.expert_ranks == 1:
    return RdepBytes(0, 0, 0)
  num_local = c.moe.num_experts // c.expert_ranks
  worst = c.rank_tokens * min(c.moe.top_k, num_local) * c.expert_ranks
  return RdepBytes(*(buffer_layout(c, received).nbytes for received in (c.rows, None, worst)))


def _grad_width(config: Config) -> int:
  return 4 if config.micro_batches > 1 else parameter_width(config)


def _held(config: Config) -> Iterator[Term]:
  """What stays in memory from step to step."""
  p, width = parameters(config), parameter_width(config)
  experts = p.experts // config.expert_ranks
  others = p.total - p.experts
  count = others + experts
  formula = f"({others:,} + {experts:,} of experts) · {width}, routers in fp32"
  yield Term("parameters", formula, count * width + p.router * (4 - width))
  moment = 2 if config.optim.moments == "bf16" else 4
  master = 4 if width < 4 else 0
  state = [
    (own, own.masters * master + (2 * own.adamw + own.muon) * moment) for own in _owned(config)
  ]
  own, _ = max(state, key=lambda pair: pair[1])
  of = f", the largest of {len(state)} owners" if len(state) > 1 else ""
  if master:
    yield Term("fp32 masters", f"{own.masters:,} · 4{of}", own.masters * 4)
  formula = f"({own.adamw:,} AdamW · 2 + {own.muon:,} Muon) · {moment}{of}"
  yield Term("moments", formula, (2 * own.adamw + own.muon) * moment)
  if elements := _quantized_elements(config):
    copy = costs.quantized_copy(config.target.dtype, config.target.emulate_blockscale)
    formula = f"{elements:,} · 2 · ({copy.formula})"
    yield Term("quantized weights", formula, elements * 2 * copy.nbytes)
  received = rdep_bytes(config).capacity
  yield Term("rdep buffers", f"capacity {config.rdep.capacity} of the balanced load", received)
  travelling = min(BUCKET, _alike(config))
  yield Term(
    "bucket", f"{travelling:,} gradients on their way to their owners, fp32", 4 * travelling
  )
  if config.target.arch != "cpu":
    yield _workspaces(config)


def _workspaces(config: Config) -> Term:
  """torch keeps one for each thread and stream that has asked cuBLAS for a product: forward's and
  autograd's; a graph is captured on a stream of its own, and these are in its memory.
  """
  streams, nbytes = 1 + config.train.cuda_graph, math.prod(arch.CUBLAS) << 10
  formula = f"2 threads · {counted(streams, 'stream')} · {nbytes >> 20} MiB"
  return Term("cuBLAS workspaces", formula, 2 * streams * nbytes)


def _quantized_elements(config: Config) -> int:
  """Elements of this rank's weights of which two quantized copies are kept (kernels.copies)."""
  total = 0
  for name, shape in parameter_shapes(config).items():
    if name.startswith("layers.") and config.quantizes(
      _product(name, shape), int(name.split(".")[1])
    ):
      total += math.prod(shape) // (config.expert_ranks if ".experts." in name else 1)
  return total


def _product(name: str, shape: tuple[int, ...]) -> str:
  """What the precision section calls the product of a layer's weight."""
  part = _part(name, shape)
  linear = name.split(".")[3]
  return {"q_a": "q", "q_b": "q"}.get(linear, linear) if part == "attention" else part


@dataclass
class _Own:
  """Elements that a rank owns: those with an fp32 master beside bf16, and by optimizer."""

  masters: int = 0
  adamw: int = 0
  muon: int = 0


def _owned(config: Config) -> list[_Own]:
  """What each rank owns."""
  shapes, rows = parameter_shapes(config), owned_rows(config)
  o, ranks = config.optim, [_Own() for _ in range(config.launch.ranks)]
  for kind, members in rows.items():
    chosen = o.experts if kind == "expert" else o.matrices
    for r, own in enumerate(ranks):
      for name, (start, stop) in members[r * len(members) // len(ranks)].items():
        count = (stop - start) * math.prod(shapes[name][1:])
        own.masters += count if kind != "router" else 0
        if chosen == "muon" and is_matrix(name, shapes[name]):
          own.muon += count
        else:
          own.adamw += count
  return ranks


@dataclass(frozen=True)
class _Moment:
  """A moment of the step and what lives then beside what is always held."""

  name: str
  activations: float
  gradients: float
  workspace: float
  formula: str

  @property
  def total(self) -> float:
    return self.activations + self.gradients + self.workspace


def _moments_of_step(config: Config) -> Iterator[_Moment]:
  """The moments at which memory can peak, of the last micro-batch of a step."""
  m, tokens = config.model, config.rank_tokens
  width, grad = parameter_width(config), _grad_width(config)
  several = config.micro_batches > 1  # gradients are summed in fp32
  layers = [_kept_per_token(config, i) * tokens for i in range(m.num_layers)]
  grads = _layer_elements(config)
  total = parameters(config).total - parameters(config).experts + sum(e for _, e in grads)
  ends = tokens * (2 * m.dim * width + 4)  # the last norm's sum and result
  head = m.vocab_size * m.dim
  held = total if several else 0  # gradients
  chunk = min(config.train.loss_chunk, tokens)
  loss = costs.linear_cross_entropy(tokens, m.dim, m.vocab_size, chunk, width)
  yield _Moment(
    "loss, forward",
    sum(layers) + ends,
    held * grad,
    sum(loss),
    f"{head:,} · 4 head gradient, {loss.dx:,} dx, {chunk} · {m.vocab_size} · {width} logits",
  )
  scores = (m.num_layers - m.num_dense_layers) * tokens * config.moe.num_experts * 4
  scores *= config.moe.has_balance_loss  # their gradient, as long as a layer still wants it
  yield _Moment(
    "balance loss, backward",
    sum(layers) + ends,
    held * grad,
    loss.dweight + loss.dx + 4 * scores,
    f"{head:,} · 4 head gradient, {loss.dx:,} dx, 4 · {scores:,} scores",
  )
  scaled = 0 if several and width < 4 else width  # or added to the fp32 gradient as it is scaled
  yield _Moment(
    "loss, backward",
    sum(layers) + ends,
    held * grad,
    loss.dweight + head * scaled + 2 * loss.dx + scores,
    f"{head:,} · {4 + scaled} head gradient, 2 · {loss.dx:,} dx, {scores:,} scores",
  )
  held = held or head
  for i in reversed(range(m.num_layers)):
    extra, formula = _backward_workspace(config, i)
    formula += f", {scores:,} scores"
    yield _Moment(
      f"layer {i}, backward", sum(layers[: i + 1]), held * grad, extra + scores, formula
    )
    held += 0 if several else sum(grads[i])
  yield _Moment("optimizer step", 0, total * grad, 0, "none")


def _layer_elements(config: Config) -> list[tuple[int, int]]:
  """(parameters but routed experts, this rank's routed experts) of each layer."""
  counts = [[0, 0] for _ in range(config.model.num_layers)]
  for name, shape in parameter_shapes(config).items():
    if name.startswith("layers."):
      expert = ".experts." in name
      share = config.expert_ranks if expert else 1
      counts[int(name.split(".")[1])][expert] += math.prod(shape) // share
  return [(dense, experts) for dense, experts in counts]


def _kept_terms(config: Config, layer: int) -> dict[str, float]:
  """Bytes per token that a layer keeps for backward, by what they are."""
  m, e, width, again = config.model, config.moe, parameter_width(config), config.train.recompute
  normed = costs.rms_norm if "norm" in again else _normed
  latent = sum(normed(rank, width) for rank in (m.kv_lora_rank, m.q_lora_rank) if rank)
  normed = costs.rms_norm if config.recomputes_residual_norms else _normed
  qk, mlp = m.qk_nope_dim + m.qk_rope_dim, 0 if "swiglu" in again else costs.mlp(1, width)
  terms = {
    "residual sums and norms": 2 * normed(m.dim, width),
    "q, k, v, o": costs.attention(m.num_heads, qk, m.v_dim, width, again="qkv" in again),
    "latents": latent + m.qk_rope_dim * width,
  }
  if layer < m.num_dense_layers:
    return terms | {"SwiGLU inputs": mlp * m.dense_dim}
  terms["routing"] = costs.route(e.num_experts, e.top_k, e.score, e.has_balance_loss)
  terms["SwiGLU inputs"] = (e.top_k + e.num_shared) * mlp * e.expert_dim
  if config.expert_ranks > 1:
    spare = max(config.rdep.capacity, 1) - 1
    terms["SwiGLU inputs"] += spare * e.top_k * mlp * e.expert_dim
    row = (1 + spare) * e.top_k * m.dim * width
    if row_slots(config) == 1:  # else they stay in the buffers
      terms["received rows"] = row
    if config.target.dtype in ("fp8", "nvfp4"):
      terms["results of received rows"] = row
  return terms


def _normed(dim: int, width: int) -> int:
  """Kept by a norm and by the product that reads its result."""
  return costs.rms_norm(dim, width) + costs.linear(dim, width)


def _kept_per_token(config: Config, layer: int) -> float:
  return sum(_kept_terms(config, layer).values())


def _kept_formula(config: Config) -> str:
  m = config.model
  parts = []
  for kind, layers in (("dense", range(m.num_dense_layers)), ("MoE", range(m.num_layers))):
    if kind == "MoE":
      layers = layers[m.num_dense_layers :]
    if layers:
      terms = _kept_terms(config, layers[0])
      inside = " + ".join(f"{value:,.0f} {name}" for name, value in terms.items() if value)
      parts.append(f"{counted(len(layers), f'{kind} layer')} · ({inside})")
  return f"{config.rank_tokens:,} tokens · [{' + '.join(parts)}]"


def _backward_workspace(config: Config, layer: int) -> tuple[float, str]:
  """Gradients of activations inside one layer's backward pass, and of weights not yet added."""
  m, e, width, tokens = config.model, config.moe, parameter_width(config), config.rank_tokens
  dense, experts = _layer_elements(config)[layer]
  if layer < m.num_dense_layers:
    rows, ffn = tokens, m.dense_dim
  else:
    rows, ffn = config.rows, e.expert_dim
  again = "swiglu" in config.train.recompute
  inner, parts = costs.mlp_backward(rows, tokens, m.dim, ffn, width, again=again), 5 if again else 3
  formula = f"{rows:,} rows · ({parts} · {ffn} + {m.dim}) · {width}"
  formula += f", 3 · {tokens:,} · {m.dim} · {width}"
  if config.micro_batches > 1 and width < 4 and not costs.adds_in_place(config.target.arch):
    block = experts or 3 * m.dim * m.dense_dim
    inner += costs.weights_apart(block, width)
    formula += f", {block:,} weight gradients · {width} and two thirds · 4"
  return inner, formula
