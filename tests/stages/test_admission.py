"""What can be told at once is told before a run is recorded, by one clear error, without torch."""

import io
import subprocess
import sys
import time

import pytest
from labs import MIXTURE, write_variant
from rich.console import Console

from nmoe.errors import CheckpointError, ConfigError, DataError, NmoeError, RunError, TargetError
from nmoe.machine import driver
from nmoe.records.root import Root
from nmoe.train import loop
from stages import ablate, research

pytestmark = pytest.mark.faults
SOURCE = MIXTURE[MIXTURE.index("[[source]]") :]
SLACK = 8  # of a machine that others use too


def call(lab, body: str) -> None:
  file = write_variant(lab.file, "refused", body)
  research.run(file, 1, Console(file=io.StringIO(), width=200))


def mixture(lab, body: str) -> str:
  (lab.file.parent / "other.toml").write_text(body)
  return '[data]\nmixture = "other.toml"\n'


def source(lab, text: str, holdout: float) -> str:
  (lab.file.parent / "few.jsonl").write_text(text)
  return mixture(
    lab,
    f'[mixture]\nholdout = {holdout}\n[[source]]\nname = "few"\nkind = "files"\n'
    'paths = ["few.jsonl"]\nformat = "jsonl"\n',
  )


ROWS = "".join(f'{{"text": "document {i}"}}\n' for i in range(20))
REFUSED = {
  "vocabulary": (ConfigError, "vocab_size = 256 is less", lambda _: "[model]\nvocab_size = 256\n"),
  "target": (
    TargetError,
    "sm_90a.*shows none",
    lambda _: '[target]\narch = "sm_90a"\ndtype = "bf16"\n',
  ),
  "memory": (
    ConfigError,
    "weights take .* GiB, this machine has",
    lambda _: "[model]\nvocab_size = 4611686018427387904\n",
  ),
  "seq_len": (
    DataError,
    "a sample of seq_len 512 needs 513",
    lambda lab: (
      source(lab, ROWS, 0.5) + "seq_len = 512\n[schedule]\nbatch_tokens = 4096\n"
      "total_tokens = 8192\nwarmup_tokens = 0\ndecay_tokens = 0\n"
    ),
  ),
  "no held-out window": (
    DataError,
    "a validation window needs 65",
    lambda lab: source(lab, ROWS, 0.05),
  ),
  "weights": (
    ConfigError,
    "2 weights, the mixture 1 sources",
    lambda _: "[data]\nweights = [1.0, 2.0]\n",
  ),
  "weights of nothing": (ConfigError, "finite sum above 0", lambda _: "[data]\nweights = [0.0]\n"),
  "yarn, no turns": (
    ConfigError,
    "beta_slow = 0.0 must be positive",
    lambda _: "[yarn]\nfactor = 4.0\nbeta_slow = 0.0\n",
  ),
  "yarn, a base of one": (
    ConfigError,
    "rope_theta = 1.0 must exceed 1",
    lambda _: "[yarn]\nfactor = 4.0\n[model]\nrope_theta = 1.0\n",
  ),
  "deadline": (
    ConfigError,
    "rdep.deadline_s = 1e\\+300 must be in",
    lambda _: "[rdep]\ndeadline_s = 1e300\n",
  ),
  "hang": (
    ConfigError,
    "launch.hang_s = 1e\\+300 must be in",
    lambda _: "[launch]\nhang_s = 1e300\n",
  ),
  "puts on the cpu": (
    ConfigError,
    "rdep.peer_access = False is for GPUs",
    lambda _: "[rdep]\npeer_access = false\n[launch]\nranks = 2\n[train]\nmicro_batch = 4\n",
  ),
  "imported weights": (
    CheckpointError,
    "imports/gone is not there",
    lambda _: '[model]\ninit = "import:gone"\n',
  ),
  "items of a suite": (
    DataError,
    "no items of task csqa_0shot",
    lambda _: '[eval]\nsuite = "short"\n',
  ),
  "a suite": (ConfigError, "suite 'shrot' is unknown", lambda _: '[eval]\nsuite = "shrot"\n'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_before_a_run_is_recorded(lab, launches, what):
  error, said, body = REFUSED[what]
  with pytest.raises(error, match=said):
    call(lab, body(lab))
  assert launches.ids == []
  assert [e.id for e in lab.records.list()] == [lab.experiment.id]
  assert lab.records.runs(lab.experiment.id) == []


MISSING = {
  "a mixture": (ConfigError, "other.toml: the mixture cannot be read", None),
  "text": (DataError, "no file matches .*lost.jsonl", MIXTURE.replace("text.jsonl", "lost.jsonl")),
  "text of a second source": (
    DataError,
    "no file matches .*lost.jsonl",
    MIXTURE + SOURCE.replace("text", "more").replace("more.jsonl", "lost.jsonl"),
  ),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_a_variant_lacks_is_told_before_anything_is_prepared(lab, launches, what):
  """The baseline's text may take hours; so may the first source of a mixture."""
  error, said, text = MISSING[what]
  base = lab.file.parent / "mixture.toml"
  base.write_text(MIXTURE.replace("holdout = 0.1", "holdout = 0.3"))  # is not prepared so far
  if text:
    (lab.file.parent / "other.toml").write_text(text)
  known = set(Root(lab.root).data.rglob("*"))
  variant = write_variant(lab.file, "variant", '[data]\nmixture = "other.toml"\n')
  with pytest.raises(error, match=said):
    ablate.run(lab.file, variant, 1, Console(file=io.StringIO()))
  assert launches.ids == [] and set(Root(lab.root).data.rglob("*")) == known


@pytest.mark.parametrize("arch, found", [("sm_90a", (10, 0)), ("sm_100a", (9, 0))])
def test_another_gpu_is_named_with_the_line_to_change(monkeypatch, arch, found):
  monkeypatch.setattr(driver, "gpus", lambda: (driver.Gpu("NVIDIA X", found),))
  other = {"sm_90a": "sm_100a", "sm_100a": "sm_90a"}[arch]
  with pytest.raises(TargetError, match=rf'found NVIDIA X .*set arch = "{other}"'):
    driver.check(arch)
  driver.check(other)
  driver.check("cpu")


def test_the_command_needs_no_torch_for_it(lab):
  """The whole command, in a process of its own, with torch out of reach."""
  file = write_variant(lab.file, "refused", "[model]\nvocab_size = 256\n")
  (lab.root.parent / "torch").mkdir()
  (lab.root.parent / "torch" / "__init__.py").write_text("raise SystemExit('torch is imported')")
  code = (
    f"import sys; sys.path.insert(0, {str(lab.root.parent)!r})\n"
    f"from stages.cli import app; app(['research', 'run', {str(file)!r}])"
  )
  begun = time.monotonic()
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert time.monotonic() - begun < 2 * SLACK
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("error: model.vocab_size = 256 is less than the 257 ids")
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "error, helps",
  [
    (ConfigError("x"), False),
    (TargetError("x"), False),
    (DataError("x"), False),
    (NmoeError("x"), True),
  ],
)
def test_only_what_another_try_may_help_is_promised_to_continue(
  lab, launches, monkeypatch, error, helps
):
  def fail(*_, **__):
    raise error

  monkeypatch.setattr(loop, "build", fail)
  with pytest.raises(RunError) as caught:
    call(lab, "[schedule]\nwarmup_tokens = 512\n")
  assert ("the same command continues them" in str(caught.value)) == helps
  assert ("fails alike as long as the cause stands" in str(caught.value)) != helps
