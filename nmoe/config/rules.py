"""What no single key can say: how the keys of a configuration must agree."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from nmoe.config.sections import Config, leaves
from nmoe.errors import ConfigError
from nmoe.records.measures import MEASURES, measured
from nmoe.tables import nearest
from nmoe.wording import counted

MAX_TEXT = 10_000  # characters of what people write for people
_UNPAIRED = re.compile("[\ud800-\udfff]")  # how Python holds bytes that are no UTF-8


def validate(config: Config, origins: Mapping[str, str], name: str = "config") -> None:
  """Raise ConfigError at the first rule that is broken; `origins` has the file of each key."""
  for key, broken, need in _invariants(config):
    if broken:
      where = origins.get(key, name)
      raise ConfigError(f"{where}: {key} = {leaves(config)[key]!r} {need}")


def _invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  """(dotted key, broken?, what is required and what to do)."""
  yield from _plain_invariants(c)
  yield from _model_invariants(c)
  yield from _schedule_invariants(c)
  yield from _target_invariants(c)
  yield from _payload_invariants(c)
  yield from _scaling_invariants(c)
  yield from _mixture_invariants(c)
  yield from _left_out_invariants(c)
  known = c.data.tokenizer in ("byte", "o200k_harmony") or c.data.tokenizer.startswith("hf:")
  need = 'must be "byte", "o200k_harmony", or "hf:" and the path of a tokenizer.json'
  yield "data.tokenizer", not known, need
  known = c.model.init == "seed" or re.fullmatch(r"import:[\w-]+", c.model.init)
  yield "model.init", not known, 'must be "seed", or "import:" and a digest of `nmoe import`'
  metric, suite = c.experiment.metric, c.eval.suite
  known = "is none of the measures, nor eval/NAME/bpb or eval/NAME/acc of a suite in NAME.toml"
  yield "experiment.metric", measured(metric) is None, known + nearest(metric, MEASURES)
  asked = Path(suite).stem if suite.endswith(".toml") else suite
  other = metric.startswith("eval/") and metric.split("/")[1] != asked
  yield "experiment.metric", other, f'is not measured by [eval] suite = "{suite}"'


def _plain_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  """What no number and no text may be, whatever its key."""
  for key, value in leaves(c).items():
    infinite = isinstance(value, float) and math.isinf(value)
    yield key, infinite and (key != "optim.clip_norm" or value < 0), "must be finite"
    big = isinstance(value, int) and not -(2**63) <= value < 2**63
    yield key, big, "is beyond 64 bits: no record can hold it"
  last = c.train.seed + c.experiment.seeds
  need = f"+ experiment.seeds {c.experiment.seeds} is beyond 64 bits: no record can hold the last"
  yield "train.seed", last >= 2**63, need
  texts = ("experiment.name", "experiment.statement", "data.mixture", "run.root")
  for key in texts:
    yield key, not leaves(c)[key].strip(), "must say something"
  for key in ("experiment.name", "experiment.statement"):
    size = len(leaves(c)[key])
    yield key, size > MAX_TEXT, f"has {size} characters; {MAX_TEXT} are shown, so write fewer"
  for key, value in leaves(c).items():
    if isinstance(value, str):
      yield key, "\0" in value, "holds a NUL, which no path and no command may"
      yield key, bool(_UNPAIRED.search(value)), "holds what is no character of UTF-8"
      option = key.startswith(("slurm.", "jobset.", "launch."))
      yield key, option and not value.isprintable(), "must be one line of printable characters"


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
  need = f"exceeds the {counted(room, 'expert')} that topk_groups {e.topk_groups} leaves"
  yield "moe.top_k", e.top_k > room, need
  need = (
    "with top_k = 1 makes every weight 1, so that the router gets no gradient; set it to false or "
    "choose a larger top_k"
  )
  yield "moe.normalize", e.normalize and e.top_k == 1 and e.num_experts > 1, need
  shared = math.gcd(e.num_experts, ranks)
  need = (
    f"does not divide num_experts {e.num_experts}; choose one of {_divisors(e.num_experts)}, or "
    f"replicate the experts: rdep.group = one of {_divisors(shared)}"
  )
  yield "launch.ranks", not c.rdep.group and e.num_experts % ranks != 0, need
  need = f"must divide ranks {ranks} and num_experts {e.num_experts}: 0 (all), {_divisors(shared)}"
  yield "rdep.group", shared % c.expert_ranks != 0, need
  need = f"does not divide launch.ranks {ranks}; choose one of {_divisors(ranks)}, or 0"
  yield "launch.ranks_per_node", ranks % c.node_ranks != 0, need
  need = (
    f'makes {c.nodes} hosts of {ranks} ranks, and launch.engine "local" starts ranks on this one '
    'alone; set the engine to "slurm" or "jobset", or ranks_per_node to 0'
  )
  yield "launch.ranks_per_node", c.launch.engine == "local" and c.nodes > 1, need
  need = (
    f"of ranks on several hosts ({c.node_ranks} a host): experts lie inside a host; set it to one "
    f"of {_divisors(math.gcd(shared, c.node_ranks))}"
  )
  yield "rdep.group", c.nodes > 1 and c.node_ranks % c.expert_ranks != 0, need
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
  need = (
    f"+ decay_tokens {s.decay_tokens} = {used} exceeds total_tokens {s.total_tokens}, of "
    f"which {s.trained_tokens} are trained in {counted(c.steps, 'step')}"
  )
  yield "schedule.warmup_tokens", used > s.trained_tokens, need
  need = f"is reached by no step of batch_tokens {s.batch_tokens}; set 0, or half a batch and more"
  for key, tokens in (("warmup", s.warmup_tokens), ("decay", s.decay_tokens)):
    yield f"schedule.{key}_tokens", 0 < 2 * tokens <= s.batch_tokens, need
  finish = c.precision.finish_tokens
  need = f"is reached by no step: they train {s.trained_tokens} tokens; set 0 for never"
  yield "precision.finish_tokens", finish > s.trained_tokens, need


def _target_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  t, block = c.target, c.target.dtype in ("fp8", "nvfp4")
  need = 'fp32 is for arch = "cpu"; use "bf16"'
  yield "target.dtype", t.dtype == "fp32" and t.arch != "cpu", need
  need = (
    f"needs block-scaled tensor cores, which {t.arch} lacks; set target.emulate_blockscale = true "
    'to study the numerics, or target.arch = "sm_100a"'
  )
  yield "target.dtype", block and t.arch != "sm_100a" and not t.emulate_blockscale, need
  need = "is for GPUs without block scales: set it to false, or "
  for misfit, other in (
    (t.arch == "cpu", 'target.arch = "sm_100a"'),
    (block, 'target.dtype = "bf16"'),
  ):
    yield "train.cuda_graph", c.train.cuda_graph and misfit, need + other
  need = "sees no router in a graph's replay: set it to 0, or train.cuda_graph = false"
  yield "train.routing_every", c.train.routing_every > 0 and c.train.cuda_graph, need
  need = f'"swiglu" is for products in bf16, but target.dtype is "{t.dtype}"; leave it out'
  yield "train.recompute", block and "swiglu" in c.train.recompute, need
  need = "names a part twice; name each once"
  yield "train.recompute", len(set(c.train.recompute)) < len(c.train.recompute), need
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
  puts, several = not c.rdep.peer_access, c.launch.ranks > 1
  need = 'is for GPUs; with target.arch = "cpu" set it to true'
  yield "rdep.peer_access", puts and several and c.target.arch == "cpu", need
  need = f"puts rows without padding, but rdep.alignment is {c.rdep.alignment}; set that to 1"
  yield "rdep.peer_access", puts and several and c.rdep.alignment > 1, need


def _scaling_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  s, m = c.scaling, c.model
  on = s.rule != "none"
  need = "has no form for tied embeddings (the head needs a factor); set tie_embeddings = false"
  yield "scaling.rule", on and m.tie_embeddings, need
  base = s.base_dim or m.dim
  fits = m.dim % base == 0 or base % m.dim == 0
  need = f"neither divides model.dim {m.dim} nor is a multiple of it; choose a base that does"
  yield "scaling.base_dim", on and not fits, need
  heads = s.base_heads or m.num_heads
  wanted = m.num_heads * base / m.dim
  need = (
    f"gives {m.num_heads / heads:g} times the heads at {m.dim / base:g} times the width; head dims "
    f"stay and heads grow with the width, from {wanted:g} at the base"
  )
  yield "scaling.base_heads", on and heads != wanted, need
  need = "but model.q_lora_rank is 0: q has no rank; set base_q_rank = 0"
  yield "scaling.base_q_rank", on and s.base_q_rank > 0 and m.q_lora_rank == 0, need


def _mixture_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  """Of data.weights_from: whole tokens that rise and are reached, as many weights in every row."""
  rows, key = c.data.weights_from, "data.weights_from"
  need = "must have rows of tokens and a weight for each source, such as [[1000000, 0.5, 0.5]]"
  yield key, any(len(row) < 2 for row in rows), need
  sizes = {len(row) - 1 for row in rows} | ({len(c.data.weights)} if c.data.weights else set())
  need = f"and data.weights have {sorted(sizes)} weights; give one for each source everywhere"
  yield key, len(sizes) > 1, need
  tokens = [row[0] for row in rows if row]
  whole = all(t > 0 and t.is_integer() for t in tokens)
  rising = all(a < b for a, b in itertools.pairwise(tokens))
  yield key, not (whole and rising), "must begin its rows with whole tokens above 0 that rise"
  trained = c.schedule.trained_tokens
  need = f"has a row that no step reaches: they train {trained} tokens"
  yield key, any(t >= trained for t in tokens), need
  weights = (("data.weights", c.data.weights), *((key, row[1:]) for row in rows))
  for name, row in weights:
    bad = bool(row) and (min(row) < 0 or not 0 < sum(row) < math.inf)
    yield name, bad, "must have no negative weights, and a finite sum above 0"


def _left_out_invariants(c: Config) -> Iterator[tuple[str, bool, str]]:
  """Of data.holes and train.skip_steps."""
  holes = c.data.holes
  need = "must have pairs of the first sample, 0 or more, and how many, 1 or more"
  fits = all(len(hole) == 2 and hole[0] >= 0 and hole[1] >= 1 for hole in holes)
  yield "data.holes", not fits, need
  if fits:
    pairs = itertools.pairwise(sorted(holes))
    yield "data.holes", any(a + n > b for (a, n), (b, _) in pairs), "has two that overlap; merge"
    last = max((a + n for a, n in holes), default=0) + c.schedule.total_tokens // c.data.seq_len
    yield "data.holes", last >= 2**63, "is beyond 64 bits: no sample has such a number"
  steps = c.train.skip_steps
  yield (
    "train.skip_steps",
    any(s < 1 for s in steps),
    "names a step that is none: they count from 1",
  )


def _divisors(n: int) -> str:
  return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
