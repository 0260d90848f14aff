"""How the runs of a command are shown while they run: bars on a terminal, else plain lines."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from nmoe.train.progress import LINE_S, Entry


class Display:
  """A context: lines of runs, for as long as it is open."""

  def __init__(self, console: Console):
    self.console = console
    self.bars = Progress(
      TextColumn("{task.description:<18}"),
      BarColumn(bar_width=30),
      TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
      TextColumn("{task.fields[note]}"),
      console=console,
      disable=not console.is_terminal,
    )

  def __enter__(self) -> Display:
    self.bars.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.bars.stop()

  def say(self, text: str) -> None:
    """A line of its own, which stays."""
    self.console.print(text, markup=False, highlight=False, soft_wrap=True)

  def line(self, label: str, total: int, note: str) -> Line:
    """Show a run of `total` steps from now on."""
    return Line(self, label, total, note)


DOES = {  # what a run does beside its steps
  "loading": "loads",
  "saving": "saves its state",
  "evaluating": "evaluates",
  "profiling": "writes its profile",
  "sampling": "writes samples",
  "stopping": "writes its end",  # its last checkpoint among it
}


class Line:
  """One run's. Without a terminal it is printed at the first step, the last, and every LINE_S."""

  def __init__(self, display: Display, label: str, total: int, note: str):
    self.display, self.label, self.last = display, label, note
    self.entry: Entry | None = None
    self._task = display.bars.add_task(escape(label), total=total, note=escape(note))
    self._state, self._note = "", note
    self._came = self._printed = self._entered = time.monotonic()

  def follow(self, entry: Entry) -> None:
    """A step was logged."""
    self.last, self._came, first = str(entry), time.monotonic(), self.entry is None
    self.entry = entry
    self._note = self.last.split("  ", 1)[1]
    self.display.bars.update(self._task, completed=entry.step, total=entry.total, note=self._note)
    if first or entry.step == entry.total:
      self._print(self.last)
    else:
      self.idle(state=self._state)

  def idle(self, failure: str = "", state: str = "") -> None:
    """To be called often: says at once that a rank failed, and what the run does if it was silent
    for LINE_S. state: of nmoe.records.heartbeat.STATES; "": it told none.
    """
    if failure and failure != self.last:
      self.last, self._came = failure, time.monotonic()
      self.display.say(f"{self.label}: {failure}")
    now, does = time.monotonic(), "" if failure else DOES.get(state, "")
    if state != self._state:
      self._state, self._entered = state, now
      note = ", ".join(filter(None, (self._note, does)))
      self.display.bars.update(self._task, note=escape(note))
    if now - self._printed >= LINE_S:
      age = now - (self._entered if does else self._came)
      told = f"{self.last}, {does}  ({age:.0f} s)" if does else f"{self.last}  ({age:.0f} s ago)"
      self._print(told if age >= 1 else self.last)

  def end(self, note: str) -> None:
    """The run has ended, as `note` says."""
    self.display.bars.update(self._task, note=escape(note))
    self._print(note)

  def _print(self, text: str) -> None:
    self._printed = time.monotonic()
    if not self.display.console.is_terminal:
      self.display.say(f"{self.label}: {text}")
