"""The gate of a production launch: what must be known before it spends anything.

Experiments that the configuration cites must be confirmed, of stage proxy or ablate, and the
configuration must be what won: it has the variant's value of every key in which an ablation's arms
differ, or the rates that a sweep has on record, and agrees with a winning run in all other identity
keys but its size. `check ep`, `check resume` and `prod check` of this very configuration and code
must have passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff, kind, leaves
from nmoe.errors import NmoeError
from nmoe.records.reader import Experiment, Reader, Run

STAGES = ("proxy", "ablate")
SIZE = (  # may differ: keys, or the start of keys
  *("model.vocab_size", "model.dim", "model.num_layers", "model.num_dense_layers"),
  *("model.dense_dim", "model.num_heads", "model.q_lora_rank", "model.kv_lora_rank"),
  *("model.qk_nope_dim", "model.qk_rope_dim", "model.v_dim", "model.init_std", "model.embed_std"),
  *("moe.num_experts", "moe.expert_dim", "moe.top_k", "moe.num_groups", "moe.topk_groups"),
  "data.",
)
ASIDE = ("train.seed", "target.", "experiment.")
TRANSFERRED = ("optim.", "scaling.", "model.")  # keys that a sweep transfers and are rates
CHECKS = {  # the start of a check's name -> the command that makes it; of several ranks or any
  "check-resume": "nmoe check resume {path}",
  "check-ep": "nmoe check ep {path}",
  "prod-check": "nmoe prod check {path}",
}


@dataclass(frozen=True)
class Evidence:
  """One thing that a launch rests on; `lack` says what is missing and what to do, "" if nothing.

  apart: the keys of size, and where it was run, in which the launch differs from what was shown.
  """

  what: str
  experiment: str  # its id, "" if there is none
  lack: str = ""
  apart: str = ""

  def __str__(self) -> str:
    if self.lack:
      return f"evidence {self.what}: missing: {self.lack}"
    came_to = "passed" if self.what in CHECKS else "is confirmed"
    told = f"evidence {self.what}: {self.experiment} {came_to}"
    return told + f", with another {self.apart}" * bool(self.apart)


def evidence(
  config: Config, path: Path, records: Reader | None, code_version: str
) -> list[Evidence]:
  """All that a launch of the configuration rests on, what is missing among it. records: None, where
  there are none yet.
  """
  found = [_cited(config, name, records) for name in config.prod.evidence]
  if not found:
    found.append(
      Evidence("prod.evidence", "", 'it cites no experiment; add one: evidence = ["NAME"]')
    )
  for name, command in CHECKS.items():
    if name != "check-ep" or config.launch.ranks > 1:
      few = f" --ranks 1,{config.launch.ranks}" * (name == "check-ep" and config.launch.ranks < 4)
      ask = command.format(path=path) + few
      found.append(_checked(config, name, ask, records, code_version))
  return found


def _cited(config: Config, name: str, records: Reader | None) -> Evidence:
  if records is None:
    return Evidence(name, "", f"{config.run.root} has no records yet; run the experiment there")
  try:
    cited = records.find(name)
  except NmoeError as error:
    return Evidence(name, "", f"{error}; run it, or take it off prod.evidence")
  if cited.stage not in STAGES:
    return Evidence(name, cited.id, f"is of stage {cited.stage}; cite one of {' or '.join(STAGES)}")
  if cited.verdict != "confirmed":
    verdict = cited.verdict or f"not concluded ({cited.status})"
    return Evidence(name, cited.id, f"is {verdict}; only what was confirmed can be cited")
  if "groups" in cited.conclusion and "transfer" not in cited.conclusion:
    told = "an earlier version has concluded it, and kept no rates; call `nmoe proxy sweep` on its "
    return Evidence(name, cited.id, told + "file again")
  won = _variant(cited, records) if cited.stage == "ablate" else _transfer(cited)
  runs = [run for run in records.runs(cited.id) if cited.stage != "ablate" or run.arm == "variant"]
  if not runs:
    return Evidence(name, cited.id, "has no run of what won; run it again")
  if lacking := _lacking(config, won):
    told = f"confirmed {lacking}; take that over, or cite what confirms the configuration's own"
    return Evidence(name, cited.id, told)
  apart = min((_apart(config, run) for run in runs), key=lambda pair: len(pair[0]))
  if apart[0]:
    return Evidence(name, cited.id, f"no arm of it has this configuration's {', '.join(apart[0])}")
  return Evidence(name, cited.id, apart=", ".join(apart[1]))


def _variant(cited: Experiment, records: Reader) -> dict[str, Any]:
  """What the confirmed variant of an ablation has in place of its baseline's."""
  runs = {run.arm: run for run in records.runs(cited.id)}
  arms = [_config(runs[arm]) for arm in ("baseline", "variant") if arm in runs]
  if len(arms) < 2:
    return {}
  return {
    key: value
    for key, (_, value) in diff(*arms).items()
    if not key.startswith(ASIDE) and (kind(key) != "free" or key == "data.mixture")
  }


def _transfer(cited: Experiment) -> dict[str, Any]:
  """The rates that a sweep found, as its record has them; {} of a swarm of mixtures."""
  found = cited.conclusion.get("transfer", {})
  return {key: value for key, value in found.items() if key.startswith(TRANSFERRED)}


def _lacking(config: Config, won: Mapping[str, Any]) -> str:
  """Those of the winning values that the configuration does not have."""
  own = leaves(config)
  return "; ".join(
    f"{key} = {value!r}, and this has {own[key]!r}"
    for key, value in won.items()
    if own[key] != value
    and not (isinstance(value, float) and math.isclose(own[key], value, rel_tol=1e-9))
  )


def _apart(config: Config, run: Run) -> tuple[list[str], list[str]]:
  """The identity keys in which a run differs from the configuration: (what makes it another model,
  its size and where it ran).
  """
  keys = [key for key in diff(config, _config(run)) if kind(key) == "identity"]
  aside = [key for key in keys if key.startswith((*SIZE, *ASIDE))]
  return [key for key in keys if key not in aside], [key for key in aside if key != "train.seed"]


def _config(run: Run) -> Config:
  return configs.loads(run.toml, f"run {run.id}", env={})


def _checked(
  config: Config, name: str, command: str, records: Reader | None, code_version: str
) -> Evidence:
  stale = ""
  for experiment in _checks(name, records) if records is not None else ():
    runs = records.runs(experiment.id)
    if not runs or not all(_same_model(config, run) for run in runs):
      continue
    if experiment.verdict != "confirmed":
      return Evidence(name, experiment.id, f"did not pass; run `{command}`")
    if any(run.code_version != code_version for run in runs):
      stale = stale or experiment.id
      continue
    return Evidence(name, experiment.id)
  if stale:
    return Evidence(name, stale, f"passed with other code; run `{command}` with this code")
  return Evidence(name, "", f"was not run for this configuration; run `{command}`")


def _checks(name: str, records: Reader) -> Iterator[Experiment]:
  """The concluded checks of a kind, newest first."""
  for experiment in records.list():
    if experiment.stage == "check" and experiment.name.startswith(name) and experiment.verdict:
      yield experiment


def _same_model(config: Config, run: Run) -> bool:
  """Whether a check's run trains as the configuration does; it evaluates on fewer tokens."""
  keys = diff(config, _config(run)).keys() - {"data.val_tokens"}
  return not any(kind(key) == "identity" for key in keys)
