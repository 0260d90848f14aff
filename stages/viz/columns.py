"""Curves as a browser draws them: on one x, at most two points a pixel, as binary columns."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]  # x ascending, y; float64 [n]


def joined(curves: Sequence[Curve], pixels: int) -> tuple[np.ndarray, list[np.ndarray]]:
  """x [m] and one y [m] a curve, NaN where a curve has no point; m ≤ 2 · pixels.

  Few points stand as they are. Many are put in `pixels` equal bins, in each of which a curve keeps
  its least and its largest value, so that spikes survive.
  """
  curves = [(x, y) for x, y in curves]
  filled = [x for x, _ in curves if len(x)]
  if not filled:
    return np.empty(0), [np.empty(0) for _ in curves]
  every = np.unique(np.concatenate(filled))
  if len(every) > 2 * pixels:
    return _binned(curves, float(every[0]), float(every[-1]), pixels)
  ys = [np.full(len(every), np.nan) for _ in curves]
  for y, (at, values) in zip(ys, curves, strict=True):
    y[np.searchsorted(every, at)] = values
  return every, ys


def _binned(
  curves: Sequence[Curve], low: float, high: float, pixels: int
) -> tuple[np.ndarray, list[np.ndarray]]:
  width = (high - low) / pixels
  x = low + width * (np.arange(2 * pixels) / 2 + 0.25)
  ys = []
  for at, values in curves:
    y = np.full(2 * pixels, np.nan)
    if len(at):
      places = np.minimum(((at - low) / width).astype(np.int64), pixels - 1)
      starts = np.flatnonzero(np.diff(places, prepend=-1))
      first = 2 * places[starts]
      y[first] = np.fmin.reduceat(values, starts)
      y[first + 1] = np.fmax.reduceat(values, starts)
    ys.append(y)
  return x, ys


@dataclass(frozen=True)
class Panel:
  """One plot: `names[i]` tells what `curves[i]` is of."""

  tag: str
  names: Sequence[dict[str, str | int]]
  curves: Sequence[Curve]


def pack(panels: Sequence[Panel], pixels: int) -> bytes:
  """A header's length (uint32), the header (JSON, padded so that what follows starts at a multiple
  of 8), every x as float64, then every y as float32; all little-endian.

  The header: [{tag, length, curves: [{**name, last: [x, y] or null}]}], in the columns' order; y is
  in words where it is no number.
  """
  header, xs, ys = [], [], []
  for panel in panels:
    x, columns = joined(panel.curves, pixels)
    lasts = [[float(a[-1]), _told(float(b[-1]))] if len(a) else None for a, b in panel.curves]
    curves = [{**name, "last": last} for name, last in zip(panel.names, lasts, strict=True)]
    header.append({"tag": panel.tag, "length": len(x), "curves": curves})
    xs.append(x.astype("<f8").tobytes())
    with np.errstate(over="ignore"):  # beyond fp32 is infinite
      ys += [column.astype("<f4").tobytes() for column in columns]
  return framed(header, xs + ys)


def framed(header: object, columns: Sequence[bytes]) -> bytes:
  """The header's length, the header, the columns."""
  text = json.dumps(header).encode()
  text += b" " * (-(len(text) + 4) % 8)
  return b"".join([struct.pack("<I", len(text)), text, *columns])


def _told(value: float) -> float | str:
  if math.isnan(value):
    return "NaN"
  return value if math.isfinite(value) else "∞" if value > 0 else "−∞"
