"""Amendments: what a production run's configuration becomes after so many tokens.

The configuration of a step is a pure function of the run's TOML, its amendments and the tokens
before the step. An amendment holds from the first step that begins at `at_tokens` or after; those
of the same tokens hold together, and of one key the later record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nmoe.config.file import changed
from nmoe.config.sections import Config, kind, leaves
from nmoe.errors import ConfigError
from nmoe.records.reader import Amendment

WEIGHTS = "data.weights"  # an amendment of it adds a row to data.weights_from
KEYS = (  # of which the loop asks by tokens
  *("optim.dense_lr", "optim.router_lr", "optim.expert_lr", "optim.embed_lr", "optim.clip_norm"),
  *("optim.dense_weight_decay", "optim.router_weight_decay", "optim.expert_weight_decay"),
  *(
    "schedule.batch_tokens",
    "schedule.total_tokens",
    "schedule.decay_tokens",
    "schedule.decay",
    "schedule.final_ratio",
  ),
  *("precision.finish_tokens", WEIGHTS),
)


def amended(config: Config, amendments: Sequence[Amendment], tokens: int) -> Config:
  """The configuration of the step after `tokens` tokens; amendments in the order of their own."""
  for at_tokens, together in groupby(amendments, key=lambda one: one.at_tokens):
    if at_tokens <= tokens:
      values: dict[str, Any] = {}
      for one in together:
        values |= values_of(config, one)
      config = changed(config, values)
  return config


def values_of(config: Config, one: Amendment) -> dict[str, Any]:
  """The keys that an amendment changes, with what they become."""
  value = json.loads(one.value)
  if one.key != WEIGHTS:
    return {one.key: value}
  if not isinstance(value, list):
    raise ConfigError(f"amendment of {WEIGHTS}: value = {value!r} must be a list, one a source")
  rows = [row for row in config.data.weights_from if row[0] != one.at_tokens]
  return {"data.weights_from": sorted([*map(list, rows), [float(one.at_tokens), *value]])}


def following(amendments: Sequence[Amendment], tokens: int) -> int:
  """The tokens of the next amendment after `tokens`; 0: there is none."""
  return min((one.at_tokens for one in amendments if one.at_tokens > tokens), default=0)


def check(
  config: Config, before: Sequence[Amendment], more: Sequence[Amendment], tokens: int, name: str
) -> None:
  """ConfigError if a run of `tokens` tokens, which has the amendments `before`, cannot take `more`.

  Every configuration that the run comes to by all of them is a valid one, and none begins after its
  end. name: the file of `more`.
  """
  for n, one in enumerate(more):
    _check_one(config, one, tokens, _where(name, one))
    if any((one.key, one.at_tokens) == (other.key, other.at_tokens) for other in more[:n]):
      raise ConfigError(f"{_where(name, one)}: the file says this key twice there; keep one")
  ordered = sorted([*before, *more], key=lambda one: one.at_tokens)
  for one in ordered:
    where, end = _where(name, one), amended(config, ordered, one.at_tokens - 1).schedule
    if one.at_tokens > tokens and one.at_tokens >= end.trained_tokens:
      raise ConfigError(
        f"{where}: the run ends at {end.trained_tokens} tokens, where nothing is left to amend"
      )
    try:
      amended(config, ordered, one.at_tokens)
    except ConfigError as error:
      raise ConfigError(f"{where}: with all amendments up to there, {error}") from error


def _where(name: str, one: Amendment) -> str:
  return f"{name}: amendment of {one.key} at {one.at_tokens} tokens"


def _check_one(config: Config, one: Amendment, tokens: int, where: str) -> None:
  if one.key not in KEYS:
    if one.key not in leaves(config):
      raise ConfigError(f"{where}: there is no such key; those that can be amended: {_known()}")
    why = {"identity": "makes another model or run: start a new one"}
    why |= {"free": "is read at a launch: change the file and launch again"}
    told = why.get(kind(one.key), "is not read by tokens")
    raise ConfigError(f"{where}: the key {told}; those that can be amended: {_known()}")
  if one.at_tokens <= tokens:
    raise ConfigError(f"{where}: the run is at {tokens} tokens; what is trained is not amended")


def _known() -> str:
  return ", ".join(KEYS)
