"""Work beside work: streams of a GPU. Without a stream (None, on the cpu) all is done in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
  """Work inside comes after all so far, and beside what follows, until `join`."""
  if stream is None:
    yield
    return
  stream.wait_stream(torch.cuda.current_stream(stream.device))
  with torch.cuda.stream(stream):
    yield


def join(stream: torch.cuda.Stream | None) -> None:
  """What follows comes after the stream's work so far."""
  if stream is not None:
    torch.cuda.current_stream(stream.device).wait_stream(stream)
