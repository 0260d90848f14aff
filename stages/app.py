"""A command line whose own errors are one message, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys

import typer
from typer.core import TyperGroup

from kernels.errors import KernelError
from nmoe.errors import NmoeError
from stages.interrupts import interruptible, status
from stages.text import visible

FULL = (errno.ENOSPC, errno.EDQUOT)


class Commands(TyperGroup):
  """Commands that Ctrl-C and SIGTERM end alike, each with its own exit status."""

  def invoke(self, ctx: typer.Context) -> object:
    try:
      with interruptible():
        return super().invoke(ctx)
    except KeyboardInterrupt as interrupt:
      raise typer.Exit(status(interrupt)) from interrupt


class App(typer.Typer):
  """A Typer whose own errors are one message and status 1, never a traceback; with that of a signal
  if an interrupt is the error's cause.
  """

  def __call__(self, *args: object, **kwargs: object) -> object:
    for stream in (sys.stdout, sys.stderr):
      if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # "?" for what a terminal has no character for
    try:
      return super().__call__(*args, **kwargs)
    except (NmoeError, KernelError) as error:
      typer.secho(f"error: {visible(str(error))}", err=True, fg="red")
      raise SystemExit(status(error.__cause__)) from error
    except OSError as error:
      if error.errno not in FULL:
        raise
      where = error.filename or "the output of this command"
      typer.secho(f"error: {visible(str(where))}: {error.strerror}; free space", err=True, fg="red")
      silence()
      raise SystemExit(1) from error


def silence() -> None:
  """Let go of what standard output could not take: the interpreter would try again at its end."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
