"""The trips that one rank makes with the others (kernels.exchange), one after the other, by number,
and what a post-mortem tells of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

TOLD = 2**10  # the last trips, of which a post-mortem can tell, beside all of a replay


def unknown() -> None:
  """The counts of a trip that no rank has sent yet."""


class Trip(NamedTuple):
  """What the post-mortem of a handshake says about it."""

  number: int
  layer: int
  phase: str
  round: int
  counts: Callable[[], list | None]  # [R, E] on the host, once they are there


class Trips:
  """The trips so far. `done` is the last one whose replies have all come."""

  def __init__(self) -> None:
    self._told: deque[Trip] = deque([Trip(0, 0, "start", 0, unknown)], maxlen=TOLD)
    self.done = 0

  @property
  def last(self) -> int:
    return self._told[-1].number

  def begin(
    self, layer: int, phase: str, round: int = 0, counts: Callable[[], list | None] = unknown
  ) -> int:
    """Begin the next trip and return its number, for the exchange. The one before must be over.

    Collective. Round 0 is the first; the rest is for the post-mortem.
    """
    assert self.done == self.last, "RDEP: a backward pass was left unfinished; use Tensor.backward"
    self._told.append(Trip(self.last + 1, layer, phase, round, counts))
    return self.last

  def know(self, counts: Callable[[], list | None]) -> None:
    """The counts of the trip under way."""
    self._told[-1] = self._told[-1]._replace(counts=counts)

  def of(self, number: int) -> Trip:
    return next(trip for trip in reversed(self._told) if trip.number == number)

  @contextmanager
  def aside(self) -> Iterator[list[Trip]]:
    """What begins and ends inside does not count; it is in the list, once inside is left."""
    before, done, found = self._told, self.done, []
    self._told = deque(before)
    yield found
    found += [trip for trip in self._told if trip.number > done]
    self._told, self.done = before, done

  def repeat(self, trips: Sequence[Trip], higher: int) -> None:
    """Trips of `aside` begin, all at once, with numbers so much higher."""
    most = TOLD + len(trips)
    if self._told.maxlen < most:
      self._told = deque(self._told, most)
    self._told.extend(trip._replace(number=trip.number + higher) for trip in trips)
