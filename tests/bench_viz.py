"""What the dashboard needs for a root of many runs, in headless Chromium: seconds to each sight.

`PYTHONPATH=. python tests/bench_viz.py ROOT` makes the root where it is not (100 runs of 1,000
steps of 100 tags), serves it, and prints a line a sight. Every time is from the start of the
navigation, by the browser's own clock, and each cold one has a new server, cache and profile.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from chrome import chrome
from roots import curves, fill, start_run

from nmoe.config import file as configs
from nmoe.records.experiments import Experiments
from nmoe.records.reader import Hypothesis

REPO = Path(__file__).resolve().parents[1]
RUNS, STEPS, LAYERS = 100, 1000, 12  # 100 tags
TABLE = "document.querySelectorAll('tbody tr').length >= %d"
PANELS = "[...document.querySelectorAll('.panel[data-curves=\"%d\"] canvas')].length >= %d"
# The browser notes the moment at which a sight is first complete, right after a frame.
NOTE = """window.sights = {};
const look = () => { const all = %s;
  for (const [name, there] of Object.entries(all)) if (!(name in sights) && there()) {
    sights[name] = performance.now(); }
  if (Object.keys(sights).length < Object.keys(all).length) requestAnimationFrame(look); };
look();"""


def make(root: Path) -> None:
  """Ten ablations of five seeds."""
  records = Experiments(root)
  base = configs.load(REPO / "configs/moonlet/cpu.toml", env={})
  step = np.arange(1, STEPS + 1) * 10
  for i in range(RUNS // 10):
    claim = Hypothesis(f"Change {i} helps.", "val/bpb", "lower", 0.005)
    experiment = records.create(f"change-{i}", "ablate", [claim])
    for seed, arm in product(range(5), ("baseline", "variant")):
      config = configs.changed(base, {"train.seed": seed, "optim.dense_lr": 1e-3 * (i + 1)})
      toml = configs.to_toml(config)
      run = start_run(records, experiment.id, arm, seed, toml=toml, fingerprint=arm).id
      shift = -0.01 * i if arm == "variant" else 0.0
      values = curves(step, seed, shift, LAYERS)
      values["val/bpb"] = values["train/bpb"]
      fill(root, run, 0, step, values)
      records.update_run(run, status="completed", results={"val/bpb": 1.2 + shift})
  records.close()


def served(root: Path, cache: Path, port: int) -> subprocess.Popen:
  command = [sys.executable, "-m", "stages.cli", "viz", "--root", str(root), "--port", str(port)]
  server = subprocess.Popen([*command, "--cache", str(cache)], cwd=REPO, stdout=subprocess.DEVNULL)
  while True:
    try:
      with urlopen(f"http://127.0.0.1:{port}/static/index.html"):
        return server
    except OSError:
      time.sleep(0.05)


def sights(browser: str, address: str, wanted: dict[str, str]) -> dict[str, float]:
  """Seconds from the navigation's start to each of `wanted`, in a new profile."""
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    with chrome(browser, Path(profile)) as page:
      page.size(1280, 1000)
      looks = ", ".join(f"{json.dumps(k)}: () => {v}" for k, v in wanted.items())
      page.send("Page.addScriptToEvaluateOnNewDocument", source=NOTE % f"{{{looks}}}")
      page.open(address)
      page.wait(f"Object.keys(window.sights).length == {len(wanted)}", 60)
      seen = page.ask("sights")
      assert page.errors == [], page.errors
  return {name: ms / 1000 for name, ms in seen.items()}


def main(root: Path, repeats: int = 3) -> None:
  if not root.exists():
    make(root)
  browser = shutil.which("chromium") or shutil.which("google-chrome")
  ids = [run["id"] for run in _runs(root)]
  every = "/?sel=" + ",".join(ids)
  first = {"table": TABLE % RUNS, "ten runs": PANELS % (10, 6)}
  hundred = {"table": TABLE % RUNS, "hundred runs": PANELS % (RUNS, 6)}
  seen: dict[str, list[float]] = {}
  for i in range(repeats):
    with tempfile.TemporaryDirectory() as cache:
      server = served(root, Path(cache), 8801 + i)
      address = f"http://127.0.0.1:{8801 + i}"
      for kind, path, wanted in (
        ("cold", "/", first),
        ("warm", "/", first),
        ("cold", every, hundred),
        ("warm", every, hundred),
      ):
        for name, s in sights(browser, address + path, wanted).items():
          seen.setdefault(f"{name}, {kind}" + (", of all" if path == every else ""), []).append(s)
      server.terminate()
      server.wait()
  for name, times in seen.items():
    middle, worst = statistics.median(times), max(times)
    sys.stdout.write(f"{name:28} median {middle:.2f} s  worst {worst:.2f} s\n")
  sys.stdout.write(f"load average {os.getloadavg()[0]:.1f}\n")


def _runs(root: Path) -> list[dict]:
  with tempfile.TemporaryDirectory() as cache:
    server = served(root, Path(cache), 8800)
    with urlopen("http://127.0.0.1:8800/api/runs") as answer:
      runs = json.load(answer)["runs"]
    server.terminate()
    server.wait()
  return runs


if __name__ == "__main__":
  main(Path(sys.argv[1]))
