"""What comes out of a sweep: `transfer.toml`, rates for the target with the evidence for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe import files
from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import ConfigError
from nmoe.records.root import Root
from stages.proxy.file import GROUPS, SweepFile, check_heads, rule_keys, with_rule
from stages.study import Outcome
from stages.workbench import Workbench

PLACED = ("transfers", "drifts", "undecided", "cannot tell")  # states of a group with an optimum


def check_target(file: SweepFile) -> None:
  """ConfigError where the rule does not lead from base to target."""
  path, target, base = file.goal, file.target, file.base
  check_heads(str(path), target, base)
  own, first = (c.moe.top_k / c.moe.num_experts for c in (target, base))
  if not math.isclose(own, first):
    raise ConfigError(
      f"{path}: {own:.3g} of the experts are active, {first:.3g} at the base; rates don't transfer "
      "over sparsity: choose a base of the same share"
    )
  if bool(target.model.q_lora_rank) != bool(base.model.q_lora_rank):
    raise ConfigError(f"{path}: one of base and target has a model.q_lora_rank, the other none")
  with_rule(target, base)


def transferred(file: SweepFile, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What the target, or the base, takes over from a sweep: the rule and the best rates, by key."""
  keys = rule_keys(file.base) | _recommended(file, groups, corrected(file, groups))
  for key in ("init_std", "embed_std"):
    keys[f"model.{key}"] = getattr(file.base.model, key)
  share = file.target.schedule.total_tokens / file.base.schedule.total_tokens
  for key in ("warmup_tokens", "decay_tokens"):
    keys[f"schedule.{key}"] = round(getattr(file.base.schedule, key) * share)
  return keys


def write_transfer(file: SweepFile, outcome: Outcome, bench: Workbench) -> Path:
  """`transfer.toml` beside the report: what the record says is `transferred`, as a configuration
  that extends the target's or the base's file, and the evidence for it.
  """
  sweep, target = outcome.judgement.numbers, file.target
  keys, corrections = sweep["transfer"], corrected(file, sweep["groups"])
  configs.changed(target, keys)  # what is written is valid
  text = [
    f"# The rates of {outcome.experiment.id} for {file.goal.name}; the record keeps them too.",
    f"extends = {configs.quoted(str(file.goal))}",
    "",
  ]
  for section in dict.fromkeys(key.split(".")[0] for key in keys):
    own = {k.split(".")[1]: value for k, value in keys.items() if k.startswith(f"{section}.")}
    text += [f"[{section}]", *_lines(own), ""]
  evidence: dict[str, Any] = {
    "experiment": outcome.experiment.id,
    "code_version": bench.code_version,
    "data": bench.arm("base", file.base).data.name,
    "rule": "completep-moe",
    "verdict": outcome.judgement.verdict,
    **{f"extrapolation_{axis}": _ratio(axis, target, file.base) for axis in _SIZES},
    **{f"swept_{axis}": _swept(axis, file) for axis in _SIZES},
    **{f"corrected_{axis}": power for axis, power in corrections.items()},
  }
  for group in sweep["groups"]:
    evidence[group["name"]] = group["state"]
    evidence[f"{group['name']}_shift_octaves"] = [group["shift"][key] for key in ("low", "high")]
    if group["exponent"] is not None:
      evidence[f"{group['name']}_exponent"] = [group["exponent"][key] for key in ("low", "high")]
  text += ["[evidence]", *_lines(evidence)]
  path = Root(bench.root).report(outcome.experiment.id) / "transfer.toml"
  return files.replace(path, "\n".join(text) + "\n")


_SIZES = {
  "width": ("model", "dim"),
  "depth": ("model", "num_layers"),
  "tokens": ("schedule", "total_tokens"),
  "batch": ("schedule", "batch_tokens"),
}


def _ratio(axis: str, target: Config, base: Config) -> float:
  section, key = _SIZES[axis]
  own, first = (getattr(getattr(c, section), key) for c in (target, base))
  return own / first


def _swept(axis: str, file: SweepFile) -> float:
  """The largest ratio to the base that the sweep measured."""
  return max(_ratio(axis, scale.config, file.base) for scale in file.scales)


def corrected(file: SweepFile, groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Axis -> the exponent p by which the best joint rate falls over it beyond the rule, x* = x0 − p
  log2(ratio), where the sweep has one axis and p's interval leaves 0 out.
  """
  axis, joint = file.axis, groups[0]
  known = joint["exponent"] is not None and joint["state"] in PLACED
  if axis not in _SIZES or not known:
    return {}
  p = joint["exponent"]
  return {axis: p["mean"]} if p["low"] > 0 or p["high"] < 0 else {}


def _recommended(
  file: SweepFile,
  groups: Sequence[Mapping[str, Any]],
  corrections: Mapping[str, float],
) -> dict[str, float]:
  """The base's rates at the optima that the sweep found there, of all together, then of one; the
  horizon's exponent and rates by what the rule was found to leave over.
  """
  base, best = file.base, {g["name"]: _optimum(g) for g in groups}
  factor = 1.0
  for axis, p in corrections.items():
    factor *= 1.0 if axis == "tokens" else _ratio(axis, file.target, base) ** -p
  rates = {
    f"optim.{key}": getattr(base.optim, key) * 2.0 ** (best["joint"] + best.get(key, 0.0)) * factor
    for key in GROUPS
  }
  horizon = base.scaling.horizon + corrections.get("tokens", 0.0)
  return rates | {"scaling.horizon": max(0.0, horizon)}


def _optimum(group: Mapping[str, Any]) -> float:
  """At the base, mean over seeds; 0, the base's own rate, where there is none to go by."""
  known = [x for x in group["optima"].get("base", {}).values() if math.isfinite(x)]
  return sum(known) / len(known) if group["state"] in PLACED and known else 0.0


def _lines(values: Mapping[str, Any]) -> list[str]:
  return [f"{key} = {configs.toml_value(value)}" for key, value in values.items()]
