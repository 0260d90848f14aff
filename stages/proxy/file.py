"""The file of a sweep, and the configurations of its scales.

[sweep]                               # what is asked
name = "moonlet-lr-width"
statement = "Under completep-moe the best rates move by at most one octave over 8 times the width."
base = "base.toml"                    # an nmoe configuration, ratio 1 of the rule
target = "../moonlet/moonlet.toml"    # what the recommendation is for (optional)
vary = ["joint", "expert_lr"]         # one at a time, the other rates at the base file's
points = 6                            # of a grid around the base's rates, extended outward
seeds = 3                             # at the best three points; the first seed has the whole grid
control = ["off", "embed_only"]       # the joint grid at the largest scale without the rule
[[scale]]                             # a factor on the base: width, depth, batch, tokens, experts,
width = 8                             # sparsity; or keys, such as "moe.num_shared" = 2
[verdict]
max_shift = 1.0                       # octaves
[budget]
runs = 120
[coords]
widths = [2, 4, 8]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from nmoe.config import file as configs
from nmoe.config.sections import MAX_RATE, Config, fingerprint
from nmoe.errors import ConfigError
from nmoe.tables import nearest, parsed, ranged, read, typed
from nmoe.wording import counted
from stages.judge.transfer import Limits

Vary = Literal["joint", "dense_lr", "router_lr", "expert_lr", "embed_lr"]
WIDTH = (
  "model.dim",
  "model.num_heads",
  "model.dense_dim",
  "model.kv_lora_rank",
  "model.q_lora_rank",
  "moe.expert_dim",
)
AXES: dict[str, tuple[str, ...]] = {  # the keys that a factor multiplies
  "width": WIDTH,
  "depth": ("model.num_layers",),
  "batch": ("schedule.batch_tokens",),
  "tokens": ("schedule.total_tokens", "schedule.warmup_tokens", "schedule.decay_tokens"),
  "experts": ("moe.num_experts", "moe.top_k"),
  "sparsity": ("moe.num_experts",),
}
CONTROLS = {"off": "none", "embed_only": "embed-only"}  # -> scaling.rule
NOT_SCALES = {  # keys that a scale cannot have, and why
  "train.seed": "every scale runs at the sweep's seeds",
  "data.mixture": "all scales read the base's text",
  "data.tokenizer": "all scales read the base's text",
}
GROUPS = ("dense_lr", "router_lr", "expert_lr", "embed_lr")
HEADS = ("model.qk_nope_dim", "model.qk_rope_dim", "model.v_dim")
MAX_FACTOR = 1_000_000
MAX_COORDS = 64  # a factor of the coordinate check, which builds the model
MAX_REACH = 64.0  # octaves of a grid to either side
MIN_DECAY_STEPS = 20  # fewer, and a decay that is a share of the run is none


@dataclass(frozen=True, kw_only=True)
class SweepKeys:
  name: str
  statement: str
  base: str
  target: str = ""
  vary: tuple[Vary, ...] = ("joint",)
  step: float = ranged(2.0, gt=1, le=1000)
  router_step: float = ranged(0.0, ge=0, le=1000)  # 0: step
  points: int = ranged(6, gt=0, le=1000)
  extend: int = ranged(3, ge=0, le=1000)
  seeds: int = ranged(3, gt=0, le=1000)
  control: tuple[Literal["off", "embed_only"], ...] = ("off",)


@dataclass(frozen=True, kw_only=True)
class BudgetKeys:
  runs: int = ranged(gt=0)
  device_seconds: float = ranged(0.0, ge=0, lt=math.inf)  # 0: not limited


@dataclass(frozen=True, kw_only=True)
class VerdictKeys:
  max_shift: float = ranged(1.0, gt=0, lt=math.inf)
  max_regret: float = ranged(0.01, gt=0, lt=math.inf)
  min_control_shift: float = ranged(1.0, ge=0, lt=math.inf)


@dataclass(frozen=True, kw_only=True)
class CoordsKeys:
  widths: tuple[int, ...] = (2, 4, 8)  # below dim 64 slopes are off their limit
  depths: tuple[int, ...] = (1, 2, 4)
  seeds: int = ranged(5, gt=1, le=1000)
  steps: int = ranged(12, gt=0, le=10_000)
  lr: float = ranged(0.0, ge=0, le=MAX_RATE)  # 0: the base's dense_lr
  sequences: int = ranged(4, gt=0, le=10_000)  # of 32 tokens
  limit: float = ranged(0.25, gt=0, lt=math.inf)  # on the slope of a change
  experts: int = ranged(0, ge=0)  # of the check's models, as many of them active; 0: the base's
  vocab_size: int = ranged(0, ge=0, le=10_000_000)  # of the check's models; 0: the base's


SECTIONS = {"sweep": SweepKeys, "budget": BudgetKeys, "verdict": VerdictKeys, "coords": CoordsKeys}


@dataclass(frozen=True)
class ScalePlan:
  """A scale: its name, its factor on the first axis it names, its configuration with the rule, all
  the axes that it names.
  """

  name: str
  ratio: float
  config: Config
  axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepFile:
  path: Path
  text: str
  sweep: SweepKeys
  budget: BudgetKeys
  verdict: VerdictKeys
  coords: CoordsKeys
  base: Config
  goal: Path  # the file that the recommendation extends: the target's, or the base's
  target: Config  # as it was when the sweep began
  scales: tuple[ScalePlan, ...]  # base first, then in the file's order

  @property
  def axis(self) -> str:
    """The one axis of AXES that all scales lie on; "" if there are several, or none."""
    found = {axis for scale in self.scales[1:] for axis in (scale.axes or ("",))}
    return found.pop() if len(found) == 1 else ""

  @property
  def asked(self) -> str:
    """The statement with all that decides on it, so that what was asked before the first run is
    not another question after the last.
    """
    v, controls = self.verdict, " and ".join(self.sweep.control)
    moved = (
      f"; {controls} must move by {counted(v.min_control_shift, 'octave')}"
      if controls
      else "; no control"
    )
    limits = f"at most {counted(v.max_shift, 'octave')} and {v.max_regret:g} nats of regret{moved}"
    return f"{self.sweep.statement} Judged by: {limits}; rates: {', '.join(self.sweep.vary)}."

  @property
  def limits(self) -> Limits:
    v = self.verdict
    return Limits(v.max_shift, v.max_regret, v.min_control_shift)


def load_sweep(path: Path) -> SweepFile:
  """Parse a sweep's TOML. Raises ConfigError naming the file, the key and the value."""
  text = read(path, "sweep")
  table = parsed(text, str(path))
  for key in table.keys() - {*SECTIONS, "scale"}:
    raise ConfigError(f"{path}: unknown section [{key}]{nearest(key, (*SECTIONS, 'scale'))}")
  parts = {name: typed(table.get(name, {}), cls, str(path), name) for name, cls in SECTIONS.items()}
  sweep: SweepKeys = parts["sweep"]
  base = configs.load(path.parent / sweep.base)
  target = configs.load(path.parent / sweep.target) if sweep.target else base
  goal = (path.parent / (sweep.target or sweep.base)).resolve()
  _check(path, sweep, base)
  _check_coords(path, parts["coords"], base)
  entries = table.get("scale", [])
  if not isinstance(entries, list) or not entries:
    raise ConfigError(f"{path}: needs at least one [[scale]], such as width = 8")
  ruled = with_rule(base, base)
  scales = [ScalePlan("base", 1.0, ruled)]
  for number, entry in enumerate(entries, start=1):
    scales.append(scaled(f"{path}: scale {number}", entry, base))
  _check_scales(path, scales)
  return SweepFile(path, text, **parts, base=base, goal=goal, target=target, scales=tuple(scales))


def _check(path: Path, sweep: SweepKeys, base: Config) -> None:
  check_told(path, "sweep", sweep)
  for key in ("vary", "control"):
    chosen = getattr(sweep, key)
    if len(set(chosen)) < len(chosen):
      raise ConfigError(f"{path}: sweep.{key} = {list(chosen)} names one twice; name each once")
  if 0 < sweep.router_step <= 1:
    raise ConfigError(
      f"{path}: sweep.router_step = {sweep.router_step:g} must exceed 1, or be 0 for sweep.step"
    )
  if sweep.points < 3:
    raise ConfigError(
      f"{path}: sweep.points = {sweep.points} gives no parabola; set 3 at least, 6 is usual"
    )
  for key in ("step", "router_step"):
    reach = (sweep.points // 2 + sweep.extend) * math.log2(max(getattr(sweep, key), 1))
    if reach > MAX_REACH:
      raise ConfigError(
        f"{path}: sweep.{key} = {getattr(sweep, key):g} with {sweep.points} points and "
        f"{sweep.extend} beyond takes rates to 2^{reach:.0f} times the base's; at most "
        f"2^{MAX_REACH:g}: lower one of them"
      )
  if "joint" not in sweep.vary:
    raise ConfigError(
      f"{path}: sweep.vary = {list(sweep.vary)} lacks 'joint', which all else needs"
    )
  if "embed_lr" in sweep.vary and not base.optim.embed_lr:
    raise ConfigError(f"{path}: sweep.vary has embed_lr, but {sweep.base} sets no optim.embed_lr")
  if base.scaling.rule != "none":
    raise ConfigError(
      f"{path}: {sweep.base} has scaling.rule = {base.scaling.rule!r}; a base has none, the sweep "
      "adds it"
    )


def _check_scales(path: Path, scales: list[ScalePlan]) -> None:
  """ConfigError unless they are different, decay, and grow from the base to the last."""
  names = [scale.name for scale in scales]
  if len(set(names)) < len(names):
    raise ConfigError(f"{path}: two scales are both {names[-1]!r}; each needs its own factor")
  first = scales[0].config
  for scale in scales:
    s = scale.config.schedule
    if (steps := s.decay_tokens // s.batch_tokens) < MIN_DECAY_STEPS:
      raise ConfigError(
        f"{path}: scale {scale.name!r} decays over {counted(steps, 'step')}; {MIN_DECAY_STEPS} are "
        "needed for an end that says what a long run's would: raise its schedule.decay_tokens"
      )
  for before, scale in itertools.pairwise(scales):
    if fingerprint(scale.config) == fingerprint(first):
      raise ConfigError(f"{path}: scale {scale.name!r} is the base itself; choose another factor")
    along = scale.axes == before.axes or before.config is first
    if along and scale.axes and abs(math.log(scale.ratio)) <= abs(math.log(before.ratio)):
      raise ConfigError(
        f"{path}: scale {scale.name!r} comes after {before.name!r}; write scales from the one next "
        "to the base to the farthest, which is the one that is judged"
      )


def check_told(path: Path, section: str, keys: Any) -> None:
  """ConfigError unless name and statement say something that a record can hold."""
  for key in ("name", "statement"):
    value = getattr(keys, key)
    if not value.strip() or "\0" in value:
      raise ConfigError(f"{path}: {section}.{key} = {value!r} must say something, without a NUL")


def _check_coords(path: Path, coords: CoordsKeys, base: Config) -> None:
  for key in ("widths", "depths"):
    factors = getattr(coords, key)
    if not factors or min(factors) < 1 or max(factors) > MAX_COORDS:
      raise ConfigError(
        f"{path}: coords.{key} = {list(factors)} must have factors on the base, 1 to {MAX_COORDS}"
      )
    if len(set(factors)) < 2:
      raise ConfigError(
        f"{path}: coords.{key} = {list(factors)} has no slope; give two different factors at least"
      )
  of, active = base.moe.num_experts, base.moe.top_k
  if coords.experts * active % of:
    raise ConfigError(
      f"{path}: coords.experts = {coords.experts} of which {active} / {of} are active, as at the "
      f"base, is no whole number; set a multiple of {of // math.gcd(of, active)}"
    )
  try:
    configs.changed(base, check_keys(coords, base))
  except ConfigError as error:
    raise ConfigError(f"{path}: coords: {error}") from error


def check_keys(coords: CoordsKeys, base: Config) -> dict[str, Any]:
  """What makes the check's models smaller than the base, at the same share of active experts: no
  factor of the rule depends on the vocabulary or, at that share, on the experts.
  """
  keys = {}
  if coords.vocab_size:
    keys["model.vocab_size"] = coords.vocab_size
  if coords.experts:
    keys["moe.num_experts"] = coords.experts
    keys["moe.top_k"] = coords.experts * base.moe.top_k // base.moe.num_experts
  return keys


def with_rule(config: Config, base: Config) -> Config:
  """The configuration under the rule from this base."""
  return configs.changed(config, rule_keys(base))


def rule_keys(base: Config) -> dict[str, Any]:
  m = base.model
  return {
    "scaling.rule": "completep-moe",
    "scaling.base_dim": m.dim,
    "scaling.base_layers": m.num_layers,
    "scaling.base_dense_dim": m.dense_dim,
    "scaling.base_expert_dim": base.moe.expert_dim,
    "scaling.base_kv_rank": m.kv_lora_rank,
    "scaling.base_q_rank": m.q_lora_rank,
    "scaling.base_heads": m.num_heads,
    "scaling.base_batch_tokens": base.schedule.batch_tokens,
    "scaling.base_total_tokens": base.schedule.total_tokens,
  }


def without_rule(config: Config, control: str) -> Config:
  """As a control has it: no rule, or the embedding's factor alone."""
  return configs.changed(config, {"scaling.rule": CONTROLS[control]})


def scaled(where: str, entry: Mapping[str, Any], base: Config) -> ScalePlan:
  """The base with the factors and keys of an entry."""
  values: dict[str, Any] = {}
  if not isinstance(entry, dict) or not entry:
    raise ConfigError(
      f"{where}: {entry!r} must be a table [[scale]] with a factor, such as width = 8"
    )
  known = {f"{f.name}" for f in fields(Config)}
  for key, value in entry.items():
    if key in AXES:
      if type(value) not in (int, float) or not 0 < value <= MAX_FACTOR:
        raise ConfigError(
          f"{where}: {key} = {value!r} must be a positive factor on the base, at most {MAX_FACTOR}"
        )
      values |= {name: _times(where, key, base, name, value) for name in AXES[key]}
    elif key in NOT_SCALES:
      raise ConfigError(f"{where}: {key} = {value!r}: {NOT_SCALES[key]}; drop it")
    elif key.partition(".")[0] in known and "." in key:
      values[key] = value
    else:
      raise ConfigError(f"{where}: unknown axis {key} = {value!r}{nearest(key, AXES)}")
  try:
    config = with_rule(configs.changed(base, values), base)
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from error
  check_heads(where, config, base)
  name = " ".join(
    f"{key}{value:g}" if _plain(value) else f"{key}={value}" for key, value in entry.items()
  )
  axes = tuple(key for key in AXES if key in entry)
  return ScalePlan(name, float(entry[axes[0]]) if axes else 1.0, config, axes)


def _plain(value: Any) -> bool:
  return type(value) in (int, float)


def _times(where: str, axis: str, base: Config, name: str, factor: float) -> int:
  section, key = name.split(".")
  own = getattr(getattr(base, section), key)
  found = own * factor
  if not math.isclose(found, round(found), abs_tol=1e-9):
    raise ConfigError(
      f"{where}: {axis} = {factor:g} makes {name} {found:g}, from {own}; choose a whole one"
    )
  return round(found)


def check_heads(where: str, config: Config, base: Config) -> None:
  """ConfigError if head dims differ: the rule is for heads that stay as they are."""
  for name in HEADS:
    key = name.partition(".")[2]
    own, first = getattr(config.model, key), getattr(base.model, key)
    if own != first:
      raise ConfigError(
        f"{where}: {name} = {own}, {first} at the base; head dims stay, heads grow with the width"
      )
