"""What a host's GPUs say: nvidia-smi's and the kernel log's text, as tables; no answer is one too.
The texts have the form of driver 580's; no GPU was asked."""

import argparse
import json
import time
from pathlib import Path

import pytest

from nmoe.machine import gpus
from nmoe.records import postmortem
from nmoe.records.root import Root
from stages.launch.agent import Looks

SMI = """\
0, GPU-5d1f2a4c-8f0e-7a31-0c64-2b9d2f6a1e10, NVIDIA H100 80GB HBM3, 00000000:19:00.0, 1980, 1980, \
2619, 0x0000000000000001, 34, 118.42, 700.00, 0, 0, 0
1, GPU-0a7c9be1-6d42-5f3b-9b1c-77e0c1d2a3b4, NVIDIA H100 80GB HBM3, 00000000:3B:00.0, 1125, 1980, \
2619, 0x0000000000000068, 88, 512.07, 700.00, 100, 3, 1
2, GPU-6e5d4c3b-2a19-4807-b6f5-e4d3c2b1a090, NVIDIA H100 80GB HBM3, 00000000:4C:00.0, [N/A], \
[N/A], [N/A], [N/A], [N/A], [Unknown Error], [N/A], [N/A], [N/A], [N/A]
Unable to determine the device handle for GPU3: 0000:5D:00.0: GPU is lost. Reboot the system.
"""
KERNEL = """\
[    0.000000] Linux version 6.8.0-45-generic (buildd@lcy02) #45-Ubuntu SMP
[  100.250000] NVRM: Xid (PCI:0000:3b:00): 63, pid='<unknown>', name=<unknown>, Row Remapper: OK
[ 5010.123456] NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off\
 the bus.
[ 5010.123460] NVRM: GPU 0000:5d:00.0: GPU has fallen off the bus.
[ 5011.500000] nvidia-nvswitch3: SXid (PCI:0000:86:00.0): 20034, Fatal, Link 30 LTSSM Fault Up
[ 5012.000001] NVRM: Xid (PCI:0000:3b:00): 94, pid=4242, name=python3, Contained: CE User Channel
[ 5012.000002] NVRM: Xid without a place
"""


def program(folder: Path, name: str, body: str) -> None:
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f"#!/bin/sh\n{body}\n")
  path.chmod(0o755)


def answers(folder: Path, monkeypatch, smi: str = SMI, kernel: str = KERNEL, status: int = 0):
  """Programs in place of nvidia-smi and dmesg, which say these texts."""
  for name, text in (("nvidia-smi", smi), ("dmesg", kernel)):
    program(folder, name, f"cat <<'END'\n{text}END\nexit {status}")
  monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
  monkeypatch.setattr(gpus, "_uptime_s", lambda: 5020.0)


def test_what_nvidia_smi_says():
  found, odd = gpus.gpus(SMI)
  assert [gpu["index"] for gpu in found] == [0, 1, 2]
  assert found[0]["held_by"] == ["idle"] and found[0]["sm_mhz"] == 1980
  hot = found[1]
  assert hot["held_by"] == [
    "hardware slowdown",
    "thermal slowdown by software",
    "thermal slowdown by hardware",
  ]
  assert (hot["sm_mhz"], hot["sm_max_mhz"], hot["celsius"], hot["watts"]) == (
    1125,
    1980,
    88,
    512.07,
  )
  assert (hot["ecc_corrected"], hot["ecc_uncorrected"], hot["bus"]) == (3, 1, "00000000:3B:00.0")
  assert found[2]["name"] == "NVIDIA H100 80GB HBM3"
  assert {found[2][key] for key in ("sm_mhz", "held_by", "celsius", "watts")} == {None}
  assert len(odd) == 1 and "GPU is lost" in odd[0]
  assert gpus.gpus("No devices were found\n") == ([], ["nvidia-smi: No devices were found"])


def test_what_the_kernels_log_says():
  """Of the last WINDOW_S: what lies before is of something else."""
  found = gpus.xids(KERNEL, 5020.0)
  assert [(one.bus, one.code) for one in found] == [
    ("0000:5d:00", 79),
    ("0000:86:00.0", 20034),
    ("0000:3b:00", 94),
  ]
  assert found[0].age_s == 9.9 and found[0].text.endswith("GPU has fallen off the bus.")
  assert gpus.xids(KERNEL, 100.25 + gpus.WINDOW_S)[0].code == 63
  assert gpus.xids(KERNEL, 5013.0 + gpus.WINDOW_S) == []


def test_a_look(tmp_path, monkeypatch):
  answers(tmp_path / "bin", monkeypatch)
  found = gpus.look()
  assert len(found.gpus) == 3 and len(found.xids) == 3 and len(found.lacking) == 1


def test_what_fails_is_named_and_ends_nothing(tmp_path, monkeypatch):
  """Programs that fail, are not there, or never answer; a disk that takes no file."""
  folder = tmp_path / "bin"
  answers(folder, monkeypatch, status=15)
  found = gpus.look()
  assert len(found.gpus) == 3 and any("exit status 15" in why for why in found.lacking)
  program(folder, "nvidia-smi", "exec sleep 60")
  program(
    folder, "dmesg", "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1"
  )
  monkeypatch.setattr(gpus, "LIMIT_S", 0.3)
  begun = time.monotonic()
  found = gpus.look()
  assert time.monotonic() - begun < 5 and found.gpus == [] and found.xids == []
  assert found.lacking == [
    "nvidia-smi: no answer within 0.3 s",
    "dmesg: exit status 1: dmesg: read kernel buffer failed: Operation not permitted",
  ]
  monkeypatch.setenv("PATH", str(tmp_path))
  assert gpus.look().lacking[0] == "nvidia-smi: No such file or directory"
  (tmp_path / "file").touch()
  gpus.write(tmp_path / "file" / "gpus.json")  # no folder can be made there


def looks(root: Path, arch: str) -> Looks:
  return Looks(argparse.Namespace(root=root, run="r", attempt=2), arch)


def test_a_slow_rank_has_all_hosts_look_once(tmp_path, monkeypatch):
  answers(tmp_path / "bin", monkeypatch)
  here, pattern = looks(tmp_path, "sm_90a"), ""
  here.when_asked()
  assert not here.done
  pattern = postmortem.ask(tmp_path, "r", 2, 40)
  for _ in range(3):
    here.when_asked()
  assert len(here.done) == 1
  path = next(iter(here.done))
  assert path.match(pattern.rpartition("/")[2]) and path.parent == Path(pattern).parent
  deadline = time.monotonic() + 20
  while not path.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert json.loads(path.read_text())["gpus"][1]["celsius"] == 88
  postmortem.ask(tmp_path, "r", 1, 50)  # of an attempt that is over
  here.when_asked()
  assert len(here.done) == 1
  alone = looks(tmp_path, "cpu")
  postmortem.ask(tmp_path, "r", 2, 60)
  alone.when_asked()
  assert not alone.done and alone.begin(tmp_path / "x") is None


@pytest.mark.parametrize("arch", ["sm_90a", "cpu"])
def test_a_post_mortem_holds_what_the_gpus_said(arch, tmp_path, monkeypatch):
  answers(tmp_path / "bin", monkeypatch)
  restart = Root(tmp_path).logs("r") / "attempt_2" / "r-2_abc" / "attempt_0"
  for rank in (0, 1):
    (restart / str(rank)).mkdir(parents=True)
    (restart / str(rank) / "stderr.log").write_text(
      f"rank {rank} of 2 on a\nerror: late\n"[: 24 - rank]
    )
  thread = looks(tmp_path, arch).begin(restart / postmortem.GPUS)
  if thread is not None:
    thread.join(20)
  found = json.loads(postmortem.write(tmp_path, "r", 2)[0].read_text())
  if arch == "cpu":
    assert found["hosts"] == [] and "Xid" not in found["why"]
    return
  assert found["hosts"][0]["gpus"][1]["held_by"][0] == "hardware slowdown"
  assert "Xid 79 of 0000:5d:00" in found["why"] and "fallen off the bus" in found["why"]
