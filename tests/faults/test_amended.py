"""A live production run of two ranks that is amended ends as one whose schedule was so."""

import subprocess
import sys
from pathlib import Path

import pytest
from labs import same_bits
from productions import FAULTS, REPO, Production, kinds, state_of, undisturbed

from nmoe.records import metrics

pytestmark = [pytest.mark.faults, pytest.mark.kills]
STEPS, AT = 200, 140  # the amendment holds from the step after AT on
ENTRY = """
[[amend]]
at_tokens = {tokens}
key = "optim.{group}_lr"
value = 0.005
reason = "it is restless"
"""


def halved(folder: Path) -> Path:
  """All rates, from 1e-2."""
  groups = ("dense", "router", "expert")
  entries = (ENTRY.format(tokens=AT * 1024, group=group) for group in groups)
  (folder / "amend.toml").write_text("".join(entries))
  return folder / "amend.toml"


def test_a_live_run_is_amended(tmp_path, monkeypatch):
  """It saves and is launched again at once, and once more at the tokens of the amendment; the
  oracle's ranks halve the factor of their rates there.
  """
  production = Production(tmp_path, f"[schedule]\ntotal_tokens = {STEPS * 1024}\n")
  production.wait_for(20)
  command = ["amend", production.run_id(), str(halved(tmp_path)), "--root", str(production.root)]
  subprocess.run([sys.executable, "-m", "stages.cli", "prod", *command], check=True, cwd=REPO)
  code, out = production.end()
  assert code == 0, out
  attempts = production.attempts()
  assert [attempt.outcome for attempt in attempts] == ["amended", "amended", "completed"]
  assert 20 <= attempts[0].last_step < attempts[1].last_step == AT
  wanted = ["launch", *["amend"] * 3, "stop", "launch", "amended", "launch"]
  assert kinds(production.events()) == wanted
  rates = metrics.read(production.root, production.run_id(), ["lr/expert"])["lr/expert"]
  by_step = dict(zip(rates[0].tolist(), rates[2].tolist(), strict=True))
  assert by_step[AT + 1] == 0.5 * by_step[AT] and sorted(by_step) == list(range(1, STEPS + 1))
  monkeypatch.setenv("PYTHONPATH", str(FAULTS))
  monkeypatch.setenv("FAULT", f"halves: {AT * 1024}")
  (tmp_path / "undisturbed").mkdir()
  oracle = undisturbed(tmp_path / "undisturbed", STEPS)
  assert same_bits(state_of(production.root, production.run_id(), STEPS), oracle)
