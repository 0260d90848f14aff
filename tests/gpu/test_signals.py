"""Counts and signals between two ranks' blocks on one GPU.

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
