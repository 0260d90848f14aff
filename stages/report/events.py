"""An event of a production run in words: for a terminal's line and for a report's row."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from nmoe.records.attempts import Event

SENTENCES = ("why", "reason", "error")  # details of an event that need no name
# bits of a bad step, and what `_words` sums up
LEFT_OUT = ("values", "startup", "at_tokens", "key", "value", "who", "time")


def words(event: Event) -> str:
  """An event as a line: when, where, what, and its details."""
  where, detail = f"attempt {event.attempt}, step {event.step}", details(event)
  return f"{when(event)} UTC, {where}: {kind(event)}" + (f": {detail}" if detail else "")


def when(event: Event) -> str:
  """Date and time, in UTC."""
  return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))


def kind(event: Event) -> str:
  """What happened, of which rank if it is of one."""
  rank = f" of rank {event.rank}" if event.kind in ("straggler", "hardware") else ""
  return f"{event.kind}{rank}"


def details(event: Event) -> str:
  """Its details without the marks of Python; "" if there are none."""
  return _words(event.detail)


def _words(detail: Mapping[str, Any]) -> str:
  parts = []
  if startup := detail.get("startup"):
    long = {name.replace("_", " "): s for name, s in startup.items() if s >= 0.05}
    phases = ", ".join(f"{name} {s:.1f} s" for name, s in long.items())
    parts.append(f"trains after {sum(startup.values()):.1f} s ({phases})")
  if "reached_at" in detail:
    seen = time.strftime("%H:%M:%S", time.gmtime(detail["reached_at"]))
    parts.append(f"those before reached step {detail['reached']} and were last seen at {seen}")
  if detail.get("suspect", -1) >= 0:
    parts.append(f"suspect: rank {detail['suspect']}")
  if "at_tokens" in detail:
    parts.append(f"{detail['key']} = {detail['value']} from {detail['at_tokens']:,} tokens on")
  done = ("reached", "reached_at", "suspect", *LEFT_OUT)
  for key, value in detail.items():
    text = "" if key in done else _value(value)
    if text:
      parts.append(text if key in SENTENCES else f"{key.replace('_', ' ')} {text}")
  return "; ".join(parts)


def _value(value: Any) -> str:
  if isinstance(value, Mapping):
    return _words(value)
  if isinstance(value, list):
    return ", ".join(map(_value, value))
  if isinstance(value, float):
    return f"{value:.4g}" if math.isfinite(value) else str(value)
  return "" if value is None else str(value)
