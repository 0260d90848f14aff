"""On the path of the ranks of test_faults: SIGUSR1 makes one hang, FAULT=crash fails its step."""

import os
import signal
import time

signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))

if os.environ.get("FAULT") == "crash":
  from nmoe.train import schedule

  def crash(*_):
    raise RuntimeError("planted: no step can be taken")

  schedule.lr_factor = crash
