"""Plots as SVG: a figure is panels, a panel is marks on two axes.

They stand in the page as its text does: nothing is left to be drawn when the page is open, and they
print. `static/report.js` only says what lies under the pointer. Lengths are in pixels of a page
that is WIDTH wide; inks are those of the page's style.

One thing, and so one file: what a mark looks like depends on the axes, and the axes on the marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, GAP = 1016, 28
TOP, BOTTOM, RIGHT = 26, 40, 12  # of a panel's area to its edges; on the left stand the labels
CHARACTER = 6.3  # mean width of one, in labels of 11.5 px
PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
Range = tuple[float, float]


@dataclass(frozen=True)
class Area:
  """The inside of a panel: from values to pixels right of and below its upper left corner."""

  x_range: Range
  y_range: Range
  width: float
  height: float

  def x(self, value: float) -> float:
    return self.width * (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0])

  def y(self, value: float) -> float:
    return self.height * (self.y_range[1] - value) / (self.y_range[1] - self.y_range[0])

  def points(self, xs: Iterable[float], ys: Iterable[float]) -> str:
    pairs = zip(xs, ys, strict=True)
    return " ".join(f"{self.x(float(x)):.1f},{self.y(float(y)):.1f}" for x, y in pairs)


@dataclass(frozen=True)
class Shades:
  """A scale of colours: stops at shares of [low, high], between them a mixture."""

  title: str
  stops: Sequence[tuple[float, str]]
  low: float
  high: float

  def color(self, value: float) -> str:
    share = min(1.0, max(0.0, (value - self.low) / ((self.high - self.low) or 1.0)))
    for (a, first), (b, last) in pairwise(self.stops):
      if share <= b:
        t = (share - a) / (b - a)
        mixed = (round(p + t * (q - p)) for p, q in zip(_rgb(first), _rgb(last), strict=True))
        return "#" + "".join(f"{part:02x}" for part in mixed)
    return self.stops[-1][1]

  def html(self) -> str:
    """The scale with its ends, for a legend."""
    stops = ", ".join(f"{color} {share:.0%}" for share, color in self.stops)
    low, high = (escape(number(end, (self.high - self.low) / 20)) for end in (self.low, self.high))
    bar = f'<i class="shades" style="background:linear-gradient(90deg,{stops})"></i>'
    return f"<span>{escape(self.title)} {low} {bar} {high}</span>"


@dataclass(frozen=True)
class Curve:
  """A line through points; a value that is not finite is a gap. One or two points are dots too."""

  x: Sequence[float]
  y: Sequence[float]
  color: str
  name: str = ""
  width: float = 1.8
  dash: str = ""
  opacity: float = 1.0

  def svg(self, area: Area) -> str:
    x, y = np.asarray(self.x, np.float64), np.asarray(self.y, np.float64)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    parts = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else []
    dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
    style = f'stroke="{self.color}" stroke-width="{self.width}"{dash} opacity="{self.opacity}"'
    lines = [
      f'<polyline data-name="{escape(self.name)}" {style} points="{area.points(x[p], y[p])}"/>'
      for p in parts
    ]
    alone = known if len(known) < 3 else known[:0]
    return "".join(lines) + Dots(x[alone], y[alone], [self.color], size=5).svg(area)


@dataclass(frozen=True)
class Band:
  """What lies between two curves, in a faint colour."""

  x: Sequence[float]
  low: Sequence[float]
  high: Sequence[float]
  color: str

  @property
  def y(self) -> np.ndarray:
    return np.concatenate([self.low, self.high])

  def svg(self, area: Area) -> str:
    x, low, high = (np.asarray(of, np.float64) for of in (self.x, self.low, self.high))
    known = np.isfinite(low) & np.isfinite(high)
    around = area.points([*x[known], *x[known][::-1]], [*high[known], *low[known][::-1]])
    return f'<polygon fill="{self.color}" fill-opacity="0.18" points="{around}"/>'


@dataclass(frozen=True)
class Dots:
  """Points in one colour or each in its own, a text each for the pointer, bars of ± `half`."""

  x: Sequence[float]
  y: Sequence[float]
  colors: Sequence[str]
  name: str = ""
  size: float = 8
  shape: str = "circle"  # or "diamond", or "open": a diamond's edge
  tips: Sequence[str] = ()
  half: float = 0.0
  opacity: float = 1.0

  def svg(self, area: Area) -> str:
    return "".join(self._one(area, i) for i in range(len(self.x)))

  def _one(self, area: Area, i: int) -> str:
    x, y, r = area.x(float(self.x[i])), area.y(float(self.y[i])), self.size / 2
    color = self.colors[i % len(self.colors)]
    bar = ""
    if self.half:
      ends = [area.x(float(self.x[i]) + sign * self.half) for sign in (-1, 1)]
      caps = "".join(f"M{at:.1f} {y - 4:.1f}v8" for at in ends)
      path = f"M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}{caps}"
      bar = f'<path d="{path}" stroke="{color}" stroke-width="2" fill="none"/>'
    paint = (
      f'fill="none" stroke="{color}" stroke-width="1.6"'
      if self.shape == "open"
      else f'fill="{color}"'
    )
    if self.shape == "circle":
      mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" {paint}'
    else:
      mark = f'<path d="M{x:.1f} {y - r:.1f}l{r:g} {r:g}l-{r:g} {r:g}l-{r:g} -{r:g}z" {paint}'
    return bar + _tipped(f'{mark} opacity="{self.opacity}"', self.tips[i] if self.tips else "")


@dataclass(frozen=True)
class Bars:
  """Lying bars, one a row: (row, begin, length, text inside, text for the pointer)."""

  bars: Sequence[tuple[int, float, float, str, str]]
  color: str
  name: str = ""
  thick: float = 0.55

  @property
  def x(self) -> list[float]:
    return [end for _, begin, length, _, _ in self.bars for end in (begin, begin + length)]

  @property
  def y(self) -> list[float]:
    return []

  def svg(self, area: Area) -> str:
    parts = []
    for row, begin, length, text, tip in self.bars:
      x, width = area.x(begin), area.x(begin + length) - area.x(begin)
      top, bottom = (area.y(row + side * self.thick / 2) for side in (-1, 1))
      place = f'x="{x:.1f}" y="{top:.1f}" width="{max(width, 0.5):.1f}" height="{bottom - top:.1f}"'
      parts.append(_tipped(f'<rect {place} fill="{self.color}"', tip))
      if text and width > CHARACTER * len(text):
        where = f'x="{x + width / 2:.1f}" y="{area.y(row) + 4:.1f}" text-anchor="middle"'
        parts.append(f'<text {where} style="fill:{_over(self.color)}">{escape(text)}</text>')
    return "".join(parts)


@dataclass(frozen=True)
class Cells:
  """A map: rows from 0 down × columns between edges; a value that is not finite is left blank."""

  values: np.ndarray
  edges: Sequence[float]
  shades: Shades
  tips: Sequence[Sequence[str]]
  texts: Sequence[Sequence[str]] = ()
  space: float = 0.0  # pixels between two cells

  @property
  def x(self) -> Sequence[float]:
    return self.edges

  @property
  def y(self) -> list[float]:
    return []

  def svg(self, area: Area) -> str:
    rows, columns = self.values.shape
    return "".join(self._cell(area, r, c) for r in range(rows) for c in range(columns))

  def _cell(self, area: Area, r: int, c: int) -> str:
    value = float(self.values[r, c])
    if not math.isfinite(value):
      return ""
    x, right, y = area.x(self.edges[c]), area.x(self.edges[c + 1]), area.y(r - 0.5)
    # cells without space overlap by a little, so that no hairline shows between them
    width = right - x - self.space if self.space else right - x + 0.4
    height = area.y(r + 0.5) - y - self.space / 2 + (0 if self.space else 0.4)
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    color = self.shades.color(value)
    cell = _tipped(f'<rect {place} fill="{color}"', self.tips[r][c])
    if not self.texts:
      return cell
    where = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle"'
    text = escape(self.texts[r][c])
    return cell + f'<text {where} style="fill:{_over(color)};pointer-events:none">{text}</text>'


@dataclass(frozen=True)
class Rule:
  """An upright line, with what it says above it."""

  x: float
  color: str = "var(--ink)"
  dash: str = ""
  text: str = ""


Mark = Curve | Band | Dots | Bars | Cells


@dataclass(frozen=True)
class Panel:
  """Marks on two axes. `rows` and `columns`: names, where an axis has no numbers; 0 is the upper
  or left one. A range is that of the marks where none is given.
  """

  marks: Sequence[Mark]
  title: str = ""
  x: str = ""
  y: str = ""
  x_range: Range | None = None
  y_range: Range | None = None
  rows: Sequence[str] = ()
  columns: Sequence[str] = ()
  rules: Sequence[Rule] = ()


@dataclass(frozen=True)
class Figure:
  """Panels of one height (the whole figure's, for a row of them), side by side up to `across`."""

  panels: Sequence[Panel]
  height: int
  across: int = 3
  scale: Shades | None = None
  key: bool = True  # whether names of marks are listed

  def html(self, name: str) -> str:
    """The figure under an id of the page."""
    across = min(self.across, len(self.panels))
    width = (WIDTH - GAP * (across - 1)) / across
    drawn = "".join(_svg(panel, width, self.height) for panel in self.panels)
    style = f"grid-template-columns:repeat({across},1fr)"
    return (
      f'<div class="figure" id="{escape(name)}">{self._legend()}'
      f'<div class="panels" style="{style}">{drawn}</div></div>'
    )

  def _legend(self) -> str:
    named: dict[str, str] = {}
    for mark in (mark for panel in self.panels for mark in panel.marks if self.key):
      if not isinstance(mark, (Band, Cells)) and mark.name not in named and mark.name:
        named[mark.name] = _swatch(mark)
    items = [f"<span>{swatch}{escape(name)}</span>" for name, swatch in named.items()]
    items += [self.scale.html()] if self.scale else []
    return f'<div class="legend">{"".join(items)}</div>' if items else ""


def _swatch(mark: Curve | Dots | Bars) -> str:
  if isinstance(mark, Curve):
    kind = "dotted" if mark.dash else "solid"
    return f'<i class="line" style="border-top:2px {kind} {mark.color}"></i>'
  color = mark.color if isinstance(mark, Bars) else mark.colors[0]
  return f'<i class="{"bar" if isinstance(mark, Bars) else "dot"}" style="background:{color}"></i>'


def _svg(panel: Panel, width: float, height: float) -> str:
  """One panel: title, axes with their grid and numbers, and its marks, cut at its edges."""
  levels = _levels(panel, width)
  top = TOP + (14 * (max(levels) + 1) if any(rule.text for rule in panel.rules) else 0)
  tall = height - top - BOTTOM
  y_range = panel.y_range or _extent([m.y for m in panel.marks if len(m.y)], 0.06)
  y_ticks = [] if panel.rows else ticks(*y_range, max(2, int(tall / 38)))
  names = panel.rows or labels(y_ticks)
  left = 10 + CHARACTER * max((len(name) for name in names), default=0) + (16 if panel.y else 0)
  wide = width - left - RIGHT
  dotted = any(isinstance(mark, Dots) for mark in panel.marks)
  area = Area(
    _columns(panel.columns) or panel.x_range or _extent([m.x for m in panel.marks], 0.05 * dotted),
    (len(panel.rows) - 0.5, -0.5) if panel.rows else y_range,
    wide,
    tall,
  )
  words = max(1, max(map(len, panel.columns), default=0)) * CHARACTER
  x_ticks = [] if panel.columns else ticks(*area.x_range, max(2, int(wide / 76)))
  x_names = panel.columns or labels(x_ticks)
  x_places = [area.x(v) for v in (range(len(x_names)) if panel.columns else x_ticks)]
  every = math.ceil(words * len(x_names) / wide) if panel.columns else 1
  parts = [f'<text class="title" x="{left:.1f}" y="12">{escape(panel.title)}</text>']
  for place, name in list(zip(x_places, x_names, strict=True))[::every]:
    mark = "" if panel.columns else f'<path class="tick" d="M{place:.1f} {tall:.1f}v4"/>'
    parts.append(f"<g transform='translate({left:.1f} {top})'>{mark}")
    parts.append(_text(place, tall + 17, name, "middle") + "</g>")
  y_places = [area.y(v) for v in (range(len(names)) if panel.rows else y_ticks)]
  for place, name in zip(y_places, names, strict=True):
    parts.append(_text(left - 6, top + place + 4, name, "end"))
  grid = "".join(f"M0 {place:.1f}H{wide:.1f}" for place in (() if panel.rows else y_places))
  inside = f'<rect class="area" width="{wide:.1f}" height="{tall:.1f}"/>'
  inside += f'<path class="grid" d="{grid}"/>' if grid else ""
  inside += "".join(mark.svg(area) for mark in panel.marks)
  inside += "".join(
    f'<path d="M{area.x(r.x):.1f} 0v{tall:.1f}" stroke="{r.color}" stroke-dasharray="{r.dash}"/>'
    for r in panel.rules
  )
  across = " ".join(f"{end:.9g}" for end in (*area.x_range, *area.y_range))
  place = f'x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{tall:.1f}"'
  parts.append(f'<svg class="plot" {place} data-range="{across}">{inside}</svg>')
  for rule, level in zip(panel.rules, levels, strict=True):
    parts.append(_rule_text(rule, level, area, left, top))
  parts.append(f'<path class="axis" d="M{left:.1f} {top + tall:.1f}h{wide:.1f}"/>')
  parts.append(_text(left + wide / 2, height - 4, panel.x, "middle"))
  if panel.y:
    turn = f'transform="translate(11 {top + tall / 2:.1f}) rotate(-90)"'
    parts.append(f'<text {turn} text-anchor="middle">{escape(panel.y)}</text>')
  parts.append(f'<text class="say" x="{width - RIGHT:.1f}" y="12" text-anchor="end"></text>')
  label = escape(panel.title or panel.x)
  box = f'viewBox="0 0 {width:.0f} {height}" style="max-width:{1.3 * width:.0f}px"'
  return f'<svg role="img" aria-label="{label}" {box}>{"".join(parts)}</svg>'


def _levels(panel: Panel, width: float) -> list[int]:
  """For each rule the line above the panel that its text stands on: texts do not overlap."""
  if not any(rule.text for rule in panel.rules) or panel.x_range is None:
    return [0] * len(panel.rules)
  low, high = panel.x_range
  ends: list[float] = []
  levels = []
  for rule in sorted(panel.rules, key=lambda rule: rule.x):
    half = CHARACTER * len(rule.text) / 2 + 4
    at = width * (rule.x - low) / (high - low)
    level = next((i for i, end in enumerate(ends) if at - half > end), len(ends))
    ends[level : level + 1] = [at + half]
    levels.append((rule, level))
  return [next(level for other, level in levels if other is rule) for rule in panel.rules]


def _rule_text(rule: Rule, level: int, area: Area, left: float, top: float) -> str:
  half = CHARACTER * len(rule.text) / 2
  at = min(max(area.x(rule.x), half), area.width - half)
  return _text(left + at, top - 5 - 14 * level, rule.text, "middle")


def _text(x: float, y: float, text: str, anchor: str) -> str:
  if not text:
    return ""
  return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _tipped(start: str, tip: str) -> str:
  """An element that was begun, ended; with a text that a browser shows under the pointer."""
  if not tip:
    return f"{start}/>"
  return f"{start}><title>{escape(tip)}</title></{start[1 : start.index(' ')]}>"


def _columns(names: Sequence[str]) -> Range | None:
  return (-0.5, len(names) - 0.5) if names else None


def _extent(values: Sequence[Sequence[float]], margin: float) -> Range:
  """Of all finite values, with a margin; around one value some room."""
  every = np.concatenate([np.asarray(of, np.float64) for of in values] or [np.zeros(0)])
  every = every[np.isfinite(every)]
  if not len(every):
    return 0.0, 1.0
  low, high = float(every.min()), float(every.max())
  if low == high:
    room = 0.05 * abs(low) or 0.5
    return low - room, high + room
  pad = margin * (high - low)
  return low - pad, high + pad


def ticks(low: float, high: float, most: int) -> list[float]:
  """At most most + 1 multiples of 1, 2 or 5 times a power of ten, from low to high."""
  if not (math.isfinite(low) and math.isfinite(high) and high > low):
    return []
  rough = (high - low) / most
  power = 10.0 ** math.floor(math.log10(rough))
  sizes = [power * k for k in (0.5, 1, 2, 5, 10)]
  finer, step = next(p for p in pairwise(sizes) if p[1] >= rough * (1 - 1e-9))
  return multiples(step, low, high) or multiples(finer, low, high)  # 0.2 to 4.4 has none of 5


def multiples(step: float, low: float, high: float) -> list[float]:
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [k * step for k in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
  """The numbers of an axis, as precise as their distance asks for, with one prefix of thousands."""
  if not values:
    return []
  step = values[1] - values[0] if len(values) > 1 else abs(values[0]) / 10 or 1.0
  return [number(value, step, max(map(abs, values))) for value in values]


def number(value: float, step: float, largest: float | None = None) -> str:
  """A value to the precision of `step`; above 10,000 (or where `largest` is) in k, M, B or T."""
  largest = abs(value) if largest is None else largest
  unit, prefix = next((p for p in PREFIXES if largest >= p[0] and largest >= 1e4), (1.0, ""))
  step = step or 1.0
  if 0 < largest < 1e-4:
    places = math.floor(math.log10(abs(value) or step)) - math.floor(math.log10(step) + 1e-9)
    return f"{value:.{max(0, places)}e}".replace("-", "−") if abs(value) > step / 2 else "0"
  digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
  text = f"{value / unit:.{digits}f}"
  return text.replace("-", "−") + prefix if float(text) else "0"


def _rgb(color: str) -> list[int]:
  return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def _over(color: str) -> str:
  """Black or white, whichever is read more easily on a colour: by relative luminance (WCAG 2.1)."""
  red, green, blue = (((part / 255 + 0.055) / 1.055) ** 2.4 for part in _rgb(color))
  return "#1c2127" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.21 else "#ffffff"
