"""On the path of the processes of a production test. SIGUSR1 makes a rank hang. FAULT names others:

crash        no step can be taken
no sqlite    only rank 0 may open a database
no locks     file locks keep nobody out, as on a filesystem whose locks hold for one host
slow PATH    a checkpoint takes 40 s while PATH exists
stop PATH    rank 1 stops in the middle of a save, when all wait for it, and PATH goes
says K=V     this host's ranks say V of K when hosts are compared
halves N     no fault: from N tokens on all rates are half of the schedule's
no target    this host's ranks find no target
nan          the loss of step 41 is not finite
flip FILE    a gradient of rank 1 is not finite in step 41, once: as long as FILE is not there

On a GPU host whose torch is older than what we require its agent, before 2.12, gets no
shutdown_timeout.
"""

import fcntl
import inspect
import os
import signal
import sqlite3
import time
from importlib.metadata import version
from pathlib import Path

FAULT, _, MORE = os.environ.get("FAULT", "").partition(": ")
COMMAND = Path("/proc/self/cmdline").read_bytes().split(b"\0")
OF_RANK = b"nmoe.train.loop" in COMMAND or b"nmoe.bench.preflight" in COMMAND

signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))


def fail(*_, **__):
  raise RuntimeError("planted: no step can be taken")


def open_nothing(*_, **__):
  raise RuntimeError("planted: only rank 0 opens a database")


def slowly(seal):
  def sealed(path, meta, written):
    time.sleep(40 if Path(MORE).exists() else 0)
    seal(path, meta, written)

  return sealed


def stopping(save):
  def stops(*of):
    if os.environ["RANK"] == "1" and Path(MORE).exists():
      Path(MORE).unlink()
      time.sleep(5)  # the others come to their next save, which waits for this one
      os.kill(os.getpid(), signal.SIGSTOP)
    return save(*of)

  return stops


def saying(facts):
  key, _, value = MORE.partition("=")
  return lambda *of: facts(*of) | {key: value}


if b"stages.launch.agent" in COMMAND and tuple(map(int, version("torch").split(".")[:2])) < (2, 12):
  from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

  if "shutdown_timeout" not in inspect.signature(LocalElasticAgent.__init__).parameters:
    init = LocalElasticAgent.__init__
    LocalElasticAgent.__init__ = lambda self, *of, shutdown_timeout, **more: init(self, *of, **more)

if FAULT == "no locks":
  fcntl.flock = lambda *_: None
if FAULT == "no sqlite" and os.environ.get("RANK", "0") != "0":
  sqlite3.connect = open_nothing
if FAULT == "crash" and OF_RANK:
  from nmoe.train import schedule

  schedule.lr_factor = fail
if FAULT == "halves" and OF_RANK:
  from nmoe.train import schedule

  lr_factor = schedule.lr_factor
  schedule.lr_factor = lambda tokens, *of: lr_factor(tokens, *of) / (1 + (tokens >= int(MORE)))
if FAULT == "slow" and OF_RANK:
  from nmoe.records import checkpoint

  checkpoint._seal = slowly(checkpoint._seal)
if FAULT == "stop" and OF_RANK:
  from nmoe.records import checkpoint

  checkpoint.save = stopping(checkpoint.save)
if FAULT == "says" and OF_RANK:
  from nmoe.distributed import hosts

  hosts.facts = saying(hosts.facts)
if FAULT == "no target" and OF_RANK:
  from nmoe.distributed import hosts
  from nmoe.errors import TargetError

  def refuse(*_):
    raise TargetError("planted: no target here")

  hosts.select = refuse
if FAULT in ("nan", "flip") and OF_RANK:
  from nmoe.distributed.buckets import Shared
  from nmoe.train.passes import Passes

  passes, reduce_bucket, at = Passes.__call__, Shared.reduce_bucket, {}

  def planted(self, tokens, targets):
    at["step"] = self.state.step + 1
    loss, *more = passes(self, tokens, targets)
    return loss * (float("nan") if FAULT == "nan" and at["step"] == 41 else 1), *more

  def flipped(self, number, grads, *total):
    if os.environ["RANK"] == "1" and at["step"] == 41 and not Path(MORE).exists():
      Path(MORE).touch()
      next(iter(grads.values())).view(-1)[0] = float("nan")
    reduce_bucket(self, number, grads, *total)

  Passes.__call__ = planted
  if FAULT == "flip":
    Shared.reduce_bucket = flipped
