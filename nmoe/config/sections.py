"""The sections of a configuration: frozen dataclasses, what each key means, and what differs.

Every field has a range, where its type leaves one open, and a tag: what a change of it means.
  identity  it changes what the run computes; a checkpoint of another identity is refused
  schedule  it changes results too, but a run may be continued under a new value
  free      it changes no result (paths, logging)
The fingerprint hashes identity and schedule fields. Sizes that follow from keys are properties.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from nmoe.records.root import DEFAULT_ROOT
from nmoe.tables import ranged

MOST_S, MAX_RATE, MAX_DECAY = 1e6, 1e30, 1e6  # every timer takes the one, fp32 holds the others
Recomputed = Literal["norm", "qkv", "swiglu"]  # what backward can compute again


def identity(default: Any = MISSING, **limits: float) -> Any:
  return ranged(default, {"kind": "identity"}, **limits)


def schedule(default: Any = MISSING, **limits: float) -> Any:
  return ranged(default, {"kind": "schedule"}, **limits)


def free(default: Any = MISSING, **limits: float) -> Any:
  return ranged(default, {"kind": "free"}, **limits)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
  """The hypothesis, written down before the first step. An ablation reads the variant's."""

  name: str = free()
  statement: str = free()  # the claim, in a sentence
  metric: str = free("val/bpb")  # of nmoe.records.measures
  direction: Literal["lower", "higher", "none"] = free("none")  # the variant is expected to be …
  min_effect: float = free(0.0, ge=0)  # smallest difference that matters, in the metric's unit
  seeds: int = free(3, gt=0, le=10_000)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
  arch: Literal["sm_100a", "sm_90a", "cpu"] = identity()
  dtype: Literal["bf16", "fp8", "nvfp4", "fp32"] = identity("bf16")
  emulate_blockscale: bool = identity(False)
  deterministic: bool = identity(True)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """Which products fp8 and nvfp4 apply to (arXiv 2509.25149 section 3; recipe: kernels/ops.py)."""

  experts: bool = identity(True)
  linears: tuple[Literal["q", "kv_a", "kv_b", "o", "dense", "shared"], ...] = identity(())
  bf16_first_layers: int = identity(0, ge=0)
  bf16_last_layers: int = identity(0, ge=0)
  finish_tokens: int = schedule(0, ge=0)  # from this token on the forward product is bf16; 0: never


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The dense side of a DeepSeek-shaped decoder (arXiv 2412.19437 section 2.1)."""

  vocab_size: int = identity(gt=0)
  dim: int = identity(gt=0)
  num_layers: int = identity(gt=0, le=1000)
  num_dense_layers: int = identity(1, ge=0)
  dense_dim: int = identity(gt=0)
  num_heads: int = identity(gt=0)
  q_lora_rank: int = identity(0, ge=0)  # 0: q is one full projection
  kv_lora_rank: int = identity(512, gt=0)
  qk_nope_dim: int = identity(128, gt=0)
  qk_rope_dim: int = identity(64, gt=0)
  v_dim: int = identity(128, gt=0)
  rope_theta: float = identity(10000.0, gt=1)
  norm_eps: float = identity(1e-6, gt=0, le=1)
  tie_embeddings: bool = identity(False)
  init_std: float = identity(0.006, gt=0, le=100)
  init: str = identity("seed")  # or "import:DIGEST": the weights of `nmoe import`, not train.seed's
  embed_std: float = identity(0.0, ge=0)  # of the embedding; 0: init_std


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
  """YaRN context extension (arXiv 2309.00071, 2412.19437 section 4.3). factor 1: plain RoPE."""

  factor: float = identity(1.0, ge=1)
  original_seq_len: int = identity(4096, gt=0)
  beta_fast: float = identity(32.0, gt=0)
  beta_slow: float = identity(1.0, gt=0)
  mscale_all_dim: float = identity(1.0)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
  num_experts: int = identity(gt=0, le=100_000)
  top_k: int = identity(gt=0)
  num_shared: int = identity(1, ge=0)  # shared experts, run as one block of num_shared · expert_dim
  expert_dim: int = identity(gt=0)
  num_groups: int = identity(1, gt=0)
  topk_groups: int = identity(1, gt=0)
  score: Literal["sigmoid", "softmax"] = identity("sigmoid")
  normalize: bool = identity(True)
  route_scale: float = identity(1.0, gt=0)
  bias_update_rate: float = identity(0.001, ge=0, le=100)  # 0: no aux-loss-free balancing
  balance_alpha: float = identity(0.0001, ge=0)  # weight of the sequence-wise balance loss
  global_balance_alpha: float = identity(0.0, ge=0)  # of the global-batch balance loss; 0: none
  forced_balance: bool = identity(False)  # benchmark switch: expert = (t·K + k) mod E

  @property
  def has_balance_loss(self) -> bool:
    """Whether the scores of all layers are kept for one of the balance losses."""
    return self.balance_alpha > 0 or self.global_balance_alpha > 0


@dataclass(frozen=True, kw_only=True)
class RdepConfig:
  group: int = schedule(0, ge=0)  # ranks over which the experts lie, more hold replicas; 0: all
  capacity: float = schedule(1.5, ge=0.1)  # rows a rank's buffer holds, over the balanced T·K
  alignment: int = schedule(1, gt=0)  # each expert's rows start at a multiple of this
  deadline_s: float = free(120.0, gt=0, le=MOST_S)  # of every wait for a peer
  payload: Literal["bf16", "mxfp8", "nvfp4"] = identity("bf16")  # of dispatched rows; bf16: as is
  peer_access: bool = free(True)  # False: put-with-signal also inside a node (a test of that path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
  mixture: str = free()  # path of the mixture's TOML; its content enters the fingerprint by digest
  tokenizer: str = identity("o200k_harmony")  # or "byte", or "hf:" and the path of a tokenizer.json
  seq_len: int = identity(gt=0)
  val_tokens: int = identity(1 << 20, gt=0)  # of an evaluation, at most what is held out
  weights: tuple[float, ...] = identity(())  # of the mixture's sources in order; (): the mixture's
  weights_from: tuple[tuple[float, ...], ...] = schedule(())  # rows of tokens, then weights: from
  # the first sample that begins there, or after, they hold in place of the weights before
  fraction: float = identity(1.0, gt=0, le=1)  # of each source's training tokens, from the first:
  # a small run repeats its text as often as a large one of the same mixture
  holes: tuple[tuple[int, ...], ...] = schedule(())  # samples left out: first, how many


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
  matrices: Literal["adamw", "muon"] = identity("adamw")  # of attention and dense matrices
  experts: Literal["adamw", "muon"] = identity("adamw")  # Muon skips those without a token
  dense_lr: float = schedule(ge=0, le=MAX_RATE)
  router_lr: float = schedule(ge=0, le=MAX_RATE)
  expert_lr: float = schedule(ge=0, le=MAX_RATE)
  embed_lr: float = schedule(0.0, ge=0, le=MAX_RATE)  # of embedding and head; 0: dense_lr
  dense_weight_decay: float = schedule(0.1, ge=0, le=MAX_DECAY)
  router_weight_decay: float = schedule(0.0, ge=0, le=MAX_DECAY)
  expert_weight_decay: float = schedule(0.1, ge=0, le=MAX_DECAY)
  beta1: float = identity(0.9, ge=0, lt=1)
  beta2: float = identity(0.95, ge=0, lt=1)
  eps: float = identity(1e-8, gt=0, le=1)
  muon_momentum: float = identity(0.95, ge=0, lt=1)
  muon_steps: int = identity(5, gt=0)
  moments: Literal["fp32", "bf16"] = identity("fp32")
  clip_norm: float = schedule(1.0, gt=0)


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
  """What rates and sizes were tuned for, and how they follow the model (nmoe.config.scaling).

  base_*: of the model on which they were tuned; 0: this model's own, a ratio of 1.
  """

  rule: Literal["none", "completep-moe", "embed-only"] = identity("none")
  base_dim: int = identity(0, ge=0)
  base_layers: int = identity(0, ge=0)
  base_dense_dim: int = identity(0, ge=0)
  base_expert_dim: int = identity(0, ge=0)
  base_kv_rank: int = identity(0, ge=0)
  base_q_rank: int = identity(0, ge=0)
  base_heads: int = identity(0, ge=0)
  base_batch_tokens: int = schedule(0, ge=0)
  base_total_tokens: int = schedule(0, ge=0)
  # rates go with total_tokens to the power of minus this
  horizon: float = schedule(0.3, ge=0, le=2)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """Warm-up, sustain, decay, in tokens (arXiv 2404.06395, 2405.18392)."""

  total_tokens: int = schedule(gt=0)
  batch_tokens: int = schedule(gt=0)
  warmup_tokens: int = schedule(0, ge=0)
  decay_tokens: int = schedule(0, ge=0)
  decay: Literal["linear", "sqrt"] = schedule("sqrt")
  final_ratio: float = schedule(0.0, ge=0, le=1)

  @property
  def trained_tokens(self) -> int:
    """Of all steps: tokens short of a batch are not read."""
    return self.total_tokens // self.batch_tokens * self.batch_tokens


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
  seed: int = identity(0, ge=0)
  micro_batch: int = schedule(gt=0)  # sequences of one forward pass on one rank
  loss_chunk: int = schedule(4096, gt=0)  # tokens whose logits live at a time; sums round by it
  recompute: tuple[Recomputed, ...] = free(())  # in place of keeping it
  cuda_graph: bool = free(False)  # queue a step's passes at once: for what the host limits
  skip_steps: tuple[int, ...] = schedule(())  # that change nothing (nmoe.train.badsteps)
  log_every: int = free(10, gt=0)
  flight_every: int = free(0, ge=0)  # steps between measurements of nmoe.train.flight; 0: none
  routing_every: int = free(0, ge=0)  # steps between measurements of nmoe.train.routing; 0: none
  eval_every: int = free(0, ge=0)  # steps; 0: only at the end
  checkpoint_every: int = free(0, ge=0)  # steps; 0: only at the end
  keep_checkpoints: int = free(2, ge=0)  # 0: none is written, and a stopped run starts anew


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """A suite of downstream tasks inside a run (nmoe.evals.suites). It changes no bit of training."""

  # "quick", "olmes", "short", or a .toml file, relative to this one; "none": nothing
  suite: str = free("none")
  every: int = free(0, ge=0)  # steps; 0: only at the end
  limit: int = free(0, ge=0)  # documents of a task; 0: the suite's own


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
  ranks: int = schedule(1, gt=0)
  threads: int = schedule(0, ge=0, le=4096)  # torch CPU threads per rank; 0: cores / ranks, ≤ 8
  slots: int = free(0, ge=0)  # runs of a study side by side; 0: what GPUs there are, one on the cpu
  # a step, or a batch of an evaluation, takes at most this; of a checkpoint see nmoe.train.watchdog
  hang_s: float = free(1800.0, gt=0, le=MOST_S)
  engine: Literal["local", "slurm", "jobset"] = free("local")  # of `nmoe prod`: what starts hosts
  ranks_per_node: int = free(0, ge=0)  # 0: all ranks on one host
  interface: str = free("")  # network interface between hosts; "": as the engine chooses
  port: int = free(29400, gt=0, le=65535)  # where the hosts meet, on the first of them


@dataclass(frozen=True, kw_only=True)
class ProdConfig:
  """A production launch: what it rests on, and how often it is tried again."""

  evidence: tuple[str, ...] = free(())  # concluded experiments, by id or name
  max_restarts: int = free(3, ge=0)  # of the ranks, within an attempt
  max_attempts: int = free(50, gt=0)  # but those that were told to leave
  no_progress: int = free(3, gt=0)  # of them in a row without a newer checkpoint end the run
  stale_s: float = free(120.0, gt=0)  # a heartbeat older than this, and than its state may be
  permanent_tokens: int = free(0, ge=0)  # a checkpoint is kept every so many; 0: none but of decay
  bad_step: Literal["stop", "skip", "rewind"] = schedule("stop")  # about a step that is bad twice
  spike_sigma: float = schedule(0.0, ge=0)  # a loss so far above the last ones is bad; 0: none is
  spike_window: int = schedule(128, gt=1)  # the last ones
  max_bad_steps: int = free(3, ge=0)  # that are skipped or rewound, before the run stops
  notify: str = free("")  # a shell command that gets every event as JSON on its standard input


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
  """What `launch.engine = "slurm"` asks for; "" and 0: the cluster's default."""

  partition: str = free("")
  account: str = free("")
  container: str = free("")  # for a cluster with srun --container-image
  time_limit_s: int = free(0, ge=0)


@dataclass(frozen=True, kw_only=True)
class JobsetConfig:
  """What `launch.engine = "jobset"` asks for."""

  namespace: str = free("default")
  image: str = free("")  # with its digest: name@sha256:…
  claim: str = free("nmoe-data")  # the PersistentVolumeClaim that holds the root
  gpu_resource: str = free("nvidia.com/gpu")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
  root: str = free(f"${{NMOE_ROOT:-{DEFAULT_ROOT}}}")


@dataclass(frozen=True, kw_only=True)
class Config:
  target: TargetConfig
  model: ModelConfig
  moe: MoeConfig
  data: DataConfig
  optim: OptimConfig
  schedule: ScheduleConfig
  train: TrainConfig
  experiment: ExperimentConfig
  yarn: YarnConfig = field(default_factory=YarnConfig)
  scaling: ScalingConfig = field(default_factory=ScalingConfig)
  precision: PrecisionConfig = field(default_factory=PrecisionConfig)
  rdep: RdepConfig = field(default_factory=RdepConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  launch: LaunchConfig = field(default_factory=LaunchConfig)
  prod: ProdConfig = field(default_factory=ProdConfig)
  slurm: SlurmConfig = field(default_factory=SlurmConfig)
  jobset: JobsetConfig = field(default_factory=JobsetConfig)
  run: RunConfig = field(default_factory=RunConfig)

  @property
  def expert_ranks(self) -> int:
    """The ranks that hold one set of routed experts: those of an RDEP group."""
    return self.rdep.group or self.launch.ranks

  @property
  def recomputes_residual_norms(self) -> bool:
    """Whether backward computes the norms of the residual stream again (train.recompute "norm").

    A GPU's fused sum and norm normalises the sum before its rounding, which is not kept.
    """
    return "norm" in self.train.recompute and self.target.arch == "cpu"

  def quantizes(self, product: str, layer: int) -> bool:
    """Whether a product is block-scaled: "experts" or one of precision.linears' names."""
    p = self.precision
    chosen = p.experts if product == "experts" else product in p.linears
    inner = p.bf16_first_layers <= layer < self.model.num_layers - p.bf16_last_layers
    return self.target.dtype in ("fp8", "nvfp4") and chosen and inner

  def finishing(self, tokens: int) -> bool:
    """Whether quantized products run forward in bf16 after so many tokens."""
    return 0 < self.precision.finish_tokens <= tokens

  @property
  def node_ranks(self) -> int:
    """Ranks on one host."""
    return self.launch.ranks_per_node or self.launch.ranks

  @property
  def nodes(self) -> int:
    """Hosts of the run."""
    return self.launch.ranks // self.node_ranks

  @property
  def steps(self) -> int:
    """Of the whole run; tokens short of a batch are not read."""
    return self.schedule.total_tokens // self.schedule.batch_tokens

  @property
  def sequences(self) -> int:
    """Of one batch, over all ranks."""
    return self.schedule.batch_tokens // self.data.seq_len

  @property
  def rank_tokens(self) -> int:
    """T: tokens of one forward pass on one rank."""
    return self.train.micro_batch * self.data.seq_len

  @property
  def rows(self) -> int:
    """N = T·K: rows that one rank dispatches in one MoE layer."""
    return self.rank_tokens * self.moe.top_k

  @property
  def micro_batches(self) -> int:
    """Forward passes of a rank in one step."""
    return self.schedule.batch_tokens // (self.rank_tokens * self.launch.ranks)


SECTIONS: dict[str, type] = {f.name: get_type_hints(Config)[f.name] for f in fields(Config)}


def leaves(config: Config) -> dict[str, Any]:
  """Every leaf of the configuration as a dotted key."""
  return {
    f"{section.name}.{leaf.name}": getattr(getattr(config, section.name), leaf.name)
    for section in fields(config)
    for leaf in fields(getattr(config, section.name))
  }


def kind(key: str) -> str:
  """The tag of a dotted key: "identity", "schedule" or "free"."""
  section, name = key.split(".")
  return next(f.metadata["kind"] for f in fields(SECTIONS[section]) if f.name == name)


def diff(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
  """The leaves that differ: dotted key -> (value in a, value in b)."""
  left, right = leaves(a), leaves(b)
  return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def fingerprint(config: Config, data_digest: str = "", branch: str = "") -> str:
  """16 hex digits over the identity and schedule fields and the digest of the prepared data.

  branch: the checkpoint of another run with which it begins; "": it begins with its first step.
  """
  hashed = {key: value for key, value in leaves(config).items() if kind(key) != "free"}
  parts = [hashed, data_digest, branch] if branch else [hashed, data_digest]
  text = json.dumps(parts, sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
