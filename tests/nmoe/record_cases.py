"""Records for tests: a hypothesis, a made-up run, and a process of its own that has them open."""

import subprocess
import sys
from pathlib import Path

from roots import start_run

from nmoe.records.reader import Hypothesis

HYPOTHESIS = {
  "stage": "ablate",
  "hypotheses": [Hypothesis("Muon lowers bpb.", "val/bpb", "lower", 0.01)],
}
REPO = Path(__file__).resolve().parents[2]


def start(db, experiment_id, seed=0, arm="baseline", **changed):
  return start_run(db, experiment_id, arm, seed, **changed)


def child(root, code):
  """A Python process with `db` open."""
  head = "import sys, time; from nmoe.records.experiments import Experiments"
  return subprocess.Popen(
    [sys.executable, "-c", f"{head}; db = Experiments({str(root)!r})\n{code}"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=REPO,
  )
