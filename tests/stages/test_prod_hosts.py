"""Hosts of a production run: how they are reached, what is alike, whether they are fit."""

import io
import subprocess
from contextlib import closing
from types import SimpleNamespace

import pytest
from labs import write_variant
from rich.console import Console

from nmoe.config import file as configs
from nmoe.distributed.hosts import differences
from nmoe.errors import RunError
from nmoe.records.reader import Reader
from stages.prod import hosts, preflight
from stages.prod.evidence import evidence


def test_a_host_is_reached_by_its_end_of_the_way_to_the_head():
  assert hosts.address("") == hosts.address("127.0.0.1:29400") == "127.0.0.1"
  with pytest.raises(RunError, match="the first host cannot be reached"):
    hosts.address("no-such-host.invalid:29400")


def test_the_head_compiles_before_its_agent_starts(lab, monkeypatch, tmp_path):
  """The others need no stamp to wait for: no rank starts anywhere before the head's agent is up."""
  done, order = tmp_path / "compiled", []

  def compile_beside(*_):
    order.append("begun")
    return [subprocess.Popen(["sh", "-c", f"sleep 0.3; touch {done}"])]

  monkeypatch.setattr(hosts.local, "compile_beside", compile_beside)
  monkeypatch.setattr(hosts.os, "execve", lambda *_: order.append(done.exists()))
  run = lab.record()
  hosts.node(run, lab.root, 1, "127.0.0.1:29400", 0)
  hosts.node(run, lab.root, 1, "127.0.0.1:29400", 1)
  assert order == ["begun", True, True]


def test_hosts_that_differ_are_named():
  same = {"host": "a", "torch": "2.13.0", "processor": "H100"}
  assert differences([same, same | {"host": "b"}]) == []
  told = [same, same, same | {"host": "c", "torch": "2.12.0"}]
  (line,) = differences(told)
  assert line.startswith("c (rank 2) has torch 2.12.0, most have 2.13.0: use hosts of one kind")


def said(rank: int, **other):
  """What a healthy rank of a preflight says."""
  same = {"host": f"n{rank}", "processor": "NVIDIA H100", "tflops": 700.0, "bits": "abc"}
  return (
    same
    | {
      "rank": rank,
      "steady": True,
      "locks": True,
      "free_bytes": 5e9,
      "sum_gb_s": 1.0,
      "write_gb_s": 1.0,
    }
    | other
  )


@pytest.mark.parametrize(
  ("other", "fault"),
  [
    ({}, ""),
    ({"bits": "abd"}, "rank 2 on n2 computes other bits; take it out"),
    ({"steady": False}, "rank 2 on n2 computes other bits; take it out"),
    ({"tflops": 610.0}, "slower: rank 2 on n2 610"),
    ({"locks": False}, "rank 2 on n2 took a lock that rank 0 held"),
    ({"free_bytes": 1e9}, "checkpoints take 4.0 GB; free space"),
  ],
)
def test_a_preflight_names_the_rank(other, fault):
  told = [said(0), said(1), said(2, **other), said(3)]
  faults = [one.fault for one in preflight.judged(told, 4e9) if one.fault]
  assert bool(faults) == bool(fault) and all(one.startswith(fault) for one in faults)


def test_a_preflight_of_two_ranks(lab):
  """Real ranks, recorded as a check that the gate accepts."""
  file = write_variant(lab.file, "two", "[launch]\nranks = 2\n[schedule]\nbatch_tokens = 1024\n")
  findings = preflight.check(file, Console(file=io.StringIO()))
  assert [one.fault for one in findings] == [""] * 6
  with closing(Reader(lab.root)) as reader:
    check = reader.list()[0]
    (run,) = reader.runs(check.id)
    assert (check.stage, check.verdict) == ("check", "confirmed")
    assert [one["rank"] for one in run.results["ranks"]] == [0, 1]
    found = evidence(configs.load(file, env={}), file, reader, run.code_version)
  assert {one.what: one.lack for one in found}["prod-check"] == ""


@pytest.mark.parametrize("leaves", [True, False])
def test_a_check_ends_when_its_job_is_gone(lab, monkeypatch, leaves):
  """Not with the ranks' outcome, while agents are still there; or after LEAVE_S."""
  run, asked = lab.record(), []
  lab.records.update_run(run, status="completed")

  def job(*_):
    asked.append(0)
    return "" if leaves and len(asked) == 3 else "Slurm's job 17"

  monkeypatch.setattr(hosts, "generate", lambda *_, **__: None)
  monkeypatch.setattr(hosts, "submit", lambda *_: None)
  monkeypatch.setattr(hosts, "job_of", job)
  monkeypatch.setattr(preflight, "POLL_S", 0.01)
  monkeypatch.setattr(preflight, "LEAVE_S", 60.0 if leaves else 0.1)
  bench = SimpleNamespace(root=lab.root, console=None, experiments=lab.records)
  assert preflight.elsewhere(lab.config, run, bench, lambda: None).id == run
  assert len(asked) == 3 if leaves else len(asked) > 3
