"""Checkpoints of a run: begun between steps, resumed from at the start."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from nmoe.config import file as configs
from nmoe.config.sections import Config, diff, kind
from nmoe.errors import CheckpointError, CorruptError
from nmoe.records import checkpoint
from nmoe.records.reader import Branch
from nmoe.train.schedule import tokens_of
from nmoe.train.session import Session, TrainState
from nmoe.train.watch import Watch


def save(session: Session, state: TrainState, watch: Watch, permanent: str = "") -> None:
  """Begin a checkpoint of the state, after every step so far is known to be finite. permanent: why
  it is kept for good, "" if it is not.

  The loop waits for the write before, if it is still under way, and for the copy; this stall is
  logged. The metrics are on disk before the checkpoint is.
  """
  watch.guard.check(int(watch.guard.bad_step))
  begun, writer = time.perf_counter(), session.checkpoints
  writer.wait()
  tell_pruned(session)
  checkpoint.by_rank_0(writer.fence.check, session.parallel.saving)
  if writer.keep == 0 or state.step in checkpoint.steps(writer.folder):
    session.metrics.flush()
    return
  writer.copy(_tensors(session, state))
  watch.add(state, {"checkpoint/stall_s": time.perf_counter() - begun})
  session.metrics.flush()
  more = {"permanent": permanent} if permanent else {}
  writer.start(state.step, meta(session, state) | more)
  if permanent:
    session.event("permanent", step=state.step, detail={"why": permanent})


def tell_pruned(session: Session) -> None:
  """Checkpoints that gave way on a full disk are an event."""
  for step, error in session.checkpoints.pruned:
    session.event("pruned", step=step, detail={"error": error})
  session.checkpoints.pruned.clear()


def save_aside(session: Session, state: TrainState) -> None:
  """Write the state into the session's folder for the first step's, if it has one; waits for the
  checkpoint under way, which speaks over the same group.
  """
  if session.first is not None:
    ranks = session.parallel
    session.checkpoints.wait()
    checkpoint.save(
      session.first,
      state.step,
      _tensors(session, state),
      ranks.first_expert,
      meta(session, state),
      ranks.saving,
    )


def _tensors(session: Session, state: TrainState) -> dict[str, Tensor]:
  """What a checkpoint holds, once the weights that other ranks own have come."""
  session.parallel.arrive()
  return state.tensors()


def meta(session: Session, state: TrainState) -> dict[str, Any]:
  """What the manifest of a checkpoint says beside the step."""
  samples = state.tokens // session.config.data.seq_len
  return session.meta | {"tokens": state.tokens, "samples": samples}


def resume(session: Session, state: TrainState, branch: Branch | None = None) -> dict[str, str]:
  """Load the newest checkpoint, and forget the metrics logged after it. A run that has none begins
  with the one of its branch, if it has one, which is read only.

  An attempt of a production run sets corrupt ones aside and takes the newest that is whole; returns
  what was wrong with each. Raises CheckpointError if a checkpoint is of another identity, or is not
  the branch's any more, and for a corrupt one of a run without attempts.
  """
  writer, corrupt = session.checkpoints, {}
  folder = writer.folder
  while steps := checkpoint.steps(folder):
    try:
      _load(session, state, folder, steps[-1], session.meta["run"])
      break
    except CorruptError as error:
      if writer.fence.attempt == 0:
        raise
      path = folder / f"step_{steps[-1]:08d}"
      sys.stderr.write(f"set aside: {error}\n")
      checkpoint.set_aside(path, session.parallel.saving)
      corrupt[path.name] = str(error)
  else:
    if branch is not None:
      trunk = folder.parent / branch.trunk
      written = _load(session, state, trunk, branch.step, branch.trunk, branch)
      if checkpoint.digest(written) != branch.sha256:
        raise CheckpointError(
          f"{folder.parent / branch.trunk} has another checkpoint of step {branch.step} than when "
          "this run was recorded; start a new run from it"
        )
  session.startup.rewound = session.metrics.rewind(state.step)
  return corrupt


def _load(
  session: Session,
  state: TrainState,
  folder: Path,
  step: int,
  run_id: str,
  branch: Branch | None = None,
) -> dict[str, Any]:
  """The state of a checkpoint, in place; its manifest. branch: what it is the beginning of."""
  path, group = folder / f"step_{step:08d}", session.parallel.saving
  checkpoint.verify_together(path, group)
  written = checkpoint.manifest(path)
  if written["run"] != run_id:
    raise CheckpointError(f"{path} is of run {written['run']}, this is {run_id}; move it away")
  known = branch.changed if branch is not None else {}
  check_identity(configs.loads(written["config"]), session.config, folder, known)
  checkpoint.fill(folder, step, state.tensors(), session.parallel.first_expert, group)
  state.step, state.tokens = step, tokens_of(written)
  return written


def check_identity(
  written: Config, wanted: Config, folder: Path, known: Collection[str] = ()
) -> None:
  """CheckpointError listing the identity keys that differ from those of the checkpoint, if any
  does; other keys that differ, and those `known` to, are said to be in the log.
  """
  lines: dict[str, list[str]] = {"identity": [], "schedule": [], "free": []}
  for key, (before, now) in diff(written, wanted).items():
    what = "free" if key in known else kind(key)
    lines[what].append(f"{key}: checkpoint {before!r}, now {now!r}")
  if lines["identity"]:
    raise CheckpointError(
      f"{folder} holds another model: {'; '.join(lines['identity'])}; restore these keys or start "
      "a new run"
    )
  for line in lines["schedule"] + lines["free"]:
    sys.stderr.write(f"resumed under {line}\n")
