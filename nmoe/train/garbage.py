"""Python's collector of reference cycles, which otherwise comes when it likes and stops the host.

With what training imports a full collection visits 275,000 objects, which takes 0.2 s and more;
young ones come with every few hundred objects of a graph, which backward frees without them: a step
leaves no cycles, a checkpoint does. Of several ranks each one's collection stops all.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def by_hand() -> Iterator[None]:
  """After `settle` inside, nothing is collected but by gc.collect(). It ends as it began."""
  was = gc.isenabled()
  try:
    yield
  finally:
    gc.unfreeze()
    if was:
      gc.enable()


def settle() -> None:
  """What there is now lives as long as the run, and no later collection visits it: nor what is
  garbage already, 40 objects in a run on a CPU, for which a full one would take its 0.2 s.
  """
  gc.freeze()
  gc.disable()
