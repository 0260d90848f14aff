"""Counts, signals and overflow of two ranks' blocks on one GPU.

A missed deadline: tests/gpu/test_rdep.py.
"""

import pytest
import torch

from gpu.test_exchange import RANKS, E, movers
from kernels.buffers import COUNTS, DISPATCH, RETURN
from kernels.cuda.signals import compile_signal

pytestmark = pytest.mark.gpu


def test_counts_and_signals_reach_every_rank() -> None:
  exchanges = movers(8, "bf16")
  counts = torch.randint(100, (RANKS, E), device="cuda", dtype=torch.int32)
  for mover, count_E in zip(exchanges, counts, strict=True):
    mover.post_counts(3, count_E)
  for mover in exchanges:
    assert torch.equal(mover.mine.count_RE, counts)
    assert mover.mine.signal_KRS[COUNTS, :, 0].tolist() == [3] * RANKS
    assert not mover.mine.signal_KRS[DISPATCH:].any()
    assert mover.wait(COUNTS, 3) == []
  torch.cuda.synchronize()
  assert all(mover.late() is None for mover in exchanges)


def test_a_wait_ends_when_the_last_signal_comes() -> None:
  first, second = movers(8, "bf16")
  compile_signal()(first.table, first.higher, RETURN, 0, 7)
  seen = torch.zeros(1, device="cuda")
  waiting = torch.cuda.Stream()
  torch.cuda.synchronize()
  with torch.cuda.stream(waiting):
    first.wait(RETURN, 7)
    seen.fill_(1.0)
  assert not waiting.query()  # rank 1 has not signalled
  compile_signal()(second.table, second.higher, RETURN, 1, 7)
  waiting.synchronize()
  assert seen.item() == 1.0
  assert first.mine.signal_KRS[RETURN, :, 0].tolist() == [7, 7]


@pytest.mark.parametrize("replayed", [False, True])
def test_overflow_is_known_before_what_is_queued_behind_the_mark(replayed: bool) -> None:
  mover, _ = movers(8, "bf16")
  stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

  def passes() -> None:
    torch.cuda._sleep(100_000_000)  # cycles
    mover.places(1)
    mover.mark()
    torch.cuda._sleep(200_000_000)

  with torch.cuda.stream(stream):
    passes()  # compiles
    if replayed:
      with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        passes()
    stream.synchronize()
    for full in (False, True, False, True):
      mover.mine.count_RE.fill_(100 * full)
      if replayed:
        graph.replay()
      else:
        passes()
      assert mover.overflowed() == full
      assert not stream.query()
    mover.mine.count_RE.fill_(100)
    mover.places(1)
    assert mover.overflowed()  # unmarked
    assert stream.query()
