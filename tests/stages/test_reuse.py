"""Which runs stand in for new ones: of the same computation, and for speed of the same machine."""

import io
import sqlite3

import pytest
from labs import Lab, write_variant
from rich.console import Console

from stages import ablate, runs

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_page")]
VARIANT = """
[experiment]
name = "tiny-muon"
statement = "Muon is {word}."
metric = "{metric}"
direction = "lower"
[optim]
matrices = "muon"
[schedule]
total_tokens = 1024
warmup_tokens = 0
decay_tokens = 0
[train]
checkpoint_every = 0
"""


def call(lab: Lab, word: str, metric: str) -> str:
  out = io.StringIO()
  variant = write_variant(lab.file, word, VARIANT.format(word=word, metric=metric))
  ablate.run(lab.file, variant, 1, Console(file=out, width=300))
  return out.getvalue()


def elsewhere(lab: Lab, host: str) -> None:
  with sqlite3.connect(lab.root / "experiments.db") as db:
    db.execute("UPDATE runs SET host = ?", (host,))


@pytest.mark.parametrize("metric", ["train/tokens_per_s", "memory/peak_bytes"])
def test_speed_of_another_host_is_measured_anew(lab, launches, metric):
  call(lab, "fast", metric)
  assert len(launches.ids) == 2
  call(lab, "faster", metric)
  assert len(launches.ids) == 2  # the same machine: both stand in
  elsewhere(lab, "node-17")
  said = call(lab, "fastest", metric)
  assert len(launches.ids) == 4 and "reused" not in said


def test_speed_of_another_device_of_one_host_is_measured_anew(lab, launches):
  """A container's host name may be any machine's; a card may have been replaced."""
  call(lab, "fast", "train/tokens_per_s")
  with sqlite3.connect(lab.root / "experiments.db") as db:
    db.execute("DROP TRIGGER starts_never_update")
    db.execute("UPDATE starts SET device = 'NVIDIA H100 80GB'")
  said = call(lab, "faster", "train/tokens_per_s")
  assert len(launches.ids) == 4 and "reused" not in said
  call(lab, "good", "val/bpb")
  assert len(launches.ids) == 4


def test_speed_under_another_version_is_measured_anew(lab, launches, monkeypatch):
  now = runs.environment()
  monkeypatch.setattr(runs, "environment", lambda: now | {"torch": "2.1.0"})
  call(lab, "fast", "train/tokens_per_s")
  monkeypatch.setattr(runs, "environment", lambda: now)
  call(lab, "faster", "train/tokens_per_s")
  assert len(launches.ids) == 4


def test_a_loss_of_another_machine_is_reused_and_said_to_be(lab, launches, monkeypatch):
  """From when it is, and what is another one now."""
  now = runs.environment()
  monkeypatch.setattr(runs, "environment", lambda: now | {"torch": "2.1.0"})
  call(lab, "good", "val/bpb")
  done = lab.records.run(launches.ids[0])
  monkeypatch.setattr(runs, "environment", lambda: now)
  elsewhere(lab, "node-17")
  said = call(lab, "better", "val/bpb")
  assert len(launches.ids) == 2
  line = f"baseline seed 0: completed before as run {done.id}, reused (of {done.updated[:10]}; "
  assert f"{line}torch 2.1.0, now {now['torch']}; host node-17, now " in said
