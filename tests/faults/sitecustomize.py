"""On the path of the ranks of production tests: SIGUSR1 makes one hang, FAULT=crash fails its step,
FAULT=flip: FILE makes a gradient of rank 1 NaN, once, in step 41; FAULT=nan: every loss of step 41.
"""

import os
import signal
import time
from pathlib import Path

signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))

if os.environ.get("FAULT") == "crash":
  from nmoe.train import schedule

  def crash(*_):
    raise RuntimeError("planted: no step can be taken")

  schedule.lr_factor = crash

FAULT, _, MORE = os.environ.get("FAULT", "").partition(": ")
OF_RANK = "nmoe.train.loop" in Path("/proc/self/cmdline").read_text()
STEP = 41

if FAULT in ("flip", "nan") and OF_RANK:
  from nmoe.distributed.parallel import Shared
  from nmoe.train.passes import Passes

  passes, reduce_bucket, at = Passes.__call__, Shared.reduce_bucket, {}

  def planted(self, tokens, targets):
    at["step"] = self.state.step + 1
    loss, *more = passes(self, tokens, targets)
    return loss * (float("nan") if FAULT == "nan" and at["step"] == STEP else 1), *more

  def flipped(self, number, grads, *total):
    if os.environ["RANK"] == "1" and at["step"] == STEP and not Path(MORE).exists():
      Path(MORE).touch()
      next(iter(grads.values())).view(-1)[0] = float("nan")
    reduce_bucket(self, number, grads, *total)

  Passes.__call__ = planted
  if FAULT == "flip":
    Shared.reduce_bucket = flipped
