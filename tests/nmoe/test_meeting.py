"""Ranks that meet: rank 0's values, everybody's, and an error that all leave with."""

from pathlib import Path

import pytest
import ranks
import torch.distributed as dist

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.distributed import hosts, meeting
from nmoe.distributed.hosts import select_alike
from nmoe.distributed.meeting import Meeting, shared_run
from nmoe.errors import RecordError, TargetError

MOONLET = Path(__file__).parents[2] / "configs" / "moonlet" / "cpu.toml"


def meet(group, url: str) -> tuple[str, list[str]]:
  rank = group.rank()
  dist.destroy_process_group()
  here = Meeting(url, rank, 2)
  return here.share("name", f"of {rank}"), here.gather("all", f"from {rank}")


def test_values_travel(tmp_path):
  assert ranks.run(meet, 2, f"file://{tmp_path}/meet") == [("of 0", ["from 0", "from 1"])] * 2
  alone = Meeting()
  assert (alone.share("name", "x"), alone.gather("all", "y")) == ("x", ["y"])


def fail_to_read(group, url: str) -> str:
  rank = group.rank()
  dist.destroy_process_group()

  def read():
    raise RecordError("it belongs to another")

  with pytest.raises(RecordError) as caught:
    shared_run(Meeting(url, rank, 2), read if rank == 0 else None)
  return str(caught.value)


def test_what_rank_0_cannot_read_ends_all(tmp_path):
  assert ranks.run(fail_to_read, 2, f"file://{tmp_path}/meet") == ["it belongs to another"] * 2


def differ(group, url: str, key: str) -> str:
  """Rank 1's host says another value of `key`, or finds no target at all ("error")."""
  rank, facts = group.rank(), hosts.facts
  dist.destroy_process_group()
  if rank == 1 and key == "error":
    hosts.select = refuse
  elif rank == 1:
    hosts.facts = lambda *of: facts(*of) | {"host": "n1", key: "another"}
  config = changed(configs.load(MOONLET, env={}), {"launch.ranks": 2, "train.micro_batch": 8})
  with pytest.raises(TargetError) as caught:
    select_alike(config, Meeting(url, rank, 2))
  return str(caught.value)


def refuse(*_):
  raise TargetError("found no GPU")


@pytest.mark.parametrize("key", ["processor", "torch", "GPUs", "threads", "ranks"])
def test_hosts_that_differ_end_all_ranks(tmp_path, key):
  first, second = ranks.run(differ, 2, f"file://{tmp_path}/meet", key)
  assert first == second and f" has {key} another, most have " in first and "n1 (rank 1)" in first


def test_a_host_without_the_target_ends_all_ranks(tmp_path):
  first, second = ranks.run(differ, 2, f"file://{tmp_path}/meet", "error")
  assert first == second and "found no GPU" in first


def come_alone(group, url: str) -> str:
  rank = group.rank()
  dist.destroy_process_group()
  if rank == 1:
    return ""
  with pytest.raises(meeting.CommError) as caught:
    Meeting(url, 0, 2, 1.0).gather("all", "x")
  return str(caught.value)


def test_a_rank_that_does_not_come_is_missed(tmp_path):
  assert "another rank did not come" in ranks.run(come_alone, 2, f"file://{tmp_path}/meet")[0]
