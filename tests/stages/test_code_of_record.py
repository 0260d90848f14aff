"""A record says what ran: ranks that imported other code or libraries refuse to be its run."""

import io
import re
import shutil
from pathlib import Path

import pytest
from labs import Lab
from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import fingerprint
from nmoe.errors import OtherCodeError, RunError
from nmoe.records import provenance
from nmoe.records.reader import Hypothesis, Start
from stages import research, runs
from stages.comparable import check_one_machine
from stages.launch import local as launch
from stages.launch.local import Job, Launcher
from stages.launch.pool import Slot
from stages.prod import launching
from stages.proofs.bench_step import loader_rate
from stages.report.findings import gather

pytestmark = pytest.mark.faults


@pytest.fixture
def clone(tmp_path, monkeypatch):
  """A copy of the code, which ranks import in place of ours."""
  copy = tmp_path / "clone"
  for name in ("nmoe", "stages", "kernels"):
    shutil.copytree(
      provenance.REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
    )
  monkeypatch.setattr(launch, "REPO", copy)
  return copy


def recorded(lab: Lab, code: str, environment: dict[str, str] | None = None, **values) -> str:
  """A run of two steps."""
  short = {"schedule.total_tokens": 1024, "schedule.warmup_tokens": 0, "schedule.decay_tokens": 0}
  config = configs.changed(lab.config, short | values)
  run = lab.records.start_run(
    lab.experiment.id,
    "arm",
    0,
    toml=configs.to_toml(config),
    fingerprint=fingerprint(config, lab.data.name),
    data_digest=lab.data.name,
    code_version=code,
    commit="",
    diff="",
    environment=environment or {},
    target="cpu",
  )
  lab.records.release(run.id)
  return run.id


def job(lab: Lab, run: str) -> Job:
  return Job(run, configs.loads(lab.run(run).toml))


def edit(clone: Path) -> None:
  """Of a module that every run imports."""
  file = clone / "nmoe/train/schedule.py"
  file.write_text(file.read_text() + "\n# edited\n")


def test_code_edited_between_the_record_and_the_run(lab, clone):
  code = provenance.code_version(clone)
  run = recorded(lab, code)
  edit(clone)
  handle = launch.run(Launcher(lab.root), job(lab, run))
  assert handle.poll() == launch_status()
  found = lab.run(run)
  assert found.status == "failed" and not found.finished
  assert f"run {run} is recorded with code {code}, but this process imported " in found.error
  assert provenance.code_version(clone) in found.error
  assert not (lab.root / "metrics" / run).exists()


def launch_status() -> int:
  return 76  # another try would end alike


def test_a_worker_that_imported_older_code_refuses(lab, clone, monkeypatch):
  """Two runs of one process; the code is edited, and the second recorded, between them."""
  slot = Slot(Launcher(lab.root), "", afresh=False)
  ended = []
  try:
    for _ in range(2):
      run = recorded(lab, provenance.code_version(clone))
      handle = slot.begin(job(lab, run), lambda entry: None)
      while handle.poll() is None:
        launch.wait([handle], 0.2)
      ended.append(lab.run(run))
      edit(clone)
  finally:
    slot.close()
  assert [run.status for run in ended] == ["completed", "failed"]
  assert ended[0].code_version in ended[1].error and ended[1].code_version in ended[1].error


def test_code_edited_while_it_is_imported(monkeypatch):
  monkeypatch.setattr(provenance, "imported", lambda: ("before", {}))
  monkeypatch.setattr(provenance, "code_version", lambda: "after")
  with pytest.raises(OtherCodeError, match="code before, but this process imported after"):
    provenance.check_code("r", "before")


def test_a_package_changed_between_the_record_and_the_run(lab):
  here = provenance.environment()
  run = recorded(lab, "code", here | {"torch": "1.0.0"})
  with pytest.raises(OtherCodeError, match=re.escape(f"torch 1.0.0, here {here['torch']}")):
    lab.attempt(run)
  assert not lab.run(run).finished
  run = recorded(lab, "code", here)
  assert lab.attempt(run) == 0
  (start,) = lab.records.starts(run)
  assert (start.step, start.environment) == (0, here) and start.device


def test_a_run_that_goes_on_elsewhere_says_and_records_it(lab, capsys):
  here = provenance.environment()
  run = recorded(lab, "code", here | {"torch": "1.0.0"})
  lab.records.add_start(run, Start(0, "raspberry", "slow", here | {"torch": "1.0.0"}))
  assert lab.attempt(run) == 0
  said = capsys.readouterr().err
  assert "continued at step 0 with host raspberry → " in said
  assert f"torch 1.0.0 → {here['torch']}" in said
  assert [start.host == "raspberry" for start in lab.records.starts(run)] == [True, False]
  (move,) = gather(lab.root, lab.experiment.id).moves
  assert move.startswith(f"{run} at step 0 with host raspberry → ")
  speed = [Hypothesis("It is fast.", "train/tokens_per_s", "higher", 0.0)]
  with pytest.raises(RunError, match=f"{run} began on one and was continued"):
    check_one_machine(speed, [lab.run(run)], lab.records)
  check_one_machine(
    [Hypothesis("It learns.", "val/bpb", "lower", 0.0)], [lab.run(run)], lab.records
  )


def test_one_that_never_began_is_not_taken_up_with_other_versions(lab, launches, monkeypatch):
  """It could only refuse again; one that has begun goes on, and says so."""
  lab.file.write_text(lab.file.read_text().replace("seeds = 2", "seeds = 1"))
  monkeypatch.setattr(runs, "write_report", lambda root, experiment: lab.root)
  for number in (0, 1):
    launches.before[number] = lambda run: 1 / 0
    with pytest.raises(ZeroDivisionError):
      research.run(lab.file, None, Console(file=io.StringIO()))
    found = lab.records.runs(lab.records.list()[0].id)
    assert len(found) == number + 1
    monkeypatch.setattr(runs, "environment", lambda n=number: {"torch": f"1.{n}"})
  last, here = found[-1].id, lab.run(found[-1].id).environment
  monkeypatch.setattr(runs, "environment", lambda: here | {"torch": "9.9"})
  lab.records.add_start(last, Start(0, "h", "cpu", here))
  out = io.StringIO()
  research.run(lab.file, None, Console(file=out, width=300))
  assert [run.id for run in lab.records.runs(lab.records.list()[0].id)][-1] == last
  assert f"interrupted before as run {last}, continued (torch " in out.getvalue()


def test_a_launch_that_never_began_is_not_taken_up_with_other_versions(lab, launches, monkeypatch):
  def launch() -> list[str]:
    assert launching.launch(lab.file, Console(file=io.StringIO()), "a test", dry_run=True) == 0
    return [
      run.id for e in lab.records.list() if e.stage == "prod" for run in lab.records.runs(e.id)
    ]

  first = launch()
  assert launch() == first
  here = lab.run(first[0]).environment
  monkeypatch.setattr(runs, "environment", lambda: here | {"torch": "9.9"})
  assert len(launch()) == 2


def test_ranks_import_the_code_of_their_record_wherever_they_start(lab, clone, monkeypatch):
  """From inside another clone, and beside a module that has a library's name."""
  code = provenance.code_version(clone)
  other = clone.with_name("other")
  shutil.copytree(clone, other)
  (other / "nmoe/train/loop.py").write_text("raise SystemExit('code of another clone')")
  (other / "numpy.py").write_text("raise SystemExit('a stray module')")
  monkeypatch.chdir(other)
  run = recorded(lab, code)
  handle = launch.run(Launcher(lab.root), job(lab, run))
  assert handle.poll() == 0, handle.tail()


def test_helpers_import_nothing_of_the_current_folder(lab, tmp_path, monkeypatch):
  for name in ("torch", "numpy", "nmoe"):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('a stray module')")
  monkeypatch.chdir(tmp_path)
  assert loader_rate(lab.config, lab.data) > 0
