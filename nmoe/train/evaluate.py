"""`python -m nmoe.train.evaluate`: one suite on one checkpoint of a recorded run, by its ranks.

It is started as the ranks of training are, computes in the run's own arithmetic, and leaves the
items in the root; rank 0 writes what came out as JSON where it is told to.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data import tokenizer
from nmoe.data.tokenizer import Tokenizer
from nmoe.distributed import parallel
from nmoe.distributed.meeting import Meeting, shared_run
from nmoe.errors import NmoeError
from nmoe.evals.downstream import Downstream
from nmoe.evals.measure import write_items
from nmoe.evals.suites import suite_of
from nmoe.machine.target import Target, select
from nmoe.model.decoder import Model
from nmoe.records import checkpoint
from nmoe.records.heartbeat import Entry
from nmoe.records.reader import Reader, Run
from nmoe.records.root import Root
from nmoe.train.progress import Progress
from nmoe.train.schedule import tokens_of
from nmoe.train.startup import parser

PROMPTS = (
  "The capital of France is",
  "The chemical symbol of gold is",
  "If yesterday was Friday, then tomorrow will be",
  "The opposite of hot is",
  "The planets of the solar system are:",
  "My favorite color is",
  "def add(a, b):\n  return",
)
NEW = 24  # tokens of greedy text after each
WIDTH = 128


def evaluate(options: argparse.Namespace) -> None:
  """Load, score, write. Raises NmoeError."""
  meeting = Meeting.of(options)
  run = shared_run(meeting, lambda: _run(options.root, options.run))
  config, root = configs.loads(run.toml, f"run {run.id}"), Root(options.root)
  target = select(config, options.rank)
  text = tokenizer.get(config.data.tokenizer)
  downstream = Downstream(suite_of(options.suite, options.limit), root.evals, config, text)
  ranks = parallel.init(config, target, meeting)
  model = load_model(config, target, ranks, root.checkpoints(run.id), options.step)
  progress, began = Progress(options.progress if ranks.rank == 0 else None), time.monotonic()

  def told(done: int, total: int) -> None:
    seconds = time.monotonic() - began
    rate, left = config.rank_tokens * ranks.ranks * done / seconds, seconds / done * (total - done)
    progress.tell(Entry(done, total, None, rate, left)._asdict())

  outcome = downstream.run(model, ranks, told)
  progress.tell({"state": "sampling"})
  shown = samples(model, text, config)
  if ranks.rank == 0:
    items = root.eval_items(run.id, options.step, downstream.suite.asked)
    write_items(items, outcome.items)
    told = {
      "values": outcome.values,
      "seconds": outcome.seconds,
      "items": downstream.digest,
      "suite": downstream.suite.name,
      "limit": downstream.suite.limit,
      "chosen": downstream.chosen,
      "file": str(items),
      "arithmetic": f"{config.target.arch} {config.target.dtype}",
      "device": target.name,
      "samples": shown,
    }
    options.out.write_text(json.dumps(told), encoding="utf-8")
  ranks.close()


def _run(root: Path, run_id: str) -> Run:
  with closing(Reader(root)) as reader:
    return reader.run(run_id)


def load_model(
  config: Config, target: Target, ranks: parallel.Parallel, folder: Path, step: int
) -> Model:
  """The model of a checkpoint on the target's device, in the arithmetic of its tokens, without an
  optimizer.
  """
  with torch.device("meta"):
    model = Model(config, target.ops, ranks.rdep)
  model.to_empty(device=target.device)
  model.init_weights(config.train.seed)
  checkpoint.load(folder, step, model.state_dict(), ranks.first_expert, ranks.saving)
  written = checkpoint.manifest(folder / f"step_{step:08d}")
  model.set_forward_bf16(configs.loads(written["config"]).finishing(tokens_of(written)))
  return model


@torch.no_grad()
def samples(model: Model, text: Tokenizer, config: Config) -> list[str]:
  """Each of PROMPTS with its greedy continuation. Every rank computes the same."""
  width = min(WIDTH, config.data.seq_len)
  size = max(1, min(len(PROMPTS), config.rank_tokens // width))
  ids = [[text.eot, *text.encode(prompt).tolist()][: width - NEW] for prompt in PROMPTS]
  for begin in range(0, len(ids), size):
    part = ids[begin : begin + size]
    for _ in range(NEW):
      tokens = torch.zeros(size, width, dtype=torch.int64)
      for row, one in zip(tokens, part, strict=False):
        row[: len(one)] = torch.tensor(one)
      for one, best in zip(part, _best(model, tokens, [len(x) - 1 for x in part]), strict=True):
        one.append(best)
  return [text.decode(one).decode("utf-8", errors="replace") for one in ids]


def _best(model: Model, tokens_BS: Tensor, last: list[int]) -> list[int]:
  """The most probable id after position last[i] of row i."""
  device = model.head_weight.device
  x_BSD = model.hidden(tokens_BS.to(device))[0]
  rows = torch.arange(len(last), device=device)
  x_BD = x_BSD[rows, torch.tensor(last, device=device)]
  return (x_BD.float() @ model.head_weight.float().T).argmax(-1).tolist()


def main() -> int:
  p = parser("nmoe.train.evaluate")
  p.add_argument("--step", type=int, required=True)
  p.add_argument("--suite", required=True)
  p.add_argument("--limit", type=int, default=0)
  p.add_argument("--out", type=Path, required=True, help="JSON, written by rank 0")
  try:
    evaluate(p.parse_args())
  except NmoeError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
