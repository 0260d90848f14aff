"""The root of `nmoe viz --demo`: small studies on the cpu, by the project's own stages.

`python -m stages.demo ROOT` makes it, or goes on where it was: an ablation that answers questions
while it trains, a sweep of the learning rate over two widths with its control, and a production run
that rests on the ablation and of whose two ranks one is killed. About two minutes on two quiet
cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics

from rich.console import Console

from nmoe.errors import ConfigError, NmoeError
from nmoe.evals.sources import prepare
from nmoe.records.attempts import History
from nmoe.records.provenance import REPO
from nmoe.train.progress import Heartbeat
from stages import ablate
from stages.interrupts import interruptible, status
from stages.prod import launching
from stages.proxy import sweep

MIXTURE = """[mixture]
holdout = 0.05
[[source]]
name = "prose"
kind = "python"
part = "prose"
weight = 0.7
[[source]]
name = "code"
kind = "python"
part = "code"
weight = 0.3
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
bias_update_rate = 0.0
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
routing_every = 10
eval_every = 20
checkpoint_every = 40
[eval]
suite = "{root}/demo/sentences.toml"
every = 50
[launch]
threads = 1
"""
VARIANT = """extends = "base.toml"
[experiment]
name = "balance"
statement = "A bias for each expert keeps the fullest below the baseline's by a mean load or more."
metric = "load/max_over_mean"
direction = "lower"
min_effect = 1.0
[moe]
bias_update_rate = 0.01
"""
SMALL = """extends = "base.toml"
[experiment]
name = "small"
statement = "The base of the sweep learns."
metric = "val/loss"
direction = "lower"
[model]
dim = 32
init_std = 0.1
num_layers = 3
[moe]
bias_update_rate = 0.01
[optim]
dense_lr = 8e-3
router_lr = 8e-3
expert_lr = 8e-3
embed_lr = 8e-3
dense_weight_decay = 0.0
expert_weight_decay = 0.0
[schedule]
total_tokens = {tokens}
warmup_tokens = {warmup}
decay_tokens = {decay}
[train]
log_every = 5
eval_every = 0
[eval]
suite = "none"
"""
SWEEP = """[sweep]
name = "rates"
statement = "Under completep-moe the best learning rate of a width holds at twice that width."
base = "small.toml"
vary = ["joint"]
step = 4.0
points = {points}
extend = 0
seeds = 1
control = ["off"]
[[scale]]
width = 2
[budget]
runs = 40
"""
PRODUCTION = """extends = "base.toml"
[experiment]
name = "production"
statement = "The model trains to its end though a rank is killed."
[prod]
evidence = ["balance"]
[moe]
bias_update_rate = 0.01
[schedule]
total_tokens = {tokens}
warmup_tokens = {warmup}
decay_tokens = {decay}
[train]
micro_batch = 4
checkpoint_every = {checkpoint}
[eval]
suite = "none"
[launch]
ranks = 2
"""
QUESTIONS = 60
WORDS = 7  # of a question, and as many of its two answers


def make(root: Path, console: Console, steps: int = 120, seeds: int = 3, points: int = 5) -> None:
  """Carry the studies out; what has been done is found and not done again."""
  folder = root / "demo"
  folder.mkdir(parents=True, exist_ok=True)
  tokens = {"tokens": 1024 * steps, "warmup": 1024 * (steps // 8), "decay": 1024 * (steps // 4)}
  few = max(steps // 2, 44)  # whose last 22 steps are the decay
  small = {"tokens": 1024 * few, "warmup": 1024 * (few // 8), "decay": 1024 * 22}
  (folder / "mixture.toml").write_text(MIXTURE)
  (folder / "sentences.toml").write_text('tasks = ["continue"]\n')
  (folder / "base.toml").write_text(BASE.format(root=root, **tokens))
  (folder / "variant.toml").write_text(VARIANT)
  (folder / "small.toml").write_text(SMALL.format(**small))
  (folder / "sweep.toml").write_text(SWEEP.format(points=points))
  (folder / "production.toml").write_text(PRODUCTION.format(checkpoint=steps // 6, **tokens))
  prepare(questions(folder / "continue.jsonl"), root)
  ablate.run(folder / "base.toml", folder / "variant.toml", seeds, console)
  sweep.run(folder / "sweep.toml", console)
  with killed_once(root, after=steps // 2):
    launching.launch(folder / "production.toml", console, "a demonstration")


def questions(path: Path) -> Path:
  """Sentences of Python's documentation, which a model is to end as they do: two choices each."""
  words = [" ".join(text.split()).split() for text in topics.topics.values()]
  parts = [" ".join(of[40 : 40 + 2 * WORDS]) for of in words if len(of) > 40 + 2 * WORDS]
  halves = [(" ".join(p.split()[:WORDS]), " " + " ".join(p.split()[WORDS:])) for p in sorted(parts)]
  halves = [(asked, answer) for asked, answer in halves if len(asked + answer) < 120]
  lines = []
  for i, ((asked, answer), (_, other)) in enumerate(pairwise(halves[: QUESTIONS + 1])):
    choices = [answer, other] if i % 2 else [other, answer]
    line = {"task": "continue", "name": str(i), "context": asked, "choices": choices}
    lines.append(json.dumps(line | {"gold": choices.index(answer)}))
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return path


@contextmanager
def killed_once(root: Path, after: int) -> Iterator[None]:
  """Within the block, rank 0 of the first production run that gets beyond step `after` is killed,
  unless that was done before: then the run has a restart.
  """
  over = threading.Event()

  def watch() -> None:
    while not over.wait(0.2):
      for file in (root / "runs").glob("*/heartbeat.json"):
        beat = Heartbeat.read(file)
        if beat is not None and beat.entry.step > after and not restarted(root, file.parent.name):
          os.kill(beat.pid, signal.SIGKILL)
          return

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    yield
  finally:
    over.set()
    watcher.join()


def restarted(root: Path, run_id: str) -> bool:
  with closing(History(root)) as records:
    return any(event.kind == "restart" for event in records.events(run_id))


@contextmanager
def beside(root: Path) -> Iterator[None]:
  """Make the root in a process of its own for as long as the block lasts; its output is kept in
  `{root}.log`. A later call goes on where it was stopped.
  """
  try:
    root.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"{root.parent} cannot be made ({error}); name another --cache") from error
  command = [sys.executable, "-m", "stages.demo", str(root.resolve())]
  with root.with_suffix(".log").open("a") as log:
    maker = subprocess.Popen(command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
  try:
    yield
  finally:
    maker.terminate()
    maker.wait()


if __name__ == "__main__":
  try:
    with interruptible():
      make(Path(sys.argv[1]).resolve(), Console())
  except NmoeError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt as interrupt:
    sys.exit(status(interrupt))
