"""Runs that take a second: a small model, a few kilobytes of made-up text, the real records."""

from __future__ import annotations

import argparse
import random
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe.config import file as configs
from nmoe.config.sections import fingerprint
from nmoe.data.mixture import load_mixture
from nmoe.data.prepare import prepare
from nmoe.data.prepared import open_data
from nmoe.data.tokenizer import get
from nmoe.distributed.parallel import Parallel
from nmoe.errors import NmoeError
from nmoe.machine.target import select
from nmoe.records import checkpoint, metrics
from nmoe.records.experiments import Experiments
from nmoe.records.provenance import code_version
from nmoe.records.reader import Hypothesis, Run
from nmoe.records.root import Root
from nmoe.train import loop as train
from nmoe.train.evaluations import Evaluations
from nmoe.train.profiler import Profiler
from nmoe.train.progress import Entry
from nmoe.train.session import Session
from stages.launch.local import Job, Launcher

TINY = """
[experiment]
name = "tiny"
statement = "It learns."
direction = "lower"
seeds = 2
[run]
root = "{root}"
[target]
arch = "cpu"
dtype = "fp32"
[model]
vocab_size = 257
dim = 32
num_layers = 2
dense_dim = 64
num_heads = 2
kv_lora_rank = 16
qk_nope_dim = 16
qk_rope_dim = 16
v_dim = 16
init_std = 0.05
[moe]
num_experts = 4
top_k = 2
expert_dim = 32
bias_update_rate = 0.01
[data]
mixture = "mixture.toml"
tokenizer = "byte"
seq_len = 64
val_tokens = 2048
[optim]
dense_lr = 1e-2
router_lr = 1e-2
expert_lr = 1e-2
[schedule]
batch_tokens = 512
total_tokens = 6144
warmup_tokens = 1024
decay_tokens = 2048
[train]
micro_batch = 8
log_every = 1
checkpoint_every = 3
[launch]
threads = 1
"""
STEPS = 12
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w13|w2)")
MIXTURE = """
[mixture]
holdout = 0.1
[[source]]
name = "text"
kind = "files"
paths = ["text.jsonl"]
format = "jsonl"
"""


def write_files(folder: Path) -> Path:
  """tiny.toml in the folder, its root `folder/root`, with a mixture of 200 documents beside it."""
  chance = random.Random(0)
  words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(50)]
  lines = (" ".join(chance.choices(words, k=60)) for _ in range(200))
  (folder / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
  (folder / "mixture.toml").write_text(MIXTURE)
  (folder / "tiny.toml").write_text(TINY.format(root=folder / "root"))
  return folder / "tiny.toml"


def whole_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """A checkpoint's experts, one by one, as a model of one rank holds them; a copy."""
  whole: dict[str, Tensor] = {}
  experts: dict[str, dict[int, Tensor]] = {}
  for name, tensor in state.items():
    if one := EXPERT.fullmatch(name):
      experts.setdefault(f"{one[1]}.{one[3]}", {})[int(one[2])] = tensor
    else:
      whole[name] = tensor
  stacks = {name: torch.stack([one[e] for e in sorted(one)]) for name, one in experts.items()}
  return whole | stacks


def write_variant(path: Path, name: str, body: str) -> Path:
  """A configuration beside `path` that extends it."""
  variant = path.with_name(f"{name}.toml")
  variant.write_text(f'extends = "{path.name}"\n{body}')
  return variant


class Signals:
  """Stands in for `signal` in nmoe.train.loop: a run in the process of the tests takes none of its
  signals. One that is to end them, as a time limit sends it, would end the run and fail its test.
  """

  SIGTERM = signal.SIGTERM

  def __init__(self):
    self.handlers: dict[int, Callable[..., None]] = {}

  def signal(self, number: int, handler: Callable[..., None]) -> None:
    self.handlers[number] = handler


class Lab:
  """A root with prepared data, and runs in it that this process executes."""

  def __init__(self, folder: Path):
    self.signals = Signals()
    self.file = write_files(folder)
    self.config = configs.load(self.file, env={})
    self.root = Path(self.config.run.root)
    self.data = prepare(load_mixture(folder / "mixture.toml"), get("byte"), self.root)
    self.records = Experiments(self.root)
    self.experiment = self.records.create(
      "tiny", "test", [Hypothesis("It learns.", "val/bpb", "lower", 0.0)]
    )

  def record(self, **values: Any) -> str:
    """A new run of the configuration with keys replaced, "." written "__"; its id."""
    config = configs.changed(self.config, {k.replace("__", "."): v for k, v in values.items()})
    run = self.records.start_run(
      self.experiment.id,
      "arm",
      config.train.seed,
      toml=configs.to_toml(config),
      fingerprint=fingerprint(config, self.data.name),
      data_digest=self.data.name,
      code_version=code_version(),
      commit="",
      diff="",
      environment={},
      target=config.target.arch,
    )
    self.records.release(run.id)
    return run.id

  def attempt(self, run_id: str, first: Path | None = None, number: int = 0) -> int:
    """Execute a recorded run in this process as a child of the launcher would."""
    return train.attempt(options(self.root, run_id, first, number))

  def terminate(self) -> None:
    """What a SIGTERM would do to the run that this process executes."""
    self.signals.handlers[signal.SIGTERM](signal.SIGTERM, None)

  def session(self, run_id: str, **more: Any) -> Session:
    """What the loop gets of a run on one rank, with fields replaced."""
    config, data = self.config, open_data(self.data)
    made = {
      "config": config,
      "target": select(config),
      "parallel": Parallel(),
      "data": data,
      "evaluations": Evaluations(config, Parallel(), data, Root(self.root), run_id),
      "metrics": metrics.Metrics(self.root, run_id),
      "checkpoints": checkpoint.Writer(self.checkpoints(run_id), config.train.keep_checkpoints),
      "meta": {"config": configs.to_toml(config)},
      "profiler": Profiler(None, config.steps),
    }
    return Session(**made | more)

  def run(self, run_id: str) -> Run:
    return self.records.run(run_id)

  def checkpoints(self, run_id: str) -> Path:
    return checkpoint.directory(self.root, run_id)

  def state(self, run_id: str, step: int = STEPS) -> dict[str, Tensor]:
    return checkpoint.read(self.checkpoints(run_id) / f"step_{step:08d}")

  def logged(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value), without what the clock, the loader's thread and memory say."""
    series = metrics.read(self.root, run_id)
    noise = (
      "time/",
      "startup/",
      "checkpoint/",
      "data/wait_s",
      "memory/",
      "train/tokens_per_s",
      "train/mfu",
      "eval/seconds",
    )
    return {
      tag: list(zip(steps.tolist(), values.tolist(), strict=True))
      for tag, (steps, _, values) in series.items()
      if not tag.startswith(noise)
    }


@contextmanager
def open_lab(folder: Path) -> Iterator[Lab]:
  """A lab, after which this process has its threads and determinism again."""
  threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
  checked, train.check_code = train.check_code, lambda *_: None  # records say "code"
  lab = Lab(folder)
  signals, train.signal = train.signal, lab.signals
  yield lab
  lab.records.close()
  train.signal, train.check_code = signals, checked
  torch.set_num_threads(threads)
  torch.use_deterministic_algorithms(deterministic)


def options(
  root: Path, run_id: str, first: Path | None = None, attempt: int = 0
) -> argparse.Namespace:
  more = ["--attempt", str(attempt)] if first is None else ["--first", str(first)]
  return train.options(["--root", str(root), "--run", run_id, *more])


class Ended:
  """A stages.launch.local.Handle of a job that has ended."""

  pipe, drained, failure, state = -1, True, "", ""

  def __init__(self, job: Job, status: int):
    self.job, self.status = job, status

  def poll(self) -> int:
    return self.status

  def tail(self) -> str:
    return ""

  def close(self) -> None:
    pass


class Launches:
  """Stands in for Launcher.start: the same outcome in this process. Counts its runs."""

  def __init__(self):
    self.ids: list[str] = []
    self.before: dict[int, Callable[[str], None]] = {}  # launch, from 0 -> what happens first

  def start(self, launcher: Launcher, job: Job, follow: Callable[[Entry], None], *_: Any) -> Ended:
    self.ids.append(job.run)
    self.before.get(len(self.ids) - 1, lambda run_id: None)(job.run)
    follow(Entry(1, STEPS, 5.0, 1.0, 60.0))
    try:
      return Ended(job, train.attempt(options(launcher.root, job.run, job.first)))
    except NmoeError as error:
      return Ended(job, train.told(error))


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
  """Whether two states hold the same tensors, NaNs and signs of zeros included."""
  return a.keys() == b.keys() and all(
    a[k].dtype == b[k].dtype and torch.equal(_bytes(a[k]), _bytes(b[k])) for k in a
  )


def _bytes(x: Tensor) -> Tensor:
  return x.contiguous().reshape(-1).view(torch.uint8)
