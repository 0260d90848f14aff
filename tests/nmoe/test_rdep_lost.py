"""RDEP: a rank that dies, is late or has too many tokens is an error that names it."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import ranks
import torch
from rdep_cases import CASES, Case, Data, E, K, config, deviation, make, oracle, share, step

import kernels.reference as ops
from kernels.buffers import COUNTS, DISPATCH, RETURN
from kernels.reference import exchange, symmetric
from nmoe.distributed.rdep import Rdep
from nmoe.errors import CommError

DEADLINE_S = 1.0


class Dying(exchange.Exchange):
  """Kills its process in the given trip's call of one method, before its signal is given."""

  method, trip = "", 0

  def _signal(self, kind: int, trip: int) -> None:
    kinds = {COUNTS: "post_counts", DISPATCH: "send", RETURN: "reply"}
    if (self.method, self.trip) == (kinds[kind], trip):
      os.kill(os.getpid(), signal.SIGKILL)
    super()._signal(kind, trip)


def dying(group, victim: int, method: str, trip: int) -> None:
  """Three steps, of which each has two trips; the victim dies in one of them."""
  case = CASES["uniform"]
  settings = config(group.size(), case, **{"rdep.deadline_s": DEADLINE_S})
  rdep = Rdep(settings, ops, group, symmetric)
  if group.rank() == victim:
    Dying.method, Dying.trip = method, trip
    rdep.exchange = Dying(rdep.heap.peers, rdep.rank, DEADLINE_S)
  for i in range(3):
    data = share(case, make(case, i), group.rank(), group.size())
    begun = time.monotonic()
    try:
      step(rdep, data, layer=7)
    except CommError as error:
      waited = time.monotonic() - begun
      whole = nothing_half_written(make(case, i), data, group.rank())
      raise CommError(f"{error} | waited {waited:.3f} whole {whole} iteration {i}") from error


def nothing_half_written(everything: Data, mine: Data, rank: int) -> bool:
  """No gradient of a token; of the experts none, or the gradient of all ranks' tokens."""
  if mine.x_TD.grad is not None or mine.gate_TK.grad is not None:
    return False
  if mine.w13.grad is None:
    return mine.w2.grad is None
  exact = oracle(everything)
  held = slice(rank * E // 4, (rank + 1) * E // 4)
  return all(
    deviation(found.grad.numpy(), want[held]) < 2e-6
    for found, want in ((mine.w13, exact.dw13), (mine.w2, exact.dw2))
  )


@pytest.mark.parametrize(
  ("method", "trip", "what", "phase"),
  [
    ("post_counts", 3, "counts", "forward"),
    ("send", 3, "rows", "forward"),
    ("reply", 3, "returned rows", "forward"),
    ("send", 4, "rows", "backward"),
    ("reply", 4, "returned rows", "backward"),
  ],
)
def test_a_killed_rank_stops_the_others(method: str, trip: int, what: str, phase: str) -> None:
  num_ranks, victim = 4, 2
  found = ranks.outcomes(dying, num_ranks, victim, method, trip, timeout_s=20)
  assert found[victim].exitcode == -signal.SIGKILL
  case = CASES["uniform"]
  data = make(case, 1)  # the second iteration, where trips 3 and 4 are
  for rank, outcome in enumerate(found):
    if rank == victim:
      continue
    assert outcome.exitcode == 1
    message = outcome.error.strip().splitlines()[-1]
    assert (
      f"CommError: rank {rank} of 4, layer 7, {phase}, round 0: {what} of rank 2 did" in message
    )
    waited = float(message.split("waited ")[1].split()[0])
    assert DEADLINE_S <= waited < DEADLINE_S + 3  # the cores may be shared
    assert "whole True iteration 1" in message
    if what == "counts":
      assert "the number of rows was not yet known" in message
    else:
      total, missing = expected_rows(case, data, rank, victim, what)
      expected = (
        f"of {total} rows expected {total - missing} arrived; missing {missing} from rank 2"
      )
      if not missing:
        expected = "no rows were expected of it, but its signal that it had sent all"
      assert expected in message


@pytest.mark.faults
def test_a_late_rank_of_which_no_rows_were_expected() -> None:
  """Its signal is what is missing: no sum of nothing."""
  trip = SimpleNamespace(number=5, counts=lambda: [], round=0, layer=7, phase="forward")
  rank = SimpleNamespace(
    trips=SimpleNamespace(of=lambda _: trip),
    rank=0,
    names=[0, 1, 2, 3],
    config=SimpleNamespace(launch=SimpleNamespace(ranks=4), rdep=SimpleNamespace(deadline_s=30)),
    _expected=lambda *_: [128, 128, 128, 0],
  )
  counts = Rdep.post_mortem(rank, COUNTS, 5, [3])
  assert "the number of rows was not yet known" in counts, "these are of the layer's pass before"
  message = Rdep.post_mortem(rank, DISPATCH, 5, [3])
  assert "rows of rank 3 did not come within 30 s (no rows were expected of it, but" in message
  rank._expected = lambda *_: [128, 128, 0, 128]
  assert "of 384 rows expected 256 arrived; missing 128 from rank 3" in Rdep.post_mortem(
    rank, DISPATCH, 5, [3]
  )


def expected_rows(case: Case, data: Data, rank: int, victim: int, what: str) -> tuple[int, int]:
  """(rows in all, rows of the victim) that a rank of 4 awaits, from the routing itself."""
  source_T = torch.repeat_interleave(torch.arange(4), torch.tensor(case.tokens))
  owner_TK = data.expert_TK.long() // (E // 4)
  if what == "rows":
    mine = source_T[:, None].expand(-1, K)[owner_TK == rank]
  else:
    mine = owner_TK[source_T == rank].flatten()
  return len(mine), int((mine == victim).sum())


def too_many(group) -> str:
  case = Case("uniform", tokens=(41, 1, 1, 1))
  rdep = Rdep(config(group.size(), case), ops, group, symmetric)
  if group.rank() > 0:
    return ""
  with pytest.raises(CommError) as caught:
    step(rdep, share(case, make(case, 0), 0, 4), layer=1)
  return str(caught.value)


def test_more_tokens_than_the_buffers_hold() -> None:
  message = ranks.run(too_many, 4)[0]
  assert "41 tokens of 2 experts do not fit the 80 rows" in message
  assert "train.micro_batch" in message
