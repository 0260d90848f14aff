"""`nmoe prod launch` of a small moonlet over all GPUs of this host: undisturbed, with a rank killed
and with a rank stopped, each to the end of the same bits; and `nmoe prod check` of it.

`pytest -m gpu -s tests/gpu/test_launch.py`: -s shows the seconds, -k killed one question. Without a
GPU the same is asked of two ranks on the cpu. On one GPU there is one rank.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from productions import (
  REPO,
  Production,
  beat_of,
  files_of,
  kinds,
  logged_of,
  wait_until,
  within,
)

from kernels.arch import ARCHS
from nmoe.bench.preflight import burn
from nmoe.records.experiments import Experiments

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()


class Machine(NamedTuple):
  """What is launched here, and the limits on a host of its own."""

  base: str  # of configs/moonlet
  arch: str
  ranks: int
  tokens: int  # of a step and rank
  micro_batch: int
  steps: int
  every: int  # steps between checkpoints
  first_s: float  # from the command to the first logged step
  again_s: float  # from the loss of the ranks to a step that new ones logged

  @property
  def fault(self) -> int:
    """The step at which a rank is disturbed: half-way, between two checkpoints."""
    return self.steps // 2 + self.every // 2


def here() -> Machine:
  if not GPUS:
    return Machine("cpu", "cpu", 2, 2048, 8, 48, 8, 30.0, 20.0)
  found = torch.cuda.get_device_capability()
  arch = next(arch.name for arch in ARCHS.values() if arch.capability == found)
  steps, every = (200, 25) if GPUS > 1 else (800, 100)
  return Machine("small", arch, GPUS, 32768, 32, steps, every, 60.0, 30.0)


HERE = here()
HANG_S = 20.0
MISSED_S = 15.0  # the only rank does not hear its own deadline; its agent misses it this much later
BUILD_S = 300
CONFIG = f"""
extends = "{REPO}/configs/moonlet/{HERE.base}.toml"
[target]
arch = "{HERE.arch}"
[model]
vocab_size = 512
[data]
tokenizer = "byte"
val_tokens = 32768
[schedule]
batch_tokens = {HERE.tokens * HERE.ranks}
total_tokens = {HERE.tokens * HERE.ranks * HERE.steps}
warmup_tokens = {HERE.tokens * HERE.ranks * HERE.steps // 10}
decay_tokens = {HERE.tokens * HERE.ranks * HERE.steps // 5}
[train]
micro_batch = {HERE.micro_batch}
cuda_graph = {str(GPUS == 1).lower()}
log_every = 1
eval_every = 0
checkpoint_every = {HERE.every}
keep_checkpoints = 2
[launch]
ranks = {HERE.ranks}
hang_s = {HANG_S}
[rdep]
deadline_s = 30.0
[prod]
max_restarts = 5
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
  """A root with the data and the kernels of every launch."""
  folder = tmp_path_factory.mktemp("shared")
  file = written(folder)
  told(file, "prep-mixture", str(REPO / "configs/moonlet/stdlib.toml"), "--tokenizer", "byte")
  if GPUS:
    (folder / "root").mkdir(exist_ok=True)
    cache = Path.home() / ".cache" / "nmoe" / "kernels"  # of all tests on this host
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "root" / "kernel_cache").symlink_to(cache)
    told(file, "kernels", "build", str(file))
  return folder / "root"


def written(folder: Path, shared: Path | None = None) -> Path:
  """The configuration, in a folder with a root of its own."""
  file, root = folder / "launched.toml", folder / "root"
  file.write_text(f'{CONFIG}[run]\nroot = "{root}"\n')
  if shared is not None:
    root.mkdir()
    for part in shared.glob("[dk]*"):  # data and kernel_cache
      (root / part.name).symlink_to(part)
  return file


def told(file: Path, *command: str) -> str:
  """What a command of nmoe says of the root of a configuration."""
  env = os.environ | {"NMOE_ROOT": str(file.parent / "root")}
  done = subprocess.run(
    [sys.executable, "-m", "stages.cli", *command],
    cwd=REPO,
    env=env,
    text=True,
    capture_output=True,
    timeout=BUILD_S,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def launched(folder: Path, shared: Path) -> Production:
  """A launch whose first step is logged."""
  production = Production(folder, file=written(folder, shared))
  production.wait_for(1)
  within(production.begun, HERE.first_s, "the first step is logged")
  return production


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shared) -> Production:
  production = launched(tmp_path_factory.mktemp("undisturbed"), shared)
  code, out = production.end()
  assert code == 0, out
  assert kinds(production.events()).count("restart") == 0
  return production


def check_equal(production: Production, undisturbed: Production) -> None:
  """Every file of the last checkpoint and all that was logged."""
  one, other = ((of.root, of.run_id()) for of in (production, undisturbed))
  assert logged_of(*one) == logged_of(*other)
  losses, _ = logged_of(*one)["train/loss"]
  assert losses == list(range(1, HERE.steps + 1))
  assert {"grad_norm/all", "val/loss"} <= logged_of(*one).keys()
  assert files_of(*one) == files_of(*other)


def trained_since(production: Production, pid: int, step: int) -> bool:
  """Whether ranks that replaced the process logged a step beyond `step`."""
  beat = beat_of(production.root, production.run_id())
  return (
    beat is not None and beat.pid != pid and beat.entry.tokens_per_s > 0 < beat.entry.step > step
  )


def ends_alike(
  folder: Path, shared: Path, undisturbed: Production, number: int, missed_s: float
) -> None:
  """A launch whose last rank gets a signal half-way; missed_s: until the others are ended."""
  production = launched(folder, shared)
  last = HERE.ranks - 1
  beat = production.wait_for(HERE.fault)
  os.kill(production.rank(last), number)
  begun, reached = time.monotonic(), beat.entry.step
  limit_s = missed_s + HERE.again_s
  wait_until(lambda: trained_since(production, beat.pid, 0), limit_s, "a step is logged again")
  wait_until(
    lambda: trained_since(production, beat.pid, reached),
    limit_s + HERE.first_s - (time.monotonic() - begun),
    f"step {reached} is passed again",
  )
  within(begun, limit_s + HERE.first_s, "in all")
  code, out = production.end()
  assert code == 0, out
  restarts = [event for event in production.events() if event.kind == "restart"]
  assert len(restarts) == 1 and 0 < restarts[0].step <= reached
  assert restarts[0].detail["suspect"] == last, restarts[0].detail
  check_equal(production, undisturbed)


def test_a_killed_rank(tmp_path, shared, undisturbed):
  ends_alike(tmp_path, shared, undisturbed, signal.SIGKILL, 0.0)


def test_a_stopped_rank(tmp_path, shared, undisturbed):
  """The others miss it at their deadline; nobody waits for the only one but its agent."""
  missed_s = HANG_S + MISSED_S * (HERE.ranks == 1)
  ends_alike(tmp_path, shared, undisturbed, signal.SIGSTOP, missed_s)


def test_the_same_product_on_all_processors(tmp_path, shared):
  """As `nmoe prod check` says it, and as this process finds it on each of them."""
  file = written(tmp_path, shared)
  begun = time.monotonic()
  out = told(file, "prod", "check", str(file))
  within(begun, 2 * HERE.first_s, "prod check")
  assert f"{HERE.ranks} of {HERE.ranks}" in out
  with closing(Experiments(tmp_path / "root")) as records:
    (run,) = records.runs(records.list()[0].id)
  ranks = run.results["ranks"]
  assert sorted(one["rank"] for one in ranks) == list(range(HERE.ranks))
  assert all(one["steady"] and one["locks"] for one in ranks)
  devices = [torch.device("cuda", n) for n in range(GPUS)] or [torch.device("cpu")]
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  found = {bits for device in devices for bits in burn(device, 0.5)[1:]}
  torch.set_num_threads(threads)
  assert found == {one["bits"] for one in ranks}, "one set of bits, here and there"
  sys.stdout.write(f"TFLOP/s: {', '.join(format(one['tflops'], '.4g') for one in ranks)}\n")
