"""The step loop: load → forward → loss → backward → clip → step → log → checkpoint.

`python -m nmoe.train.loop --root ROOT --run RUN_ID` executes one recorded run, from its last
checkpoint if it has one, else from that of its branch. Stage runners start it as a child process
and learn its outcome from the experiment database; at every log rank 0 tells its progress
(nmoe.train.progress).

One file: how a run begins, its step, and what its end means to those who started it.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from nmoe.config import file as configs
from nmoe.config.amend import amended, following
from nmoe.config.fit import fits
from nmoe.config.plan import plan
from nmoe.config.sections import Config
from nmoe.data import prepared
from nmoe.data.loader import Loader, Prefetcher, unigram_bpb
from nmoe.data.mixture import phases
from nmoe.data.prepared import PreparedData, open_data
from nmoe.distributed import parallel
from nmoe.distributed.hosts import select_alike
from nmoe.distributed.meeting import Meeting, shared_run
from nmoe.distributed.parallel import Parallel
from nmoe.errors import (
  CheckpointError,
  CommError,
  ConfigError,
  DataError,
  DiskFullError,
  DivergedError,
  FencedError,
  NmoeError,
  OtherCodeError,
  RunError,
  TargetError,
)
from nmoe.machine.target import Target
from nmoe.model.decoder import Model
from nmoe.model.imported import imported_at, imported_config
from nmoe.model.router import update_bias
from nmoe.records import attempts, checkpoint, postmortem
from nmoe.records.attempts import Attempts
from nmoe.records.heartbeat import Heartbeat
from nmoe.records.metrics import Metrics
from nmoe.records.provenance import check_code, check_versions, imported
from nmoe.records.reader import Run, Start
from nmoe.records.root import Root
from nmoe.train import badsteps, garbage
from nmoe.train.badsteps import BadStepError
from nmoe.train.clock import Clock
from nmoe.train.evaluations import Evaluations, due
from nmoe.train.guard import Guard
from nmoe.train.optim import Optimizer
from nmoe.train.passes import Passes
from nmoe.train.profiler import Profiler
from nmoe.train.progress import FAILED_FOR_GOOD, INTERRUPTED, Progress
from nmoe.train.saving import resume, save, save_aside, tell_pruned
from nmoe.train.schedule import end_of, lr_factor, tokens_of
from nmoe.train.session import Session, TrainState, nothing
from nmoe.train.startup import StartUp, parser
from nmoe.train.watch import StepValues, Watch
from nmoe.train.watchdog import START_S, Watchdog

Opened = Callable[..., PreparedData]  # nmoe.data.prepared.open_data, or one that remembers

# Another try would end alike.
FINAL = (DivergedError, ConfigError, TargetError, DataError, OtherCodeError, FencedError)


class Parts(NamedTuple):
  """What the loop turns with, made for one session and the step that it begins at."""

  batches: Prefetcher
  passes: Passes
  guard: Guard
  watch: Watch
  clock: Clock


def parts_of(session: Session, state: TrainState) -> Parts:
  c, ranks, device = session.config, session.parallel, session.target.device
  names = [source.name for source in session.data.sources]
  loader = Loader(
    session.data,
    seq_len=c.data.seq_len,
    seed=c.train.seed,
    weights=phases(names, c.data.weights, c.data.weights_from),
    fraction=c.data.fraction,
    holes=c.data.holes,
  )
  batches = Prefetcher(
    loader,
    c.sequences,
    start=state.step,
    stop=end_of(state.step, state.tokens, c.schedule).step,
    seen=state.tokens // c.data.seq_len,
    rank=ranks.rank,
    ranks=ranks.ranks,
    device=device,
  )
  clock, guard = Clock(device), session.guard or Guard(c.optim.clip_norm, device)
  passes = Passes(session, state, clock, loader)
  watch = Watch(session, state.step, clock, guard, passes.graph)
  return Parts(batches, passes, guard, watch, clock)


@garbage.by_hand()
def train(session: Session, state: TrainState, parts: Parts) -> dict[str, Any] | None:
  """Run the remaining steps, the last of which evaluates. Returns the results, or None if told to
  stop.
  """
  c, ranks, begun = session.config, session.parallel, state.step
  batches, passes, guard, watch, clock = parts
  end = end_of(state.step, state.tokens, c.schedule)
  save_aside(session, state)
  while state.step < end.step and not ranks.any(
    session.checkpoints.failed or session.leaves(state.tokens)
  ):
    session.watchdog.enter("stepping")
    clock.start("load")
    tokens, targets = next(batches)
    loss, counts, loss_T = passes(tokens, targets)
    clock.start("clip")
    ranks.reduce_gradients(state.model)
    loss, counts = ranks.sum(loss) / c.schedule.batch_tokens, ranks.sum(counts)
    norms = state.optimizer.grad_norms(ranks.sum)
    clock.start("step")
    factor = lr_factor(state.tokens, c.schedule, end.tokens)
    skip = state.step + 1 in c.train.skip_steps
    if skip:
      state.optimizer.zero_grad()
    else:
      state.optimizer.step(factor, guard.factor(state.step, loss, norms["all"], ranks.own))
    if ranks.ranks > 1:
      clock.start("gather")
      ranks.send_weights(state.model)
    update_bias(state.model.routers, counts, 0.0 if skip else c.moe.bias_update_rate)
    state.step, state.tokens = state.step + 1, state.tokens + c.schedule.batch_tokens
    if state.step == begun + 1:
      garbage.settle()
    clock.start("log")
    watch.add(state, passes.flight.stop())
    watch.add_experts(state.step, passes.routing.stop())
    logs = due(state.step, c.train.log_every, end.step)
    evaluates = session.evaluations.due(state.step, end.step)
    kept = session.kept(state.tokens)
    saves = due(state.step, c.train.checkpoint_every, end.step) or kept
    if logs:
      last = targets.chunk(c.micro_batches)[-1]
      watch.log(state, StepValues(factor, loss, norms, counts, loss_T, last, batches.wait_s()))
    if evaluates:
      clock.start("eval")
      session.watchdog.enter("evaluating")
      watch.add(state, evaluated(session, state, end.step))
    if saves:
      clock.start("checkpoint")
      session.watchdog.enter("saving")
      save(session, state, watch, kept)
    if state.step == begun + 1:
      save_aside(session, state)
    if logs or evaluates or saves:
      gc.collect()
    session.profiler.step()
  session.watchdog.enter("stopping")
  if state.step < end.step:
    why = "before an amendment" if session.amends(state.tokens) else ""
    save(session, state, watch, why)
    session.watchdog.enter("stopping")  # and to write it
    return None
  if begun == end.step and ranks.any(not watch.evaluated(begun)):
    watch.add(state, evaluated(session, state, begun))
  session.checkpoints.wait()
  unigram = unigram_bpb(session.data, session.evaluations.validation)
  told = {"unigram_bpb": unigram, **session.evaluations.items}
  return watch.results(state) | told


def evaluated(session: Session, state: TrainState, last: int) -> dict[str, float]:
  """What is measured of the state, by tag, in the arithmetic of its tokens."""
  state.model.set_forward_bf16(session.config.finishing(state.tokens))
  alive = partial(session.watchdog.enter, "evaluating")
  return session.evaluations.values(state.step, last, state.model, alive)


def build(config: Config, target: Target, ranks: Parallel, root: Root | None = None) -> TrainState:
  """The model with its initial weights on the target's device, and its optimizer.

  root: where imported weights lie, if model.init names some.

  ConfigError, before anything is allocated, if a GPU has too little free memory for the run.
  """
  if target.device.type == "cuda":
    heap = 0 if ranks.rdep is None else ranks.rdep.nbytes  # of the plan, and there already
    free, total = torch.cuda.mem_get_info(target.device)
    misfit = fits(plan(config), total, free + heap)
    if misfit is not None:
      raise ConfigError(f"{target.name}: {misfit}")
  with torch.device("meta"):
    model = Model(config, target.ops, ranks.rdep)
  model.to_empty(device=target.device)
  model.init_weights(config.train.seed)
  if config.model.init == "seed":
    return TrainState(model, Optimizer(model, config, target.ops, ranks.owned))
  written = load_imported(model, config, ranks, root)
  optimizer = Optimizer(model, config, target.ops, ranks.owned)
  masters = optimizer.masters()
  if written.target.dtype == "fp32" and masters:  # what bf16 parameters do not hold of them
    checkpoint.fill(imported_at(config, root), 0, masters, ranks.first_expert)
  return TrainState(model, optimizer)


def load_imported(model: Model, config: Config, ranks: Parallel, root: Root) -> Config:
  """Fill the model with the weights that model.init names; the configuration they were stored with.

  CheckpointError if they are not there, damaged or of another model.
  """
  written = imported_config(config, root)
  checkpoint.load(imported_at(config, root), 0, model.state_dict(), ranks.first_expert)
  return written


def execute(
  options: argparse.Namespace,
  run: Run,
  experiments: Attempts | None,
  opened: Opened,
  meeting: Meeting,
) -> int:
  """Train one recorded run to its end on this rank; returns the exit status. Rank 0 holds the
  records. opened: how its data are opened. meeting: of its ranks.
  """
  startup = StartUp(options.since)
  startup.end("imports")
  root, declared = options.root, configs.loads(run.toml, f"run {run.id}")
  tokens = trained(Root(root), run)
  config = amended(declared, run.amendments, tokens)
  watchdog = watched_over(options, config)
  progress, recorded = watchdog.progress, experiments is not None and options.attempt > 0
  target = select_alike(config, meeting, options.local_rank, options.local_ranks)
  check_code(run.id, run.code_version)  # again: the target's kernels were imported
  startup.end("kernels")
  ranks = parallel.init(config, target, meeting, options.local_ranks)
  newest = partial(attempts.check_newest, root, run.id, options.attempt)
  data = opened(Root(root).data / run.data_digest, verify=options.rank == 0)
  prepared.check(config, data)
  meta = {"run": run.id, "fingerprint": run.fingerprint, "config": configs.to_toml(config)}
  session = Session(
    config=config,
    target=target,
    parallel=ranks,
    data=data,
    metrics=Metrics(root, run.id, ranks.rank),
    checkpoints=checkpoint.Writer(
      checkpoint.directory(root, run.id),
      config.train.keep_checkpoints,
      ranks.first_expert,
      ranks.saving,
      checkpoint.Fence(options.attempt, newest),
      watchdog.saved,
    ),
    evaluations=Evaluations(config, ranks, data, Root(root), run.id),
    meta=meta,
    profiler=Profiler(options.trace, config.steps, watchdog.enter),
    startup=startup,
    progress=progress,
    watchdog=watchdog,
    until=following(run.amendments, tokens),
    event=partial(experiments.event, run.id, options.attempt) if recorded else nothing,
    look=partial(postmortem.ask, root, run.id, options.attempt) if recorded else nothing,
    first=options.first,
  )
  startup.end("ranks_and_data")
  signal.signal(signal.SIGTERM, lambda *_: setattr(session, "stop", True))
  watchdog.enter("loading")
  state = build(config, target, ranks, Root(root))
  if options.attempt:
    look_closely(session, state)
  for name, error in resume(session, state, run.branch).items():
    session.event("corrupt", step=state.step, detail={"checkpoint": name, "error": error})
  if amended(declared, run.amendments, state.tokens) != config:
    raise RunError(f"step {state.step} is of an earlier schedule than the checkpoint after it")
  if experiments is not None:
    began(experiments, run, state, target)
  startup.end("model")
  if recorded:
    detail = of_start(options, startup, progress.before)
    experiments.started(run.id, options.attempt, state.step, socket.gethostname(), detail)
    session.replay = badsteps.pending(experiments.events(run.id))
    session.judge = partial(badsteps.decide, experiments, root, run, options.attempt)
  try:
    with flushed(session.metrics):
      results = watched(session, state)
  finally:
    faulthandler.cancel_dump_traceback_later()
  progress.enter("stopping", START_S)  # nothing but its records has a deadline now
  ranks.close()
  if experiments is not None:
    newest()
    conclude(experiments, run, session, state, results)
  return 0 if results is not None else INTERRUPTED


def conclude(
  records: Attempts, run: Run, session: Session, state: TrainState, results: dict[str, Any] | None
) -> None:
  """Record that the run is completed, or that it was told to leave."""
  tell_pruned(session)
  if results is not None:
    records.update_run(run.id, status="completed", results=results)
    return
  records.update_run(run.id, status="interrupted")
  session.event("amended" if session.amends(state.tokens) else "stop", step=state.step)


def began(records: Attempts, run: Run, state: TrainState, target: Target) -> None:
  """Record where the run is executed from here on; say what is another than before."""
  now = Start(state.step, socket.gethostname(), target.name, imported()[1])
  for before in records.starts(run.id)[-1:]:
    changes = now.changes(before)
    if changes:
      sys.stderr.write(f"continued at step {state.step} with {changes}\n")
  records.add_start(run.id, now)


def watched_over(options: argparse.Namespace, config: Config) -> Watchdog:
  """The deadlines of this rank and, on rank 0, its heartbeat. It is starting."""
  heartbeat = options.heartbeat if options.rank == 0 else None
  progress = Progress(options.progress if options.rank == 0 else None, heartbeat, options.attempt)
  watchdog = Watchdog(progress, config.launch.hang_s, config.train.log_every)
  watchdog.enter("starting")
  if options.attempt:
    sys.stderr.write(f"rank {options.rank} of {config.launch.ranks} on {socket.gethostname()}\n")
  return watchdog


def trained(root: Root, run: Run) -> int:
  """The tokens of the checkpoint that the run goes on from, as far as its manifest can be read."""
  folder = root.checkpoints(run.id)
  for step in reversed(root.checkpoint_steps(run.id)):
    try:
      return tokens_of(checkpoint.manifest(folder / f"step_{step:08d}"))
    except CheckpointError:
      continue  # resume says what is wrong with it
  return run.branch.tokens if run.branch is not None else 0


def look_closely(session: Session, state: TrainState) -> None:
  """Make the guard of a production run: against spikes, and with each rank's own gradients."""
  c, device, ranks = session.config, session.target.device, session.parallel
  session.guard = Guard(c.optim.clip_norm, device, c.prod.spike_sigma, c.prod.spike_window)
  state.more = session.guard.tensors()
  ranks.own = torch.zeros((), device=device) if ranks.ranks > 1 else None


def watched(session: Session, state: TrainState) -> dict[str, Any] | None:
  """`train`; in a production run a step that is bad is a BadStepError, with what it came to on all
  ranks, which leave together: an open group may abort the interpreter's end.
  """
  guard, ranks = session.guard, session.parallel
  try:
    with session.checkpoints, ranks.explained():
      return train(session, state, parts_of(session, state))
  except DivergedError as error:
    if guard is None:
      raise
    values = guard.kept.tolist()
    bad = BadStepError(str(error), int(guard.bad_step) + 1, ranks.gather(values) or [values])
    final = ranks.any(session.judge(bad))
    ranks.close()
    if final:
      raise
    raise bad from error


def of_start(
  options: argparse.Namespace, startup: StartUp, before: Heartbeat | None
) -> dict[str, Any]:
  """What the event of a start tells: how long it took, and the last sign of the ranks before; if
  they were of the same attempt, why they ended.
  """
  detail: dict[str, Any] = {"startup": startup.seconds}
  if before is None:
    return detail
  detail |= {"reached": before.entry.step, "reached_at": before.time}
  if before.attempt == options.attempt:
    detail |= postmortem.written(options.root, options.run, options.attempt, before=1)
  return detail


@contextmanager
def flushed(metrics: Metrics) -> Iterator[None]:
  """However the block ends, what was logged is on the disk then: but for an attempt that a newer
  one has replaced, which writes nothing.
  """
  try:
    yield
  except FencedError:
    raise
  except BaseException:
    metrics.flush()
    raise
  metrics.flush()


def attempt(options: argparse.Namespace, opened: Opened | None = None) -> int:
  """Execute the run and, on rank 0, own its record meanwhile: whatever fails is written there.

  opened: how its data are opened; None: anew.
  """
  opened, meeting = opened or open_data, Meeting.of(options)
  if options.rank > 0:
    run = shared_run(meeting)
    check_code(run.id, run.code_version)
    return execute(options, run, None, opened, meeting)
  with closing(Attempts(options.root)) as records:

    def claimed() -> Run:
      attempts.check_newest(options.root, options.run, options.attempt)
      return records.claim(options.run)

    try:
      run = shared_run(meeting, claimed)
    except CommError as error:  # it is claimed, and a rank did not come
      records.update_run(options.run, status="failed", error=str(error))
      raise
    records.wait_longer()
    try:
      check_code(run.id, run.code_version)
      if not records.starts(run.id) and not Root(options.root).checkpoint_steps(run.id):
        check_versions(run.id, run.environment)
      return execute(options, run, records, opened, meeting)
    except KeyboardInterrupt:
      records.update_run(run.id, status="interrupted", error="rank 0 got SIGINT")
      raise
    except BaseException as error:
      _record(records, run, options.attempt, error)
      raise


def _record(records: Attempts, run: Run, attempt: int, error: BaseException) -> None:
  """How the run failed. A newer attempt's run is not touched."""
  if not isinstance(error, FencedError):
    results = {"diverged": 1} if isinstance(error, DivergedError) else {}
    name = "" if isinstance(error, NmoeError) else f"{type(error).__name__}: "
    records.update_run(run.id, status="failed", results=results, error=f"{name}{error}")
  if isinstance(error, DivergedError):
    return  # nmoe.train.badsteps has told it
  if attempt and isinstance(error, (*FINAL, DiskFullError)):
    kind = "disk full" if isinstance(error, DiskFullError) else "refused"
    records.event(run.id, attempt, kind, detail={"error": str(error)})


def options(arguments: Sequence[str] | None = None, since: float = 0.0) -> argparse.Namespace:
  """What the command line says of a run, which began when this process was `since` seconds old."""
  p = parser("nmoe.train.loop")
  p.add_argument("--trace", type=Path, help="profile a few steps of this rank into this folder")
  p.add_argument(
    "--first", type=Path, help="save the state before and after the first step into this folder"
  )
  p.set_defaults(since=since)
  return p.parse_args(arguments)


def told(error: NmoeError) -> int:
  """Say what ended a run in its log; the exit status that says whether it can go on."""
  sys.stderr.write(f"error: {error}\n")
  if isinstance(error, DiskFullError):
    return INTERRUPTED
  return FAILED_FOR_GOOD if isinstance(error, FINAL) else 1


def leave(status: int) -> NoReturn:
  """End this process now: a thread of it that writes a checkpoint waits for the lost rank."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def main() -> int:
  try:
    return attempt(options())
  except CommError as error:
    leave(told(error))
  except NmoeError as error:
    return told(error)


if __name__ == "__main__":
  sys.exit(main())
