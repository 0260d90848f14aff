"""The step loop: load → forward → loss → backward → clip → step → log → checkpoint.

`python -m nmoe.train.loop --root ROOT --run RUN_ID` executes one recorded run, from its last
checkpoint if it has one. Stage runners start it as a child process and learn its outcome from the
experiment database; at every log rank 0 tells its progress (nmoe.train.progress).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe.config import file as configs
from nmoe.config import plan
from nmoe.config.sections import Config, diff, kind
from nmoe.data.loader import Loader, Prefetcher, PreparedData, Validation, open_data, unigram_bpb
from nmoe.distributed import parallel
from nmoe.distributed.parallel import Parallel
from nmoe.errors import CheckpointError, ConfigError, DivergedError, NmoeError
from nmoe.evals.heldout import evaluate
from nmoe.machine.target import Target, select
from nmoe.model.decoder import Model, update_router_bias
from nmoe.records import checkpoint
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Run
from nmoe.records.root import Root
from nmoe.train.flight import FlightRecorder
from nmoe.train.graph import Graph
from nmoe.train.optim import Optimizer
from nmoe.train.profiler import Profiler
from nmoe.train.progress import Progress
from nmoe.train.schedule import lr_factor
from nmoe.train.startup import StartUp, parser
from nmoe.train.watch import Watch

Opened = Callable[..., PreparedData]  # nmoe.data.loader.open_data, or one that remembers

INTERRUPTED = 75  # exit status of a run that was told to stop and can be resumed (EX_TEMPFAIL)


@dataclass
class TrainState:
  """All that a checkpoint saves. The data position is the step: the loader is a pure function of
  it.
  """

  model: Model
  optimizer: Optimizer
  step: int = 0

  def tensors(self) -> dict[str, Tensor]:
    return {**self.model.state_dict(), **self.optimizer.state_dict()}


@dataclass
class Session:
  """What the loop reads and writes but does not save."""

  config: Config
  target: Target
  parallel: Parallel
  data: PreparedData
  metrics: Metrics
  checkpoints: checkpoint.Writer
  meta: dict[str, Any]  # written into every checkpoint's manifest
  profiler: Profiler  # its `step` is called after every step
  startup: StartUp = field(default_factory=StartUp)
  progress: Progress = field(default_factory=Progress)
  first: Path | None = None  # a folder for the state before and after the first step
  stop: bool = False  # set by SIGTERM or a vanished parent: checkpoint and leave


def train(session: Session, state: TrainState) -> dict[str, Any] | None:
  """Run the remaining steps, the last of which evaluates. Returns the results, or None if told to
  stop.
  """
  c, target, ranks = session.config, session.target, session.parallel
  total, micros = c.steps, c.micro_batches
  loader = Loader(session.data, seq_len=c.data.seq_len, seed=c.train.seed)
  batches = Prefetcher(
    loader,
    c.sequences,
    start=state.step,
    stop=total,
    rank=ranks.rank,
    ranks=ranks.ranks,
    device=target.device,
  )
  validation = Validation(session.data, seq_len=c.data.seq_len, tokens=c.data.val_tokens)

  def passes(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step's gradients. Returns this rank's sum of losses, counts, last micro-batch's losses."""
    loss, counts = torch.zeros((), device=target.device), 0
    for micro, (x, y) in enumerate(zip(tokens.chunk(micros), targets.chunk(micros), strict=True)):
      clock.start("forward")
      state.model.set_draw(state.step, micro, ranks.rank)
      state.model.on_final = ranks.reduce_final(state.model) if micro == micros - 1 else None
      out = state.model(x, y)
      mean = out.loss_sum / c.schedule.batch_tokens + out.balance_loss / (micros * ranks.ranks)
      clock.start("backward")
      mean.backward()
      loss += out.loss_sum.detach()
      counts = counts + out.count_LE
    return loss, counts, out.loss_T

  graph = Graph(state.model, passes) if c.train.cuda_graph else None
  watch = Watch(session, state.step, total, graph)
  clock, flight = watch.clock, FlightRecorder(state.model, c.train.flight_every)
  begun = state.step
  save_aside(session, state)
  while state.step < total and not ranks.any(session.stop):
    session.checkpoints.check()
    clock.start("load")
    tokens, targets = next(batches)
    state.model.set_forward_bf16(finishing(c, state.step))
    flight.start(state.step + 1)
    if graph is not None:
      clock.start("graph")
    run = partial(graph or passes, tokens, targets)
    loss, counts, loss_T = ranks.run(run, partial(forget, state.model, flight))
    clock.start("clip")
    ranks.reduce_gradients(state.model)
    loss, counts = ranks.sum(loss) / c.schedule.batch_tokens, ranks.sum(counts)
    norms = state.optimizer.grad_norms(ranks.sum)
    scale = watch.guard(state.step, loss, norms["all"])
    clock.start("step")
    factor = lr_factor(state.step * c.schedule.batch_tokens, c.schedule)
    state.optimizer.step(factor, scale)
    ranks.gather_weights(state.model)
    update_router_bias(state.model, counts, c.moe.bias_update_rate)
    state.step += 1
    clock.start("log")
    watch.add(state.step, flight.stop())
    if state.step % c.train.log_every == 0 or state.step == total:
      last = targets.chunk(micros)[-1]
      watch.log(state, factor, loss, norms, counts, loss_T, last, batches.wait_s())
    if due(state.step, c.train.eval_every) or state.step == total:
      clock.start("eval")
      watch.add(state.step, evaluate(session, state.model, validation))
    if due(state.step, c.train.checkpoint_every) or state.step == total:
      clock.start("checkpoint")
      save(session, state, watch)
    if state.step == begun + 1:
      save_aside(session, state)
    session.profiler.step()
  if state.step < total:
    save(session, state, watch)
    return None
  session.checkpoints.wait()
  return watch.results(state.step) | {"unigram_bpb": unigram_bpb(session.data)}


def forget(model: Model, flight: FlightRecorder) -> None:
  """Undo what a step's passes did, before they run again."""
  model.zero_grad()
  flight.forget()


def due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def finishing(config: Config, step: int) -> bool:
  """Whether the step belongs to the recipe's forward-bf16 finish (precision.finish_tokens)."""
  return 0 < config.precision.finish_tokens <= step * config.schedule.batch_tokens


def save(session: Session, state: TrainState, watch: Watch) -> None:
  """Begin a checkpoint of the state, after every step so far is known to be finite.

  The loop waits for the write before, if it is still under way, and for the copy; this stall is
  logged. The metrics are on disk before the checkpoint is.
  """
  watch.check(int(watch.bad_step))
  begun, writer = time.perf_counter(), session.checkpoints
  writer.wait()
  if writer.keep == 0 or state.step in checkpoint.steps(writer.folder):
    session.metrics.flush()
    return
  writer.copy(state.tensors())
  watch.add(state.step, {"checkpoint/stall_s": time.perf_counter() - begun})
  session.metrics.flush()
  writer.start(state.step, session.meta)


def save_aside(session: Session, state: TrainState) -> None:
  """Write the state into the session's folder for the first step's, if it has one; waits for the
  checkpoint under way, which speaks over the same group.
  """
  if session.first is not None:
    ranks = session.parallel
    session.checkpoints.wait()
    checkpoint.save(
      session.first, state.step, state.tensors(), ranks.first_expert, session.meta, ranks.saving
    )


def resume(session: Session, state: TrainState) -> None:
  """Load the newest checkpoint, if any, and forget the metrics logged after it.

  Raises CheckpointError if it is of another identity.
  """
  folder = session.checkpoints.folder
  found = checkpoint.steps(folder)
  if not found:
    session.metrics.rewind(0)
    return
  written = checkpoint.manifest(folder / f"step_{found[-1]:08d}")
  check_identity(configs.loads(written["config"]), session.config, folder)
  checkpoint.load(folder, found[-1], state.tensors(), session.parallel.first_expert)
  state.step = found[-1]
  session.metrics.rewind(state.step)


def check_identity(written: Config, wanted: Config, folder: Path) -> None:
  """CheckpointError listing the identity keys that differ from those of the checkpoint, if any
  does; other keys that differ are said to be in the log.
  """
  lines: dict[str, list[str]] = {"identity": [], "schedule": [], "free": []}
  for key, (before, now) in diff(written, wanted).items():
    lines[kind(key)].append(f"{key}: checkpoint {before!r}, now {now!r}")
  if lines["identity"]:
    raise CheckpointError(
      f"{folder} holds another model: {'; '.join(lines['identity'])}; restore these keys or start "
      "a new run"
    )
  for line in lines["schedule"] + lines["free"]:
    sys.stderr.write(f"resumed under {line}\n")


def check_vocabulary(config: Config, data: PreparedData) -> None:
  """ConfigError if the data's ids do not fit the embedding."""
  if config.model.vocab_size < data.tokenizer.vocab_size:
    raise ConfigError(
      f"model.vocab_size = {config.model.vocab_size} is less than the {data.tokenizer.vocab_size} "
      "ids of "
      f"tokenizer {data.tokenizer.name!r}; set model.vocab_size = {data.tokenizer.vocab_size} or "
      "more"
    )


def build(config: Config, target: Target, ranks: Parallel) -> TrainState:
  """The model with its initial weights on the target's device, and its optimizer.

  ConfigError, before anything is allocated, if a GPU has too little free memory for the run.
  """
  if target.device.type == "cuda":
    misfit = plan.fits(plan.plan(config), torch.cuda.mem_get_info(target.device)[0])
    if misfit is not None:
      raise ConfigError(f"{target.name}: {misfit}")
  with torch.device("meta"):
    model = Model(config, target.ops, ranks.rdep)
  model.to_empty(device=target.device)
  model.init_weights(config.train.seed)
  return TrainState(model, Optimizer(model, config, target.ops, ranks.owned))


def execute(
  options: argparse.Namespace, run: Run, experiments: Experiments | None, opened: Opened
) -> int:
  """Train one recorded run to its end on this rank; returns the exit status. Rank 0 holds the
  records. opened: how its data are opened.
  """
  startup = StartUp(options.since)
  startup.end("imports")
  root, config = options.root, configs.loads(run.toml, f"run {run.id}")
  target = select(config, options.rank)
  startup.end("kernels")
  ranks = parallel.init(config, target, options.rank, options.rendezvous)
  data = opened(Root(root).data / run.data_digest, verify=options.rank == 0)
  check_vocabulary(config, data)
  meta = {"run": run.id, "fingerprint": run.fingerprint, "config": run.toml}
  session = Session(
    config,
    target,
    ranks,
    data,
    Metrics(root, run.id, ranks.rank),
    checkpoint.Writer(
      checkpoint.directory(root, run.id),
      config.train.keep_checkpoints,
      ranks.first_expert,
      ranks.saving,
    ),
    meta,
    Profiler(options.trace, config.steps),
    startup,
    Progress(options.progress),
    options.first,
  )
  startup.end("ranks_and_data")
  signal.signal(signal.SIGTERM, lambda *_: setattr(session, "stop", True))
  state = build(config, target, ranks)
  resume(session, state)
  startup.end("model")
  try:
    with session.checkpoints, ranks.explained():
      results = train(session, state)
  finally:
    session.metrics.flush()
  ranks.close()
  if experiments is None:
    return 0 if results is not None else INTERRUPTED
  if results is None:
    experiments.update_run(run.id, status="interrupted")
    return INTERRUPTED
  experiments.update_run(run.id, status="completed", results=results)
  return 0


def attempt(options: argparse.Namespace, opened: Opened | None = None) -> int:
  """Execute the run and, on rank 0, own its record meanwhile: whatever fails is written there.

  opened: how its data are opened; None: anew.
  """
  opened = opened or open_data
  with closing(Experiments(options.root)) as records:
    if options.rank > 0:
      return execute(options, records.run(options.run), None, opened)
    run = records.claim(options.run)
    try:
      return execute(options, run, records, opened)
    except BaseException as error:
      results = {"diverged": 1} if isinstance(error, DivergedError) else {}
      name = "" if isinstance(error, NmoeError) else f"{type(error).__name__}: "
      records.update_run(run.id, status="failed", results=results, error=f"{name}{error}")
      raise


def options(arguments: Sequence[str] | None = None, since: float = 0.0) -> argparse.Namespace:
  """What the command line says of a run, which began when this process was `since` seconds old."""
  p = parser("nmoe.train.loop")
  p.add_argument("--trace", type=Path, help="profile a few steps of this rank into this folder")
  p.add_argument(
    "--first", type=Path, help="save the state before and after the first step into this folder"
  )
  p.set_defaults(since=since)
  return p.parse_args(arguments)


def main() -> int:
  try:
    return attempt(options())
  except NmoeError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1


if __name__ == "__main__":
  sys.exit(main())
