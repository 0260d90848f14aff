"""Where the ranks of a run meet before anything is allocated: keys and values that all can read.

A rank that cannot go on says so here, so that all leave with the same error instead of waiting for
it. Under torch's elastic agent the store must be a new one after each restart
(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1): in the old one lie the keys of dead ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from nmoe import errors
from nmoe.errors import CommError, NmoeError
from nmoe.records.reader import Amendment, Branch, Run

MEET_S = 600.0  # where a launcher says nothing else


class Meeting:
  """This process among the ranks of a run. Its methods are collective.

  url: where they meet, as torch.distributed's: "file:///tmp/new", "env://"; unused with one rank.
  deadline_s: how long a rank waits for another to come; CommError then.
  """

  def __init__(
    self, url: str | None = None, rank: int = 0, ranks: int = 1, deadline_s: float = MEET_S
  ):
    self.rank, self.ranks = rank, ranks
    self.store: dist.Store | None = None
    if ranks > 1:
      with self._explained():
        store, _, _ = next(dist.rendezvous(url, rank, ranks, timeout=timedelta(seconds=deadline_s)))
      store.set_timeout(timedelta(seconds=deadline_s))
      self.store = dist.PrefixStore("meeting", store)

  @classmethod
  def of(cls, options: argparse.Namespace) -> Meeting:
    """As the command line of nmoe.train.startup.parser says it."""
    return cls(options.rendezvous, options.rank, options.ranks, options.deadline or MEET_S)

  def share(self, name: str, value: str = "") -> str:
    """Rank 0's value. It returns there once all have it: rank 0 may keep the store."""
    if self.store is None:
      return value
    if self.rank == 0:
      self.store.set(name, value)
    value = self._get([name])[0]
    self._all_did(name)
    return value

  def gather(self, name: str, value: str) -> list[str]:
    """Every rank's value, by rank."""
    if self.store is None:
      return [value]
    self.store.set(f"{name}/{self.rank}", value)
    found = self._get([f"{name}/{rank}" for rank in range(self.ranks)])
    self._all_did(name)
    return found

  def _get(self, keys: list[str]) -> list[str]:
    with self._explained():
      self.store.wait(keys)
      return [value.decode() for value in self.store.multi_get(keys)]

  @contextmanager
  def _explained(self) -> Iterator[None]:
    """A store's errors, which are RuntimeErrors, as a CommError."""
    try:
      yield
    except RuntimeError as error:
      raise CommError(
        f"rank {self.rank} of {self.ranks}: another rank did not come "
        f"({str(error).splitlines()[0]}): see its log"
      ) from error

  def _all_did(self, name: str) -> None:
    """Rank 0 goes on when every rank has read."""
    if self.rank > 0:
      self.store.set(f"{name}/read/{self.rank}", "")
    else:
      self._get([f"{name}/read/{rank}" for rank in range(1, self.ranks)])


def shared_run(meeting: Meeting, read: Callable[[], Run] | None = None) -> Run:
  """What read() finds on rank 0, on every rank: the others, who need no `read`, open no database.
  Raises its NmoeError on every rank. Collective.
  """
  failed, told = None, ""
  if meeting.rank == 0:
    try:
      told = json.dumps(asdict(read()))
    except NmoeError as error:
      failed, told = error, json.dumps({"error": type(error).__name__, "text": str(error)})
  found = json.loads(meeting.share("run", told))
  if failed is not None:
    raise failed
  if "text" in found:
    raise getattr(errors, found["error"])(found["text"])
  if found["branch"] is not None:
    found["branch"] = Branch(**found["branch"])
  amendments = tuple(Amendment(**one) for one in found.pop("amendments"))
  return Run(**found, amendments=amendments)
