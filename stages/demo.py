"""The root of `nmoe viz --demo`: small studies on the cpu, by the project's own stages.

`python -m stages.demo ROOT` makes it, or goes on where it was: an ablation, a sweep of the learning
rate at two widths, and a run that is killed twice and resumed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nmoe.config import file as configs
from nmoe.errors import NmoeError
from nmoe.records.reader import Hypothesis
from stages import ablate
from stages.judge.table import Judgement, Table
from stages.proofs import check_resume
from stages.runs import Arm, Workbench
from stages.study import Study, carry_out

MIXTURE = """[mixture]
holdout = 0.05
[[source]]
name = "prose"
kind = "python"
part = "prose"
"""
BASE = """[experiment]
name = "demo"
statement = "A small moonlet learns the prose of Python's documentation on a CPU."
metric = "val/bpb"
direction = "lower"
min_effect = 0.1
[run]
root = "{root}"
[target]
arch = "cpu"
dtype = "fp32"
[model]
vocab_size = 257
dim = 48
num_layers = 4
dense_dim = 128
num_heads = 2
kv_lora_rank = 24
qk_nope_dim = 16
qk_rope_dim = 8
v_dim = 24
init_std = 0.02
[moe]
num_experts = 16
top_k = 2
num_shared = 1
expert_dim = 32
route_scale = 1.5
bias_update_rate = 0.01
[data]
mixture = "mixture.toml"
tokenizer = "byte"
seq_len = 128
val_tokens = 4096
[optim]
dense_lr = 3e-3
router_lr = 3e-3
expert_lr = 3e-3
[schedule]
batch_tokens = 1024
total_tokens = {tokens}
warmup_tokens = {warmup}
decay_tokens = {decay}
[train]
micro_batch = 8
log_every = 2
eval_every = 20
checkpoint_every = 80
[launch]
threads = 1
"""
VARIANT = """extends = "base.toml"
[experiment]
name = "four-experts"
statement = "Four experts a token instead of two lower bits per byte by 0.02 or more."
metric = "val/bpb"
direction = "lower"
min_effect = 0.02
[moe]
top_k = 4
"""
RATES = (1e-3, 3e-3, 9e-3)
WIDTHS = (32, 64)


def make(root: Path, console: Console, steps: int = 160, seeds: int = 3) -> None:
  """Carry the studies out; what has been done is found and not done again."""
  folder = root / "demo"
  folder.mkdir(parents=True, exist_ok=True)
  tokens = {"tokens": 1024 * steps, "warmup": 1024 * (steps // 8), "decay": 1024 * (steps // 4)}
  (folder / "mixture.toml").write_text(MIXTURE)
  (folder / "base.toml").write_text(BASE.format(root=root, **tokens))
  (folder / "variant.toml").write_text(VARIANT)
  ablate.run(folder / "base.toml", folder / "variant.toml", seeds, console)
  sweep(folder / "base.toml", console)
  check_resume.resume(folder / "base.toml", 12, console, ())


def sweep(base: Path, console: Console) -> None:
  """The learning rate at every width, one seed: which one is best is described, not judged."""
  config = configs.load(base)
  bench = Workbench.open(config.run.root, console)
  arms = []
  for width in WIDTHS:
    for rate in RATES:
      keys = {f"optim.{group}_lr": rate for group in ("dense", "router", "expert")}
      name = f"width {width}, rate {rate:g}"
      changed = configs.changed(config, {"model.dim": width, **keys})
      arms.append(replace(bench.arm(name, changed), point={"width": width, "lr": rate}))
  claim = Hypothesis("The best learning rate is the same at both widths.", "val/bpb", "none", 0.0)
  carry_out(Study("rates", "demo", (claim,), tuple(arms), (0,), best(arms)), bench)


def best(arms: Sequence[Arm]) -> Callable[[Table], Judgement]:
  """A judge that names the best arm."""

  def judge(table: Table) -> Judgement:
    means = {arm.name: table.values(arm.name, "val/bpb")[0] for arm in arms}
    least = min(means, key=means.get)
    return Judgement("described", f"Lowest held-out bits per byte: {least}.", {"values": means})

  return judge


@contextmanager
def beside(root: Path) -> Iterator[None]:
  """Make the root in a process of its own for as long as the block lasts; its output is kept in
  `{root}.log`. A later call goes on where it was stopped.
  """
  root.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "stages.demo", str(root)]
  with root.with_suffix(".log").open("a") as log:
    maker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
  try:
    yield
  finally:
    maker.terminate()
    maker.wait()


if __name__ == "__main__":
  try:
    make(Path(sys.argv[1]).resolve(), Console())
  except NmoeError as error:
    sys.exit(f"error: {error}")
