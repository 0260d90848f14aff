"""Attempts of a production run: how they end, what an end means, when it is given up."""

import io

import pytest
from rich.console import Console

from nmoe.errors import FencedError, RecordError
from nmoe.records.attempts import Attempt, History, check_newest
from nmoe.records.goodput import production
from nmoe.records.root import Root
from stages.prod import launching
from stages.prod.attempt import begin, settle, stuck


def test_attempts_count_and_end(lab, records):
  run = lab.record()
  first = begin(lab.root, run, "local", nodes=["a", "b"])
  records.started(run, first, 0, "a")
  records.started(run, first, 6, "a")
  records.event(run, first, "stop", step=7)
  end = settle(lab.root, run, first)
  assert (end.outcome, end.status) == ("preempted", 75)
  second = begin(lab.root, run, "local")
  Root(lab.root).prod(run).mkdir(parents=True, exist_ok=True)
  Root(lab.root).stop_request(run).touch()
  records.event(run, second, "stop", step=9)
  end = settle(lab.root, run, second)
  assert (end.outcome, end.status) == ("stopped", 0)
  assert not Root(lab.root).stop_request(run).exists()
  third = begin(lab.root, run, "local")
  records.event(run, third, "diverged", detail={"error": "step 3: not finite"})
  end = settle(lab.root, run, third)
  assert (end.outcome, end.status, end.why) == ("diverged", 76, "step 3: not finite")
  reader = History(lab.root)
  assert [(a.number, a.outcome, a.exit) for a in reader.attempts(run)] == [
    (1, "preempted", 75),
    (2, "stopped", 0),
    (3, "diverged", 76),
  ]
  assert reader.attempts(run)[0].nodes == ["a", "b"]
  kinds = [(event.attempt, event.kind) for event in reader.events(run)]
  assert kinds[:3] == [(1, "launch"), (1, "restart"), (1, "stop")]
  reader.close()
  records.update_run(run, status="completed")
  with pytest.raises(RecordError, match="is completed"):
    begin(lab.root, run, "local")


def test_an_attempt_of_a_jobset_has_its_pods_number(lab, records):
  """A JobSet that was evicted before its first attempt began counted that restart."""
  run = lab.record()
  assert begin(lab.root, run, "jobset", number=2) == 2
  assert begin(lab.root, run, "jobset") == 3
  for before in (1, 3):
    with pytest.raises(RecordError, match=f"attempt {before} of run {run} cannot begin: attempt 3"):
      begin(lab.root, run, "jobset", number=before)
  assert [attempt.number for attempt in records.attempts(run)] == [2, 3]


def test_a_newer_attempt_fences_an_older_one(lab, records):
  """The older may write nothing, and its end is never to be queued again."""
  run = lab.record()
  first = begin(lab.root, run, "local", nodes=["a"])
  check_newest(lab.root, run, first)
  second = begin(lab.root, run, "local", nodes=["b"])
  check_newest(lab.root, run, second)
  check_newest(lab.root, run, 0)  # a run without attempts
  with pytest.raises(FencedError, match="attempt 1 .* writes no more: attempt 2 has begun on b"):
    check_newest(lab.root, run, first)
  Root(lab.root).prod(run).mkdir(parents=True, exist_ok=True)
  Root(lab.root).stop_request(run).touch()
  end = settle(lab.root, run, first)
  assert (end.outcome, end.status) == ("superseded", 76)
  assert Root(lab.root).stop_request(run).exists()  # it was meant for the newer one


def test_a_full_disk_is_queued_again(lab, records):
  run = lab.record()
  number = begin(lab.root, run, "local")
  records.event(run, number, "disk full", detail={"error": "No space left"})
  end = settle(lab.root, run, number)
  assert (end.outcome, end.status, end.why) == ("disk full", 75, "No space left")


def attempt(first: int) -> Attempt:
  return Attempt("r", 1, "local", "", [], "", 0.0, first, first, 0.0, "", 0)


@pytest.mark.parametrize(
  ("firsts", "step", "given_up"),
  [([0, 0], 0, False), ([0, 0, 0], 0, True), ([0, 0, 10], 10, False), ([0, 10, 10, 10], 10, True)],
)
def test_no_progress(firsts, step, given_up):
  """Three attempts that end where the first of them began; a newer checkpoint begins the count."""
  assert stuck([attempt(first) for first in firsts], step, 3) is given_up


@pytest.mark.faults
def test_who_was_told_to_leave_made_no_progress_by_no_fault_of_its_own(lab, records):
  """Preempted again and again while its ranks start, by its launch or on a host of a scheduler: it
  is queued again each time, and a crash among them is the first.
  """
  run = lab.record(prod__no_progress=2)
  for told in (True, False, True, False):
    number = begin(lab.root, run, "slurm")
    if not told:
      records.left(run, number)  # by the agent of its first host
      records.left(run, number)
    end = settle(lab.root, run, number, told=told)
    assert (end.outcome, end.status) == ("preempted", 75)
    assert end.why == "it was told to leave before its ranks could save"
  assert [e.kind for e in records.events(run)].count("stop") == 4
  outcomes = [settle(lab.root, run, begin(lab.root, run, "slurm")).outcome for _ in range(2)]
  assert outcomes == ["crashed", "no progress"]
  seconds = production(lab.root, run).seconds
  assert seconds["save stall"] == 0  # nothing was saved


@pytest.mark.faults
def test_attempts_that_were_told_to_leave_are_no_tries(lab, records):
  """A run that is preempted, stopped and amended for weeks may crash as often as any other."""
  run = lab.record(prod__max_attempts=2, prod__no_progress=9)
  for ask in (None, Root(lab.root).stop_request(run), Root(lab.root).amend_request(run)) * 2:
    number = begin(lab.root, run, "slurm")
    if ask is not None:
      ask.touch()
    assert settle(lab.root, run, number, told=True).outcome in ("preempted", "stopped", "amended")
  ends = [settle(lab.root, run, begin(lab.root, run, "slurm")) for _ in range(2)]
  assert [end.outcome for end in ends] == ["crashed", "no progress"]
  assert ends[1].why.startswith("2 attempts (prod.max_attempts): ")


@pytest.mark.faults
@pytest.mark.parametrize(
  ("kind", "outcome"),
  [("stop", "preempted"), ("amended", "amended"), ("disk full", "disk full"), ("crashed", "")],
)
def test_what_the_ranks_said_when_told_to_leave_stands(lab, records, kind, outcome):
  """Its agent adds nothing to an end that they recorded."""
  run = lab.record()
  number = begin(lab.root, run, "slurm")
  records.started(run, number, 0, "a")
  records.event(run, number, kind, step=3, detail={"error": "no space"})
  records.left(run, number)
  assert [e.kind for e in records.events(run)] == ["launch", kind] + ["stop"] * (not outcome)
  assert settle(lab.root, run, number, told=True).outcome == (outcome or "preempted")


def test_a_stop_is_heard_while_ranks_fail(lab, records):
  """The request would go with the next attempt's begin."""
  run = lab.record()
  number = begin(lab.root, run, "local")
  records.update_run(run, status="failed", error="planted")
  launching.stop(run, lab.root, Console(file=io.StringIO()))
  end = settle(lab.root, run, number)
  assert (end.outcome, end.status) == ("stopped", 0) and "planted" in end.why
