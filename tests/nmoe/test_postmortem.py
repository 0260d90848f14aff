"""Post-mortems: real stacks of real processes; who is the suspect; who becomes a straggler."""

import json
import subprocess
import sys

import pytest

from nmoe.records.postmortem import LastWords, ask, asked, last_words, suspect, write
from nmoe.records.root import Root
from nmoe.train.stragglers import LOGS, TOLD, Stragglers, tags

HANG = """
import faulthandler, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("rank 1 of 2 on a", file=__import__("sys").stderr)
faulthandler.dump_traceback_later(0.3, exit=True, file=2)
def the_line_that_hangs(): threading.Event().wait()
the_line_that_hangs()
"""
FAIL = """
import sys
print("rank 0 of 2 on a", file=sys.stderr)
def inner(): raise ValueError("planted")
inner()
"""


def stderr_of(code: str) -> str:
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_last_words_of_real_processes():
  hung, failed = last_words(stderr_of(HANG)), last_words(stderr_of(FAIL))
  assert (hung.rank, hung.host) == (1, "a") and failed.rank == 0
  names = [frame.rpartition(" ")[2] for frame in hung.stack]
  assert names[0] == "wait" and names[-2:] == ["the_line_that_hangs", "<module>"]
  assert [frame.rpartition(" ")[2] for frame in failed.stack] == ["inner", "<module>"]
  assert failed.log[-1] == "ValueError: planted"
  assert last_words("rank 3 of 4 on b\nstep 7\n") == LastWords(
    3, "b", (), ("rank 3 of 4 on b", "step 7")
  )


def words(rank: int, *stack: str) -> LastWords:
  return LastWords(rank, "a", stack, ())


WAITS = ("/lib/torch/distributed/c10d.py:9 all_reduce", "loop.py:3 train")


@pytest.mark.parametrize(
  ("ranks", "rank"),
  [
    ([words(0, *WAITS), words(1, "x.py:1 sleep")], 1),  # one waits for the other
    ([words(0, *WAITS), words(1)], 1),  # killed
    ([LastWords(0, "a", (), ("step 7", "error: a collective failed")), words(1)], 1),
    ([words(0, *WAITS), words(1, "x.py:1 f", "nmoe/distributed/rdep.py:2 wait")], 1),
    ([words(0, *WAITS), words(1, *WAITS)], -1),
    ([words(0, *WAITS), words(1, "/lib/torch/distributed/c10d.py:5 recv"), words(2, *WAITS)], 1),
    ([words(0), words(1)], -1),
    ([words(0, "x.py:1 f")], 0),  # there is no other
    ([words(0)], 0),
    ([], -1),
  ],
)
def test_the_suspect(ranks, rank):
  assert suspect(ranks)[0] == rank


def test_the_file_is_of_the_ranks_before_a_restart(tmp_path):
  logs = Root(tmp_path).logs("r") / "attempt_2" / "r-2_abc"
  for restart in (0, 1):
    for rank in (0, 1):
      folder = logs / f"attempt_{restart}" / str(rank)
      folder.mkdir(parents=True)
      said = f"rank {rank} of 2 on a\n"
      if restart == 0:
        said = stderr_of(HANG) if rank else said + "Traceback (most recent call last):\n"
        said += (
          "" if rank else '  File "/lib/torch/distributed/c10d.py", line 9, in recv\nCommError\n'
        )
      (folder / "stderr.log").write_text(said)
  (Root(tmp_path).logs("r") / "agent.txt").write_text(
    "E1127 of torch\nlocal rank 1, pid 77: exit status 1\n"
  )
  path, found = write(tmp_path, "r", 2, before=1)
  assert path == Root(tmp_path).prod("r") / "attempt_2" / "post_mortem_0.json"
  assert found.suspect == 1 and found.exits == ((1, 1, 77),)
  told = json.loads(path.read_text())
  assert [one["rank"] for one in told["ranks"]] == [0, 1] and "the_line_that" in str(
    told["ranks"][1]
  )
  assert write(tmp_path, "r", 2)[1].suspect == -1  # of the newest ranks, which said nothing
  assert write(tmp_path, "r", 1) is None


@pytest.mark.faults
@pytest.mark.parametrize(
  "left", ["", "\0" * 40, '{"attempt": 2}', "[]"], ids=("empty", "zeros", "cut", "other")
)
def test_a_request_that_a_loss_of_power_left(tmp_path, left):
  """Nobody asks then; the agent that looks twice a second lives."""
  ask(tmp_path, "r", 2, 40)
  assert asked(tmp_path, "r") == (2, 40)
  Root(tmp_path).look_request("r").write_text(left)
  assert asked(tmp_path, "r") == (0, 0)


def test_stragglers():
  """Slower than it was, five logs in a row, while most are not; once."""
  known = Stragglers(3)
  normal = [1.0, 1.3, 1.0]  # slow from the start: the preflight's business
  assert [known.add(normal) for _ in range(LOGS)] == [[]] * LOGS
  found = [known.add([1.0, 1.3, 1.2]) for _ in range(LOGS + 2)]
  assert found == [[]] * (LOGS - 1) + [[2]] + [[]] * 2
  assert known.add([1.0, 1.3, 1.0]) == []
  assert all(known.add([2.0, 2.6, 2.0]) == [] for _ in range(9))  # all at once: no straggler
  glitch = Stragglers(4)  # one log of 0.8 ms among 3.9, as four H100s had it
  for n in range(20):
    assert glitch.add([3.9, 3.9, 0.8 if n == 2 else 3.9, 3.9]) == []
  short = Stragglers(2)
  assert all(short.add([1.0, 1.2 if n % 4 else 1.0]) == [] for n in range(20))


def test_tags_of_all_ranks():
  told = [[0.0] * len(TOLD), [0.0] * len(TOLD)]
  told[0][1], told[1][1], told[1][5] = 2.0, 3.0, 4.0
  told[1][TOLD.index("rdep/rows")] = 70.0
  assert tags(told) == {
    "rank/0/forward_s": 2.0,
    "rank/1/forward_s": 3.0,
    "rank/0/step_s": 0.0,
    "rank/1/step_s": 4.0,
    "rank/0/rows": 0.0,
    "rank/1/rows": 70.0,
  }
