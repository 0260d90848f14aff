"""SIGSTOP of a rank, whatever it is doing: no thread of a stopped process tells anything, so the
others must miss it, at a deadline that its user knows.
"""

import os
import random
import signal
import time

import pytest
from labs import same_bits
from productions import Production, kinds, ranks_of, state_of, undisturbed, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.kills]
OFTEN = """
[train]
checkpoint_every = 5
[launch]
ranks = {ranks}
hang_s = 8.0
[prod]
max_restarts = 9
[schedule]
batch_tokens = {batch}
total_tokens = {tokens}
warmup_tokens = {batch}
"""
HANG_S = 8.0
AGAIN_S = 15.0  # from there to training again
MISSED_S = 10.0  # after its own deadline, which it cannot hear, its agent ends a rank


def often(ranks: int, steps: int) -> str:
  """A run that saves every 5 steps."""
  return OFTEN.format(ranks=ranks, batch=512 * ranks, tokens=512 * ranks * steps)


def restarts(production: Production) -> int:
  return kinds(production.events()).count("restart")


def test_in_the_middle_of_a_save(tmp_path):
  """All wait for its part. Saves of this run take a second: launch.hang_s is the deadline."""
  told = tmp_path / "stop"
  production = Production(tmp_path, often(2, 300), FAULT=f"stop: {told}")
  production.wait_for(20)
  told.touch()
  wait_until(lambda: not told.exists(), 10, "a save")
  wait_until(lambda: restarts(production) == 1, 5 + HANG_S + AGAIN_S, "trains again")
  assert production.events()[-1].detail["suspect"] == 1
  code, out = production.end()
  assert code == 0, out
  (tmp_path / "undisturbed").mkdir()
  wanted = undisturbed(tmp_path / "undisturbed", train__checkpoint_every=5)
  assert same_bits(production.state(), wanted)


def test_four_ranks_at_any_moment(tmp_path):
  """One is stopped while it steps, saves or waits for others, as it happens to."""
  steps, chance = 150, random.Random(5)
  production = Production(tmp_path, often(4, steps))
  for count in (1, 2, 3):
    production.wait_for(40 * count - 10 + chance.randrange(10))
    time.sleep(chance.random())
    os.kill(chance.choice(ranks_of(production.run_id())), signal.SIGSTOP)
    wait_until(lambda n=count: restarts(production) == n, HANG_S + AGAIN_S, "trains again")
  code, out = production.end()
  assert code == 0, out
  (tmp_path / "undisturbed").mkdir()
  keys = {"launch__ranks": 4, "schedule__batch_tokens": 2048, "train__checkpoint_every": 5}
  keys |= {"schedule__total_tokens": steps * 2048, "schedule__warmup_tokens": 2048}
  wanted = undisturbed(tmp_path / "undisturbed", steps, **keys)
  assert same_bits(state_of(production.root, production.run_id(), steps), wanted)


def test_the_only_rank(tmp_path):
  """Nobody waits for it, and its own deadline is stopped with it: its agent misses its sign."""
  production = Production(tmp_path, often(1, 150))
  production.wait_for(40)
  os.kill(production.rank(0), signal.SIGSTOP)
  again_s = HANG_S + MISSED_S + AGAIN_S
  wait_until(lambda: restarts(production) == 1, again_s, "trains again")
  assert production.events()[-1].detail["suspect"] == 0
  code, out = production.end()
  assert code == 0, out
  (tmp_path / "undisturbed").mkdir()
  keys = {"launch__ranks": 1, "schedule__batch_tokens": 512, "train__checkpoint_every": 5}
  keys |= {"schedule__total_tokens": 150 * 512, "schedule__warmup_tokens": 512}
  wanted = undisturbed(tmp_path / "undisturbed", 150, **keys)
  assert same_bits(state_of(production.root, production.run_id(), 150), wanted)
