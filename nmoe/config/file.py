"""The configuration: TOML parsed once into frozen dataclasses.

A file holds sections of keys (two levels, nothing deeper). `extends = "base.toml"` (relative to the
file) makes it the few lines that differ. Environment overrides `NMOE_<SECTION>__<KEY>=value` come
last; their values follow TOML's rules (strings in quotes). `${NMOE_NAME:-default}` expands inside
strings, for names that start with NMOE_ only.

Every field is tagged with what a change of it means:
  identity  it changes what the run computes; a checkpoint of another identity is refused
  schedule  it changes results too, but a run may be continued under a new value
  free      it changes no result (paths, logging)
The fingerprint hashes identity and schedule fields.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli

from nmoe.config.expansion import expand, expand_all
from nmoe.errors import ConfigError
from nmoe.records.measures import MEASURES
from nmoe.records.root import DEFAULT_ROOT

REQUIRED: Any = object()
Metric = Literal[tuple(MEASURES)]


def _tagged(kind: str, default: Any) -> Any:
  if default is REQUIRED:
    return field(metadata={"kind": kind})
  return field(default=default, metadata={"kind": kind})


def identity(default: Any = REQUIRED) -> Any:
  return _tagged("identity", default)


def schedule(default: Any = REQUIRED) -> Any:
  return _tagged("schedule", default)


def free(default: Any = REQUIRED) -> Any:
  return _tagged("free", default)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
  """The hypothesis, written down before the first step. An ablation reads the variant's."""

  name: str = free()
  statement: str = free()  # the claim, in a sentence
  metric: Metric = free("val/bpb")
  direction: Literal["lower", "higher", "none"] = free("none")  # the variant is expected to be …
  min_effect: float = free(0.0)  # smallest difference that matters, in the metric's unit
  seeds: int = free(3)


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
  bf16_first_layers: int = identity(0)
  bf16_last_layers: int = identity(0)
  finish_tokens: int = schedule(0)  # from this token on the forward product is bf16; 0: never


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The dense side of a DeepSeek-shaped decoder (arXiv 2412.19437 section 2.1)."""

  vocab_size: int = identity()
  dim: int = identity()
  num_layers: int = identity()
  num_dense_layers: int = identity(1)
  dense_dim: int = identity()
  num_heads: int = identity()
  q_lora_rank: int = identity(0)  # 0: q is one full projection
  kv_lora_rank: int = identity(512)
  qk_nope_dim: int = identity(128)
  qk_rope_dim: int = identity(64)
  v_dim: int = identity(128)
  rope_theta: float = identity(10000.0)
  norm_eps: float = identity(1e-6)
  tie_embeddings: bool = identity(False)
  init_std: float = identity(0.006)


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
  """YaRN context extension (arXiv 2309.00071, 2412.19437 section 4.3). factor 1: plain RoPE."""

  factor: float = identity(1.0)
  original_seq_len: int = identity(4096)
  beta_fast: float = identity(32.0)
  beta_slow: float = identity(1.0)
  mscale_all_dim: float = identity(1.0)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
  num_experts: int = identity()
  top_k: int = identity()
  num_shared: int = identity(1)  # shared experts, run as one block of num_shared · expert_dim
  expert_dim: int = identity()
  num_groups: int = identity(1)
  topk_groups: int = identity(1)
  score: Literal["sigmoid", "softmax"] = identity("sigmoid")
  normalize: bool = identity(True)
  route_scale: float = identity(1.0)
  bias_update_rate: float = identity(0.001)  # 0: no aux-loss-free balancing
  balance_alpha: float = identity(0.0001)  # weight of the sequence-wise balance loss
  forced_balance: bool = identity(False)  # benchmark switch: expert = (t·K + k) mod E


@dataclass(frozen=True, kw_only=True)
class RdepConfig:
  group: int = schedule(0)  # ranks over which the experts lie; more ranks hold replicas. 0: all
  capacity: float = schedule(1.5)  # rows a rank's buffer holds, over the balanced T·K
  alignment: int = schedule(1)  # each expert's rows start at a multiple of this
  deadline_s: float = free(120.0)  # of every wait for a peer
  payload: Literal["bf16", "mxfp8", "nvfp4"] = identity("bf16")  # of dispatched rows; bf16: as is
  peer_access: bool = free(True)  # False: put-with-signal also inside a node (a test of that path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
  mixture: str = free()  # path of the mixture's TOML; its content enters the fingerprint by digest
  tokenizer: Literal["byte", "o200k_harmony"] = identity("o200k_harmony")
  seq_len: int = identity()
  val_tokens: int = identity(1 << 20)  # held-out tokens per evaluation (at most what the set has)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
  matrices: Literal["adamw", "muon"] = identity("adamw")  # of attention and dense matrices
  experts: Literal["adamw", "muon"] = identity("adamw")
  dense_lr: float = schedule()
  router_lr: float = schedule()
  expert_lr: float = schedule()
  dense_weight_decay: float = schedule(0.1)
  router_weight_decay: float = schedule(0.0)
  expert_weight_decay: float = schedule(0.1)
  beta1: float = identity(0.9)
  beta2: float = identity(0.95)
  eps: float = identity(1e-8)
  muon_momentum: float = identity(0.95)
  muon_steps: int = identity(5)
  moments: Literal["fp32", "bf16"] = identity("fp32")
  clip_norm: float = schedule(1.0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """Warm-up, sustain, decay, in tokens (arXiv 2404.06395, 2405.18392)."""

  total_tokens: int = schedule()
  batch_tokens: int = schedule()
  warmup_tokens: int = schedule(0)
  decay_tokens: int = schedule(0)
  decay: Literal["linear", "sqrt"] = schedule("sqrt")
  final_ratio: float = schedule(0.0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
  seed: int = identity(0)
  micro_batch: int = schedule()  # sequences of one forward pass on one rank
  loss_chunk: int = free(4096)  # tokens whose logits live at a time
  cuda_graph: bool = free(False)  # queue a step's passes at once: for what the host limits
  log_every: int = free(10)
  flight_every: int = free(0)  # steps; 0: never measure what quantization loses (nmoe.train.flight)
  eval_every: int = free(0)  # steps; 0: only at the end
  checkpoint_every: int = free(0)  # steps; 0: only at the end
  keep_checkpoints: int = free(2)  # 0: none is written, and a stopped run starts anew


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
  ranks: int = schedule(1)
  threads: int = schedule(0)  # torch CPU threads per rank; 0: cores / ranks


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
  precision: PrecisionConfig = field(default_factory=PrecisionConfig)
  rdep: RdepConfig = field(default_factory=RdepConfig)
  launch: LaunchConfig = field(default_factory=LaunchConfig)
  run: RunConfig = field(default_factory=RunConfig)

  @property
  def expert_ranks(self) -> int:
    """The ranks that hold one set of routed experts: those of an RDEP group."""
    return self.rdep.group or self.launch.ranks

  def quantizes(self, product: str, layer: int) -> bool:
    """Whether a product is block-scaled: "experts" or one of precision.linears' names."""
    p = self.precision
    chosen = p.experts if product == "experts" else product in p.linears
    inner = p.bf16_first_layers <= layer < self.model.num_layers - p.bf16_last_layers
    return self.target.dtype in ("fp8", "nvfp4") and chosen and inner

  def with_values(self, **values: Any) -> Config:
    """A copy with dotted keys replaced, e.g. with_values(**{"train.seed": 1}).

    Checked like a file's, but strings are taken as they are. Raises ConfigError.
    """
    config, known = self, leaves(self)
    for key, value in values.items():
      if key not in known:
        raise ConfigError(f"unknown key {key} = {value!r}{_nearest(key, known)}")
      section, name = key.split(".")
      value = list(value) if isinstance(value, tuple) else value
      value = _convert(value, get_type_hints(SECTIONS[section])[name], key)
      config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    validate(config, {})
    return config


SECTIONS: dict[str, type] = {
  f.name: hint for f, hint in ((f, get_type_hints(Config)[f.name]) for f in fields(Config))
}


def load(path: str | Path, env: Mapping[str, str] | None = None) -> Config:
  """Parse a TOML file with its `extends` chain, then the environment's overrides, and validate.

  Raises ConfigError naming the file, the key, the value and the nearest valid name.
  """
  env = os.environ if env is None else env
  values, origins = _read(Path(path), ())
  for (section, key), value in overrides(env).items():
    if isinstance(values.setdefault(section, {}), dict):
      values[section][key] = value
    origins[f"{section}.{key}"] = f"environment NMOE_{section.upper()}__{key.upper()}"
  return _build(values, origins, str(path), env)


def loads(text: str, name: str = "<string>", env: Mapping[str, str] | None = None) -> Config:
  """Like `load`, from a string without `extends` or overrides (the resolved TOML of a record)."""
  table = _table(text, name)
  return _build(table, _origins(table, name), name, os.environ if env is None else env)


def overrides(env: Mapping[str, str]) -> dict[tuple[str, str], Any]:
  """The NMOE_<SECTION>__<KEY> entries of the environment: (section, key) -> TOML value."""
  found = {}
  for name in sorted(env):
    if not name.startswith("NMOE_") or "__" not in name:
      continue
    section, key = name[len("NMOE_") :].lower().split("__", 1)
    try:
      table = tomli.loads(f"value = {env[name]}")
    except tomli.TOMLDecodeError as error:
      raise ConfigError(
        f"environment {name}={env[name]!r} is not a TOML value ({error}); "
        f"quote strings: {name}='\"{env[name]}\"'"
      ) from error
    if table.keys() != {"value"}:
      raise ConfigError(f"environment {name}={env[name]!r} is more than one TOML value; set one")
    found[section, key] = table["value"]
  return found


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


def fingerprint(config: Config, data_digest: str = "") -> str:
  """16 hex digits over the identity and schedule fields and the digest of the prepared data."""
  hashed = {key: value for key, value in leaves(config).items() if kind(key) != "free"}
  text = json.dumps([hashed, data_digest], sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_toml(config: Config) -> str:
  """The resolved configuration: every key, no `extends`; `loads` reads it back."""
  lines = []
  for section in fields(config):
    lines.append(f"[{section.name}]")
    part = getattr(config, section.name)
    lines += [f"{leaf.name} = {_toml_value(getattr(part, leaf.name))}" for leaf in fields(part)]
    lines.append("")
  return "\n".join(lines)


def _toml_value(value: Any) -> str:
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, str):
    escaped = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return escaped.replace("${", "$${")
  if isinstance(value, tuple):
    return "[" + ", ".join(_toml_value(v) for v in value) + "]"
  return repr(value)


def _table(text: str, name: str) -> dict[str, Any]:
  try:
    return tomli.loads(text)
  except tomli.TOMLDecodeError as error:
    raise ConfigError(f"{name}: not valid TOML: {error}") from error


def _origins(table: Mapping[str, Any], name: str) -> dict[str, str]:
  return {
    f"{section}.{key}": name
    for section, part in table.items()
    if isinstance(part, dict)
    for key in part
  }


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
  """The merged table of a file and what it extends, and the file that each key came from."""
  path = path.resolve()
  if path in chain:
    names = " -> ".join(p.name for p in (*chain, path))
    raise ConfigError(f"{path}: extends itself ({names}); break the circle")
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    by = f" (extended by {chain[-1]})" if chain else ""
    raise ConfigError(f"{path}: cannot be read{by}: {error}") from error
  table = _table(text, str(path))
  parent = table.pop("extends", None)
  mixture = table.get("data", {})
  if isinstance(mixture, dict) and isinstance(mixture.get("mixture"), str):
    mixture["mixture"] = _anchor(mixture["mixture"], path)
  if parent is None:
    return table, _origins(table, str(path))
  if not isinstance(parent, str):
    raise ConfigError(f"{path}: extends = {parent!r} is not a path in quotes")
  merged, origins = _read(path.parent / parent, (*chain, path))
  for section, part in table.items():
    known = isinstance(part, dict) and isinstance(merged.get(section, {}), dict)
    merged[section] = {**merged.get(section, {}), **part} if known else part
  return merged, {**origins, **_origins(table, str(path))}


def _anchor(value: str, path: Path) -> str:
  """A relative mixture path is relative to the file that names it."""
  return value if value.startswith(("/", "$")) else str(path.parent / value)


def _build(
  values: Mapping[str, Any], origins: Mapping[str, str], name: str, env: Mapping[str, str]
) -> Config:
  parts = {}
  for section, table in values.items():
    if section not in SECTIONS:
      raise ConfigError(f"{name}: unknown section [{section}]{_nearest(section, SECTIONS)}")
    if not isinstance(table, dict):
      raise ConfigError(f"{name}: {section} = {table!r} must be a section [{section}]")
    parts[section] = _section(section, table, origins, name, env)
  for section, cls in SECTIONS.items():
    if section not in parts:
      parts[section] = _section(section, {}, origins, name, env)
    assert isinstance(parts[section], cls)
  config = Config(**parts)
  validate(config, origins, name)
  return config


def _section(
  section: str,
  table: Mapping[str, Any],
  origins: Mapping[str, str],
  name: str,
  env: Mapping[str, str],
) -> Any:
  cls = SECTIONS[section]
  hints = get_type_hints(cls)
  given = {}
  for key, value in table.items():
    where = origins.get(f"{section}.{key}", name)
    if key not in hints:
      raise ConfigError(f"{where}: unknown key {section}.{key} = {value!r}{_nearest(key, hints)}")
    where = f"{where}: {section}.{key}"
    given[key] = _convert(expand_all(value, where, env), hints[key], where)
  for f in fields(cls):
    if f.name in given:
      continue
    if f.default is not MISSING:
      if isinstance(f.default, str):
        given[f.name] = expand(f.default, f"{section}.{f.name}", env)
      continue
    raise ConfigError(f"{name}: {section}.{f.name} is missing; add it under [{section}]")
  return cls(**given)


def _convert(value: Any, hint: Any, where: str) -> Any:
  """A TOML value as the field's type, or ConfigError. ints widen to float, nothing else does."""
  if get_origin(hint) is Literal:
    choices = get_args(hint)
    if value not in choices or isinstance(value, bool):
      near = _nearest(str(value), [str(c) for c in choices])
      raise ConfigError(f"{where} = {value!r} must be one of {', '.join(map(repr, choices))}{near}")
    return value
  if get_origin(hint) is tuple:
    if not isinstance(value, list):
      raise ConfigError(f"{where} = {value!r} must be a list")
    return tuple(_convert(v, get_args(hint)[0], f"{where}[{i}]") for i, v in enumerate(value))
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    raise ConfigError(f"{where} = {value!r} is {type(value).__name__}, must be {hint.__name__}")
  if hint is float and value != value:
    raise ConfigError(f"{where} = nan is not a number that a run can use")
  return value


def _nearest(name: str, valid: Any) -> str:
  close = difflib.get_close_matches(name, list(valid), n=1)
  return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def validate(config: Config, origins: Mapping[str, str], name: str = "config") -> None:
  """Raise ConfigError at the first of what single types cannot say: ranges, divisors, targets."""
  for key, broken, need in _invariants(config):
    if broken:
      where = origins.get(key, name)
      raise ConfigError(f"{where}: {key} = {leaves(config)[key]!r} {need}")


_POSITIVE = (
  "model.vocab_size model.dim model.num_layers model.dense_dim model.num_heads model.kv_lora_rank "
  "model.qk_nope_dim model.qk_rope_dim model.v_dim model.rope_theta model.norm_eps model.init_std "
  "moe.num_experts moe.top_k moe.expert_dim moe.num_groups moe.topk_groups moe.route_scale "
  "data.seq_len data.val_tokens schedule.total_tokens schedule.batch_tokens train.micro_batch "
  "train.loss_chunk train.log_every launch.ranks experiment.seeds rdep.capacity rdep.alignment "
  "rdep.deadline_s optim.eps optim.muon_steps optim.clip_norm yarn.original_seq_len"
).split()
_NOT_NEGATIVE = (
  "model.num_dense_layers model.q_lora_rank moe.num_shared moe.bias_update_rate moe.balance_alpha "
  "optim.dense_lr optim.router_lr optim.expert_lr optim.dense_weight_decay "
  "optim.router_weight_decay optim.expert_weight_decay schedule.warmup_tokens "
  "schedule.decay_tokens schedule.final_ratio train.seed train.flight_every train.eval_every "
  "train.checkpoint_every train.keep_checkpoints launch.threads rdep.group "
  "precision.bf16_first_layers precision.bf16_last_layers precision.finish_tokens "
  "experiment.min_effect"
).split()


def _invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  """(dotted key, broken?, what is required and what to do)."""
  flat = leaves(c)
  for key in _POSITIVE:
    yield key, flat[key] <= 0, "must be positive"
  for key in _NOT_NEGATIVE:
    yield key, flat[key] < 0, "must not be negative"
  for key in ("optim.beta1", "optim.beta2", "optim.muon_momentum"):
    yield key, not 0 <= flat[key] < 1, "must be in [0, 1)"
  yield "yarn.factor", c.yarn.factor < 1, "must be at least 1 (1: plain RoPE)"
  yield "rdep.capacity", c.rdep.capacity < 0.1, "must be at least 0.1 of the balanced load"
  yield from _model_invariants(c)
  yield from _schedule_invariants(c)
  yield from _target_invariants(c)
  yield from _payload_invariants(c)


def _model_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  m, e, p, ranks = c.model, c.moe, c.precision, c.launch.ranks
  need = f"exceeds num_layers {m.num_layers}"
  yield "model.num_dense_layers", m.num_dense_layers > m.num_layers, need
  yield "model.qk_rope_dim", m.qk_rope_dim % 2 != 0, "must be even: RoPE turns pairs"
  yield "moe.top_k", e.top_k > e.num_experts, f"exceeds num_experts {e.num_experts}"
  need = f"must divide num_experts {e.num_experts}"
  yield "moe.num_groups", e.num_experts % e.num_groups != 0, need
  yield "moe.topk_groups", e.topk_groups > e.num_groups, f"exceeds num_groups {e.num_groups}"
  room = e.num_experts // e.num_groups * e.topk_groups
  need = f"exceeds the {room} experts of topk_groups {e.topk_groups} groups"
  yield "moe.top_k", e.top_k > room, need
  shared = math.gcd(e.num_experts, ranks)
  need = (
    f"does not divide num_experts {e.num_experts}; choose one of {_divisors(e.num_experts)}, or "
    f"replicate the experts: rdep.group = one of {_divisors(shared)}"
  )
  yield "launch.ranks", not c.rdep.group and e.num_experts % ranks != 0, need
  need = f"must divide ranks {ranks} and num_experts {e.num_experts}: 0 (all), {_divisors(shared)}"
  yield "rdep.group", shared % c.expert_ranks != 0, need
  layers = p.bf16_first_layers + p.bf16_last_layers
  need = f"+ bf16_last_layers {p.bf16_last_layers} exceeds num_layers {m.num_layers}"
  yield "precision.bf16_first_layers", layers > m.num_layers, need


def _schedule_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  s, seq_len, micro_batch = c.schedule, c.data.seq_len, c.train.micro_batch
  step = seq_len * micro_batch * c.launch.ranks
  below = max(1, s.batch_tokens // step) * step
  need = (
    f"must be a multiple of seq_len {seq_len} · micro_batch {micro_batch} · ranks {c.launch.ranks} "
    f"= {step}; the nearest are {below} and {below + step}"
  )
  yield "schedule.batch_tokens", s.batch_tokens % step != 0, need
  need = f"is less than one batch {s.batch_tokens}"
  yield "schedule.total_tokens", s.total_tokens < s.batch_tokens, need
  used = s.warmup_tokens + s.decay_tokens
  need = f"+ decay_tokens {s.decay_tokens} = {used} exceeds total_tokens {s.total_tokens}"
  yield "schedule.warmup_tokens", used > s.total_tokens, need
  yield "schedule.final_ratio", s.final_ratio > 1, "must be at most 1"


def _target_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  t, block = c.target, c.target.dtype in ("fp8", "nvfp4")
  need = 'fp32 is for arch = "cpu"; use "bf16"'
  yield "target.dtype", t.dtype == "fp32" and t.arch != "cpu", need
  need = (
    f"needs block-scaled tensor cores, which {t.arch} lacks; set target.emulate_blockscale = true "
    'to study the numerics, or target.arch = "sm_100a"'
  )
  yield "target.dtype", block and t.arch != "sm_100a" and not t.emulate_blockscale, need
  need = "is for one GPU without block scales: set it to false, or "
  for misfit, other in (
    (t.arch == "cpu", 'target.arch = "sm_100a"'),
    (block, 'target.dtype = "bf16"'),
    (c.launch.ranks > 1, "launch.ranks = 1"),
  ):
    yield "train.cuda_graph", c.train.cuda_graph and misfit, need + other
  need = 'has nothing to emulate; set target.dtype = "fp8" or "nvfp4"'
  yield "target.emulate_blockscale", t.emulate_blockscale and not block, need
  for key, value in (("model.dim", c.model.dim), ("moe.expert_dim", c.moe.expert_dim)):
    yield key, block and value % 32 != 0, f"must be a multiple of 32 for {t.dtype} blocks"


def _payload_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  dim, packed = c.model.dim, c.rdep.payload != "bf16"
  need = 'quantizes bf16 rows, but target.dtype is "fp32"; set it to "bf16" or payload = "bf16"'
  yield "rdep.payload", packed and c.target.dtype == "fp32", need
  need = f'has blocks of 32, model.dim is {dim}; make it a multiple of 32 or set payload = "bf16"'
  yield "rdep.payload", packed and dim % 32 != 0, need
  need = 'is not for rdep.peer_access = false; set that to true or payload = "bf16"'
  yield "rdep.payload", packed and not c.rdep.peer_access, need


def _divisors(n: int) -> str:
  return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
