"""What a report draws, read back from the SVG."""

import math
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from drawings import panels, points
from hypothesis import example, given
from hypothesis import strategies as st

from nmoe.records.goodput import BUCKETS
from stages.report import drawing, mixtures, sweep
from stages.report.drawing import (
  Band,
  Bars,
  Cells,
  Curve,
  Dots,
  Figure,
  Panel,
  Rule,
  Shades,
  labels,
  number,
  ticks,
)
from stages.report.figures import COLORS, FLIGHT_SCALE, LOAD_SCALE, PHASE_COLORS, PHASES
from stages.report.production import COLOR_OF

GREYS = ((0.0, "#000000"), (1.0, "#ffffff"))


def one(panel, **more):
  ((_, plot),) = panels(Figure([panel], 300, **more).html("f"), "f")
  return plot


def test_a_curve_has_its_values_and_a_gap_where_there_is_none():
  x, y = np.linspace(1e6, 9e6, 50), np.sin(np.linspace(0, 6, 50))
  y[20:22] = np.nan, np.inf
  plot = one(Panel([Curve(x, y, "#000000", "a"), Band(x, y - 1, y + 1, "#000000")]))
  lines = [points(plot, line) for line in plot.iter("polyline")]
  assert [len(at) for at, _ in lines] == [20, 28]
  seen_x, seen_y = (np.concatenate(part) for part in zip(*lines, strict=True))
  known = np.isfinite(y)
  np.testing.assert_allclose(seen_x, x[known], atol=8e6 * 0.06 / float(plot.get("width")))
  low, high = map(float, plot.get("data-range").split()[2:])
  np.testing.assert_allclose(seen_y, y[known], atol=(high - low) * 0.06 / 234)
  around = points(plot, plot.find("polygon"))[1]
  assert around.max() == pytest.approx(np.nanmax(y[known]) + 1, abs=0.01)
  assert not list(plot.iter("circle"))


def test_a_curve_of_one_point_is_seen():
  plot = one(Panel([Curve([5.0], [2.0], "#123456")]))
  assert [dot.get("fill") for dot in plot.iter("circle")] == ["#123456"]


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e12), st.integers(2, 12))
@example(0.2, 4.2, 2)  # between two multiples of its own step
def test_ticks_are_round_even_inside_and_told_apart(low, span, most):
  high = low + span
  if high - low < 1e-6 * max(abs(low), abs(high)):
    return  # closer than a label's digits
  found = ticks(low, high, most)
  assert 0 < len(found) <= most + 1
  step = (found[-1] - found[0]) / max(1, len(found) - 1) if len(found) > 1 else found[0] or 1.0
  slack = 1e-6 * span
  assert low - slack <= found[0] and found[-1] <= high + slack
  assert np.allclose(np.diff(found), step, rtol=1e-6)
  if len(found) > 1:
    assert float(f"{step / 10 ** math.floor(math.log10(step) + 1e-9):.6g}") in (1, 2, 5)
    assert len(set(labels(found))) == len(found)


@pytest.mark.parametrize(
  "values, said",
  [
    ([0, 2e6, 4e6], ["0", "2M", "4M"]),
    ([0, 500_000, 1_000_000, 1_500_000], ["0", "0.5M", "1.0M", "1.5M"]),
    ([-0.02, -0.01, 0.0], ["−0.02", "−0.01", "0"]),
    ([0, 2000, 4000], ["0", "2000", "4000"]),
    ([0, 2e-5, 4e-5], ["0", "2e−05", "4e−05"]),
    ([1.2, 1.25, 1.3], ["1.20", "1.25", "1.30"]),
    ([1e12, 2e12], ["1T", "2T"]),
  ],
)
def test_numbers_of_an_axis_share_a_prefix_and_their_digits(values, said):
  assert labels(values) == said


def test_a_number_alone_takes_the_precision_it_is_given():
  assert number(4.8734, 0.1) == "4.9" and number(0.0, 0.1) == "0"


def test_bars_are_as_long_as_their_values_and_say_them():
  bars = Bars([(0, 0.0, 30.0, "30%", "forward: 30.00 ms"), (1, 0.0, 10.0, "", "")], "#1f5fbf", "f")
  plot = one(Panel([bars], x_range=(0.0, 60.0), rows=["a", "b"]))
  first, second = (rect for rect in plot.iter("rect") if rect.get("fill"))
  assert float(first.get("width")) == pytest.approx(float(plot.get("width")) / 2, abs=0.1)
  assert float(second.get("width")) == pytest.approx(float(plot.get("width")) / 6, abs=0.1)
  assert float(first.get("y")) < float(second.get("y"))
  assert first.find("title").text == "forward: 30.00 ms"
  assert [text.text for text in plot.iter("text")] == ["30%"]


def test_a_map_has_a_shade_a_value_and_none_for_what_is_not_known():
  values = np.array([[0.0, 1.0], [np.nan, 0.5]])
  tips = [["a", "b"], ["c", "d"]]
  cells = Cells(values, [0.0, 1.0, 4.0], Shades("s", GREYS, 0.0, 1.0), tips)
  plot = one(Panel([cells], rows=["r", "s"]))
  drawn = [rect for rect in plot.iter("rect") if rect.get("fill")]
  seen = {rect.find("title").text: rect.get("fill") for rect in drawn}
  assert seen == {"a": "#000000", "b": "#ffffff", "d": "#808080"}
  narrow, wide = (float(rect.get("width")) for rect in drawn[:2])
  assert wide == pytest.approx(3 * narrow, rel=0.02)


def _luminance(color):
  parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
  return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a, b):
  """WCAG 2.1, 1.4.3."""
  dark, light = sorted(map(_luminance, (a, b)))
  return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("stops", [LOAD_SCALE, FLIGHT_SCALE, sweep.SLOPES])
def test_what_stands_on_a_colour_can_be_read(stops):
  shades = Shades("", stops, 0.0, 1.0)
  grounds = [*PHASE_COLORS, *(shades.color(share) for share in np.linspace(0, 1, 41))]
  for ground in grounds:
    plot = one(Panel([Bars([(0, 0.0, 1.0, "1%", "")], ground)], rows=["a"]))
    (text,) = plot.iter("text")
    assert _contrast(text.get("style").removeprefix("fill:"), ground) >= 4.0, ground


def test_every_phase_and_bucket_has_a_colour_of_its_own():
  assert len(set(PHASE_COLORS)) == len(PHASE_COLORS) == len(PHASES)
  assert set(COLOR_OF) == set(BUCKETS) and len(set(COLOR_OF.values())) == len(BUCKETS)


# Linear sRGB as protanopes and deuteranopes see it (Machado, Oliveira and Fernandes 2009, table 1).
VISIONS = {
  "all cones": np.eye(3),
  "no red ones": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  "no green ones": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750]]
XYZ += [[0.0193339, 0.1191920, 0.9503041]]  # of linear sRGB, IEC 61966-2-1


def _lab(color, vision):
  """CIE 1976 L*a*b* under D65; two colours a distance of 2.3 apart are just told apart."""
  parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
  linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
  white = np.array(XYZ) @ np.ones(3)
  x, y, z = np.cbrt(np.array(XYZ) @ np.clip(np.array(vision) @ linear, 0, 1) / white)
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_of_a_plot_are_told_apart_with_every_colour_vision(vision):
  """Small things need six times the distance at which large ones side by side are told apart."""
  palettes = {"phases": PHASE_COLORS, "buckets": COLOR_OF.values(), "arms": COLORS}
  pages = (Path(drawing.__file__).parents[1] / "viz/static/format.js").read_text()
  palettes |= {
    theme: re.findall("#[0-9a-f]{6}", of)
    for theme, of in re.findall(r"(light|dark): \[(.*?)\]", pages)
  }
  assert {theme: len(palettes[theme]) for theme in ("light", "dark")} == {"light": 7, "dark": 7}
  for name, usual in (
    ("run", dict(zip(PHASES, PHASE_COLORS, strict=True))),
    ("prod", COLOR_OF),
  ):
    page = (Path(drawing.__file__).parents[1] / f"viz/static/{name}.js").read_text()
    (dark,) = re.findall(r"ON_DARK = \{(.*?)\}", page)
    others = dict(re.findall(r'(\w+): "(#\w+)"', dark))
    assert others and others.keys() <= usual.keys()
    palettes[f"{name} on dark"] = (usual | others).values()
  for name, palette in palettes.items():
    for a, b in combinations(palette, 2):
      apart = np.linalg.norm(_lab(a, VISIONS[vision]) - _lab(b, VISIONS[vision]))
      assert apart >= 15, f"{name}: {a} and {b} are {apart:.1f} apart"


def test_pages_and_reports_have_the_same_colours():
  static = Path(drawing.__file__).parents[1] / "viz/static"
  run, prod = ((static / name).read_text() for name in ("run.js", "prod.js"))
  (phases,) = re.findall(r"PHASE_COLORS = \[(.*?)\]", run, re.DOTALL)
  assert re.findall("#[0-9a-f]{6}", phases) == list(PHASE_COLORS)
  (buckets,) = re.findall(r"BUCKETS = \{(.*?)\}", prod, re.DOTALL)
  assert {
    a or b: c for a, b, c in re.findall(r'(?:"([^"]+)"|(\w+)): "(#\w+)"', buckets)
  } == COLOR_OF


def test_what_rules_say_does_not_overlap():
  rules = [Rule(x, text="permanent checkpoint") for x in (1.0, 1.1, 1.2, 9.0)]
  curve = Curve([0.0, 10.0], [0.0, 1.0], "#000000")
  html = Figure([Panel([curve], x_range=(0.0, 10.0), rules=rules)], 300).html("f")
  ((_, plot),) = panels(html, "f")
  lines = html.split("permanent checkpoint</text>")[:-1]
  at = [part[part.rindex("<text x=") :].split('"') for part in lines]
  xs, ys = [float(p[1]) for p in at], [float(p[3]) for p in at]
  assert len(xs) == 4 and ys[0] == ys[3] and len(set(ys[:3])) == 3
  assert all(12 < y < float(plot.get("y")) for y in ys)


def test_names_are_text_and_listed_once():
  hostile = "a<b>&\"'"
  html = Figure([Panel([Curve([0, 1], [0, 1], "#000000", hostile)], hostile)] * 2, 300).html("f")
  assert "<b>" not in html and html.count('class="line"') == 1
  assert [title for title, _ in panels(html, "f")] == [hostile] * 2


def test_nothing_to_draw_is_drawn_as_nothing():
  for panel in (Panel([]), Panel([Curve([], [], "#000000")]), Panel([Dots([], [], ["#000000"])])):
    assert not list(one(panel).iter("polyline"))


GROUP = dict(
  state="transfers",
  shift=dict(n=3, mean=0.2, low=0.1, high=0.3),
  optima={"base": {"0": 0.1}},
  levels={"base": {"0": 2.0}},
  curvature={"base": 0.05},
)


def swept():
  points = [
    dict(group=group, scale="base", seed=0, log2_rate=x, loss=2 + 0.05 * (x - 0.1) ** 2)
    for group in ("joint", "router")
    for x in (-2.0, -1.0, 0.0, 1.0)
  ]
  slope = dict(axis="width", optimizer="adamw", out=True, interval=dict(n=3, mean=0.5, low=0.4))
  slope["interval"]["high"] = 0.6
  return SimpleNamespace(
    conclusion=dict(
      groups=[GROUP | dict(name=name) for name in ("joint", "router")],
      controls=[],
      points=points,
      limits=dict(max_shift=1.0),
      coords=dict(slopes=[slope | dict(name="w1"), slope | dict(name="wq", out=False)]),
    )
  )


def test_a_sweep_has_its_points_parabolas_and_optima():
  drawn = panels(sweep.figure(swept()).html("sweep"), "sweep")
  assert [title for title, _ in drawn] == ["joint", "router"]
  for _, plot in drawn:
    tips = [dot.find("title").text for dot in plot.iter("circle")]
    assert len(tips) == 4 and tips[0].endswith("base, seed 0: 2.2205 at -2")
    (optimum,) = (path for path in plot.iter("path") if path.find("title") is not None)
    assert optimum.find("title").text.endswith("optimum 2.0000 at +0.1")
    (parabola,) = plot.iter("polyline")
    x, y = points(plot, parabola)
    low = float(plot.get("data-range").split()[2])
    assert low < 2.0, "the optimum, lower than every point, is inside"
    np.testing.assert_allclose(y, 2 + 0.05 * (x - 0.1) ** 2, atol=0.003)


def test_shifts_and_slopes_say_their_intervals():
  shifts = sweep.shifts(swept()).html("shifts")
  assert shifts.count("+0.2 [+0.1, +0.3]") == 2 and shifts.count(">limit<") == 2
  slopes = sweep.coords_figure(swept()).html("coords")
  assert ">+0.5 [+0.4, +0.6] out<" in slopes and ">+0.5 [+0.4, +0.6]<" in slopes


@pytest.mark.parametrize("sources", [("a", "b"), ("a", "b", "c")])
def test_mixtures_stand_at_their_shares(sources):
  shares = np.random.default_rng(0).dirichlet(np.ones(len(sources)), 6)
  found = [
    dict(zip(sources, map(float, row), strict=True))
    | dict(arm=f"m{i}", seed=0, size=None, bpb=[1.0 + i] * len(sources))
    for i, row in enumerate(shares)
  ]
  proposal = dict(left_out=[[1.0, 1.1], [2.0, 2.1]])
  objective = [1 / len(sources)] * len(sources)
  c = dict(sources=list(sources), mixtures=found, objective=objective, proposal=proposal)
  drawn = panels(mixtures.figure(SimpleNamespace(conclusion=c)).html("mixtures"), "mixtures")
  assert len(drawn) == (2 if len(sources) == 2 else 4)
  _, plane = drawn[0]
  left, right = map(float, plane.get("data-range").split()[:2])
  at = [
    left + float(d.get("cx")) / float(plane.get("width")) * (right - left)
    for d in plane.iter("circle")
  ]
  np.testing.assert_allclose(at, shares[:, 0], atol=1e-3)
  assert len({dot.get("fill") for dot in plane.iter("circle")}) == (1 if len(sources) == 2 else 6)


@pytest.mark.parametrize("sources", [("a", "b"), ("a", "b", "c")])
def test_the_proposal_and_its_rivals_stand_out_of_the_swarm(sources):
  arms = ("natural", "uniform", "mixture 3", "proposed")
  found = [
    dict(zip(sources, (0.1 + 0.2 * i, 0.9 - 0.2 * i, 0.0), strict=False))
    | dict(arm=arm, seed=0, size="", bpb=[1.0 + i] * len(sources))
    for i, arm in enumerate(arms)
  ]
  objective = [1 / len(sources)] * len(sources)
  c = dict(sources=sources, mixtures=found, objective=objective, proposal=dict(left_out=[]))
  html = mixtures.figure(SimpleNamespace(conclusion=c)).html("mixtures")
  legend = html[: html.index("<svg")]
  for name in ("natural", "uniform", "proposed"):
    assert f"</i>{name}</span>" in legend
  _, plane = panels(html, "mixtures")[0]
  marked = [d for d in plane.iter("path") if d.find("title") is not None]
  assert len(marked) == (0 if len(sources) == 2 else 3)
  assert sum("natural seed 0: 1.0000" in d.text for d in plane.iter("title")) >= 1
