"""`nmoe prod amend RUN FILE`: change a run's schedule from some tokens on, audited.

[[amend]]
at_tokens = 50_000_000_000
key = "optim.expert_lr"
value = 1e-4
reason = "the loss of code rose after 45 B tokens"

A live run saves and leaves at its next log, and is launched again by its engine; it does so once
more at `at_tokens`. There is no other way into the loop.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from nmoe.config import amend as rules
from nmoe.config import file as configs
from nmoe.errors import ConfigError
from nmoe.records.attempts import Attempts, History
from nmoe.records.goodput import production
from nmoe.records.reader import Amendment
from nmoe.records.root import Root
from nmoe.tables import parsed
from nmoe.tables import read as read_text
from stages.prod.attempt import request

FIELDS = {"at_tokens": int, "key": str, "reason": str}


def amend(run_id: str, path: Path, root: Path, console: Console) -> None:
  """Record a file's amendments, all or none, and ask a live run to take them up."""
  found = production(root, run_id)
  config = configs.loads(found.run.toml, f"run {run_id}", env={})
  amendments = read(path)
  reached = found.tokens
  if found.heartbeat is not None:
    reached += max(0, found.heartbeat.entry.step - found.step) * config.schedule.batch_tokens
  margin = 2 * config.train.log_every * config.schedule.batch_tokens
  tokens = reached + (margin if found.run.live else 0)
  rules.check(config, found.amendments, amendments, tokens, str(path))
  with closing(Attempts(root)) as records:
    records.amend(run_id, amendments, found.last.number if found.last else 0)
  for one in amendments:
    console.print(
      f"run {run_id}: {one.key} = {one.value} from {one.at_tokens} tokens on ({one.reason})",
      markup=False,
      soft_wrap=True,
    )
  with closing(History(root)) as reader:
    live = reader.run(run_id).live
  if found.run.live or live:  # it may have been launched meanwhile, and not know of them
    request(Root(root).amend_request(run_id))


def read(path: Path) -> list[Amendment]:
  """The amendments of a file. ConfigError names what is wrong with one."""
  table = parsed(read_text(path, "file of amendments"), str(path))
  found = table.get("amend")
  if table.keys() != {"amend"} or not isinstance(found, list) or not found:
    raise ConfigError(f"{path}: holds {sorted(table)}; it must hold tables [[amend]] and no other")
  who, now = f"{_user()}@{socket.gethostname()}", time.time()
  return [_one(each, f"{path}: amend {n}", who, now) for n, each in enumerate(found, start=1)]


def _user() -> str:
  """Who amends: by name, or by number where a container has no name for it."""
  try:
    return getpass.getuser()
  except (KeyError, OSError):  # OSError from Python 3.13 on
    return f"user {os.getuid()}"


def _one(table: Any, where: str, who: str, now: float) -> Amendment:
  wanted = {*FIELDS, "value"}
  if not isinstance(table, dict) or table.keys() != wanted:
    has = sorted(table) if isinstance(table, dict) else repr(table)
    raise ConfigError(f"{where}: has {has}; it must have {sorted(wanted)}")
  for name, form in FIELDS.items():
    if type(table[name]) is not form or not str(table[name]).strip(" 0"):
      raise ConfigError(f"{where}: {name} = {table[name]!r} must be a {form.__name__}, not empty")
  try:
    value = json.dumps(table["value"])
  except TypeError as error:
    raise ConfigError(f"{where}: value = {table['value']} is of no key's type") from error
  return Amendment(table["at_tokens"], table["key"], value, table["reason"], who, now)
