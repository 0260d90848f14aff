"""A report of ten seeds, as large as real ones are: its bytes, and how soon a browser shows it."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from chrome import chrome
from roots import curves, fill

from nmoe.config import file as configs
from nmoe.records.experiments import Experiments
from nmoe.records.reader import Hypothesis
from stages.report.html import write_report

pytestmark = pytest.mark.browser
BASE = Path(__file__).resolve().parents[2] / "configs/moonlet/cpu.toml"
STEP = np.arange(1, 1001) * 10
LAYERS = 12  # 100 tags
PLOTS = "document.querySelectorAll('.js-plotly-plot .main-svg').length"


def report(root):
  """Of two arms of ten seeds, a thousand logs of a hundred tags each."""
  records = Experiments(root)
  claim = Hypothesis("Ten seeds tell.", "val/bpb", "lower", 0.005)
  experiment = records.create("ten", "ablate", [claim])
  facts = dict(data_digest="d", commit="", diff="", code_version="c", environment={}, target="cpu")
  for seed, (arm, shift) in product(range(10), (("baseline", 0.0), ("variant", -0.03))):
    keys = {"train.seed": seed, "optim.dense_lr": 1e-3 - shift / 100}
    toml = configs.to_toml(configs.changed(configs.load(BASE, env={}), keys))
    run = records.start_run(experiment.id, arm, seed, toml=toml, fingerprint=arm, **facts).id
    values = curves(STEP, seed, shift, LAYERS)
    fill(root, run, 0, STEP, values | {"val/bpb": values["train/bpb"]})
    records.update_run(run, status="completed", results={"val/bpb": 1.2 + shift / 3})
  records.close()
  return write_report(root, experiment.id)


def test_a_report_of_ten_seeds_is_small_and_its_text_is_there_within_a_second(browser, tmp_path):
  page_file = report(tmp_path / "root")
  assert page_file.stat().st_size <= 2_000_000
  paints = []
  for i in range(3):
    with chrome(browser, tmp_path / f"profile-{i}") as page:
      page.size(1280, 1000)
      page.open(f"file://{page_file}")
      page.wait(f"document.readyState == 'complete' && {PLOTS} >= 10")
      paints.append(page.ask("performance.getEntriesByType('paint')[0].startTime") / 1000)
      assert page.errors == [] and "Ten seeds tell." in page.ask("document.body.innerText")
  assert min(paints) <= 1.0, paints
