"""The dashboard in headless Chromium: every page, live, by keyboard, from its own server alone.

Pictures of the pages are left in NMOE_PICTURES, where that is set.

One file: one browser and one server stand before every test.
"""

import json
import os
import re
import time
from itertools import product
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from chrome import chrome
from pages import EXPERTS, LAYERS, RANKS, REPO, STEPS, Served, start
from roots import curves, fill, tree_hash

from nmoe.config import file as configs
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Hypothesis
from nmoe.records.root import Root

pytestmark = pytest.mark.browser


def pages(ids):
  """Name -> (address, what must stand on the page: expressions, and words)."""
  of = ids["variant", 1]
  sides = {
    arm: ",".join(v for (a, _), v in ids.items() if a == arm) for arm in ("baseline", "variant")
  }
  panels = "document.querySelectorAll('.panel canvas').length"
  return {
    "runs": ("/?f=rate-1", f"document.querySelectorAll('tbody tr').length == 6 && {panels} == 6"),
    "run": (
      f"/run/{of}",
      f"{panels} >= 11 && document.body.innerText.includes('optim.dense_lr') "
      "&& document.querySelector('[data-starts=\"1\"]').innerText.includes('30 steps back') "
      "&& document.querySelector('[data-evaluations]').innerText.includes('± 0.05')",
    ),
    "router": (
      f"/run/{of}/router?layer=2",
      f"document.querySelector('figure[data-rows=\"{LAYERS}\"]') "
      f"&& document.querySelectorAll('figure[data-rows=\"{EXPERTS}\"]').length == 3 "
      f'&& document.querySelector(\'figure[data-rows="2"][data-columns="{EXPERTS}"]\') '
      "&& document.body.innerText.includes('dead now: 3, 11')",
    ),
    "ranks": (
      f"/run/{of}/ranks",
      f"document.querySelector('figure[data-rows=\"{RANKS}\"]') "
      "&& /\\b2\\b\\s*slowest rank/.test(document.body.innerText)",
    ),
    "compare": (
      f"/compare?a={sides['baseline']}&b={sides['variant']}",
      f"{panels} >= 5 && document.body.innerText.includes('optim.dense_lr') "
      "&& document.body.innerText.includes('−0.0192') "
      "&& document.querySelector('table[data-flips=\"1\"]')",
    ),
    "experiment": (
      "/experiment/rate-1",
      "document.querySelector('svg.graph[data-nodes=\"3\"]') && document.querySelector('iframe') "
      "&& document.body.innerText.includes('confirmed') "
      f"&& {panels} == 2 && document.body.innerText.includes(' over 3 pairs') "
      "&& /optim.dense_lr\\s+0.003\\s+0.005/.test(document.body.innerText)",
    ),
    "sweep": (
      "/sweep/sweep-1",
      f"{panels} == 3 && document.querySelector('table[data-optima=\"4\"]') "
      "&& [...document.querySelectorAll('table[data-groups=\"3\"] tbody tr')].map(r => "
      "r.cells[0].innerText).join() == 'joint,control: without the rule,' "
      "+ 'control: with the embedding\\'s factor alone'",
    ),
    "production": (
      f"/prod/{of}",
      f"{panels} >= 4 && document.querySelector('[data-attempts=\"2\"]') "
      "&& document.querySelector('[data-starts=\"1\"]') "
      "&& document.querySelectorAll('svg.timeline rect').length > 8 "
      "&& document.body.innerText.includes('again-1 repeats, wider-1 supports')",
    ),
  }


NAMES = "runs run router ranks compare experiment sweep production".split()


@pytest.mark.parametrize("name", NAMES)
def test_every_page_stands_without_an_error(page, served, made, name):
  address, whole = pages(made[1])[name]
  page.open(served + address)
  page.wait(whole)
  page.wait("![...document.querySelectorAll('main .empty')].some(e => e.innerText == 'reading…')")
  keep(page, name)
  assert page.errors == []
  ranges = page.ask("[...document.querySelectorAll('.panel[data-y]')].map(p => p.dataset.y)")
  assert "0,1" not in ranges, "every axis is that of its data"
  assert page.ask("document.title").startswith("nmoe")
  for width in (1280, 800, 480):
    page.size(width, 1000)
    page.wait("document.documentElement.scrollWidth <= innerWidth", 3)
  page.size(1280, 1000)


CONTRAST = """(() => {
  const linear = (v) => (v < 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const channels = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => linear(v / 255));
  const light = (text) => {
    const [r, g, b] = channels(text);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const of = (query, name) => [...document.querySelectorAll(query)]
    .map((e) => light(getComputedStyle(e)[name]));
  const [paper] = of("header", "backgroundColor");
  return [...of(".key-line", "borderTopColor"), ...of("rect[data-tone]", "fill")]
    .map((one) => Math.max(one, paper) / Math.min(one, paper)); })()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["runs", "run", "router", "compare", "sweep", "production"])
def test_every_colour_stands_out_on_the_paper(page, served, made, name, theme):
  """As WCAG 2 counts contrast; a curve is thin, so below 2 it is not seen. On white an area of
  load or starting is paler: it is what no work was done in.
  """
  address, whole = pages(made[1])[name]
  page.open(served + address)
  page.wait(whole)
  if page.ask("document.documentElement.dataset.theme") != theme:
    page.press("d")
  page.wait(f"document.documentElement.dataset.theme == '{theme}'")
  found = page.ask(CONTRAST)
  assert found and min(found) > (2.1 if theme == "dark" else 1.4), found


def test_a_control_stands_on_the_scale_of_what_it_controls(page, served, made):
  page.open(f"{served}/sweep/sweep-1")
  ranges = "new Set([...document.querySelectorAll('.panel')].map(p => p.dataset.y)).size"
  page.wait("document.querySelectorAll('.panel[data-y]').length == 3")
  assert page.ask(ranges) == 1


def test_phases_stand_in_the_order_of_a_step(page, served, made):
  page.open(f"{served}/run/{made[1]['variant', 1]}/ranks")
  page.wait("document.querySelector('table[data-late]')")
  order = "load forward backward graph clip step gather log eval checkpoint".split()
  for cells in ("table[data-late] tbody td:first-child", ".scroll th.num"):
    found = page.ask(f"[...document.querySelectorAll('{cells}')].map(c => c.innerText)")
    phases = [name for name in found if name in order]
    assert len(phases) > 4 and phases == [name for name in order if name in phases]


def test_figures_say_their_unit_their_sign_and_what_they_are_of(page, served, made):
  ids = made[1]
  page.open(f"{served}/run/{ids['variant', 2]}")
  page.wait("document.querySelector('[data-evaluations=\"3\"]')")
  tasks = page.ask(
    "[...document.querySelectorAll('[data-evaluations] tbody tr')].map(r => r.cells[0].innerText)"
  )
  assert tasks == ["t", "asked", "mine: the suite's mean"]
  waits = "[...document.querySelectorAll('.panel')]"
  waits += ".filter(p => /^(waiting|checkpoint stall)/.test(p.querySelector('b').innerText))"
  page.wait(f"{waits}.length > 0 && {waits}[0].querySelector('.readout').innerText")
  for text in page.ask(f"{waits}.map(p => p.querySelector('.readout').innerText)"):
    assert text.endswith((" ms", " s")), text
  sides = [",".join(ids[arm, seed] for seed in range(3)) for arm in ("variant", "baseline")]
  page.open(f"{served}/compare?a={sides[0]}&b={sides[1]}")
  page.wait("/now \\+0\\.0\\d+ over 3 pairs/.test(document.body.innerText)")


def keep(page, name):
  """Pictures of a page, light and dark, narrow and wide."""
  folder = os.environ.get("NMOE_PICTURES")
  for width, theme in product((1280, 2560), ("light", "dark")) if folder else ():
    page.size(width, 1000)
    if page.ask("document.documentElement.dataset.theme") != theme:
      page.press("d")
    time.sleep(0.4)
    page.picture(Path(folder) / f"{name}-{width}-{theme}.png", whole=True)


def test_from_each_page_of_a_run_all_its_others_are_a_click_away(page, served, made):
  run = made[1]["variant", 1]
  others = [f"/run/{run}", f"/run/{run}/router", f"/run/{run}/ranks", f"/prod/{run}"]
  for address in others:
    page.open(served + address)
    page.wait("document.querySelector('header nav')?.innerText.includes('production')")
    links = page.ask("[...document.querySelectorAll('header nav a')].map(a => a.pathname)")
    assert links[2:] == others, address
    here = page.ask("document.querySelector('header nav a.here').pathname")
    assert here == address


def test_no_request_leaves_the_machine_and_the_root_stays_as_it_was(page, served, made):
  before = tree_hash(made[0])
  for address, whole in pages(made[1]).values():
    page.open(served + address)
    page.wait(whole)
  outside = [url for url in page.requests if not url.startswith((served, "data:", "about:"))]
  assert outside == [] and len(page.requests) > 40
  assert tree_hash(made[0]) == before


def test_a_new_line_is_on_the_screen_within_two_seconds(page, served, made):
  root, ids = made
  run = ids["variant", 0]
  page.open(f"{served}/?sel={run}&x=step&tags=train/loss")
  page.wait("document.querySelector('.panel[data-last=\"2000\"] canvas')")
  time.sleep(1.5)
  spark = f"[...document.querySelectorAll('tr')].find(r => r.innerText.includes('{run}'))"
  spark += ".querySelector('polyline')?.getAttribute('points')"
  page.wait(spark)
  before = page.ask(spark)
  writer = Metrics(root, run)
  writer.add(2010, 2_010_000, {"train/loss": 9.0})
  writer.flush()
  took = page.wait("document.querySelector('.panel[data-last=\"2010\"]')", 10)
  page.wait(f"{spark} != {json.dumps(before)}", 5)
  writer.rewind(2000)
  assert took <= 2.0, f"{took:.2f} s"
  page.wait("document.querySelector('.panel[data-last=\"2000\"]')", 10)


def test_from_the_runs_to_a_comparison_by_keyboard_alone(page, served, made):
  page.open(served + "/")
  page.wait("document.querySelectorAll('tbody tr').length == 34")
  page.press("/")
  for key in "rate-1":
    page.press(key)
  page.wait("document.querySelectorAll('tbody tr').length == 6")
  page.press("Escape")
  page.press("n")
  page.press("x")
  page.press("j")
  page.press("x")
  page.wait("document.querySelectorAll('button[aria-pressed=\"true\"].swatch').length == 2")
  page.press("c")
  page.wait("location.pathname == '/compare' && document.querySelector('[data-results]')")
  assert "variant" in page.ask("document.querySelector('h1').innerText")
  page.press("t")
  page.wait("location.search.includes('x=step')")
  page.press("l")
  page.wait("location.search.includes('log=1')")
  before = page.ask("document.documentElement.dataset.theme")
  page.press("d")
  page.wait(f"document.documentElement.dataset.theme != {json.dumps(before)}")
  page.press("g")
  page.press("h")
  page.wait("location.pathname == '/'")
  assert page.errors == []


@pytest.mark.parametrize(("latency", "limit_s"), [(0, 5), (2500, 10)])
def test_back_is_where_one_was(page, served, made, latency, limit_s):
  """Also on a page that stands only once its data has come, and where each answer takes 2.5 s."""
  page.open(f"{served}/run/{made[1]['variant', 1]}")
  page.wait("document.querySelectorAll('.panel canvas').length >= 11")
  page.ask("scrollTo(0, 700)")
  page.ask("document.querySelector('header nav a[href$=\"/router\"]').click()")
  page.wait("document.querySelector('figure canvas') && scrollY == 0")
  with page.slow(latency):
    page.ask("history.back()")
    page.wait("!location.pathname.endsWith('/router') && scrollY == 700", limit_s)
  page.ask("history.forward()")
  page.wait("location.pathname.endsWith('/router') && scrollY == 0", 5)
  assert page.errors == []


def test_enter_presses_what_has_the_focus_and_else_opens_the_row(page, served, made):
  """Headers sort the table by keyboard too."""
  page.open(f"{served}/?f=rate-1")
  page.wait("document.querySelectorAll('tbody tr').length == 6")
  page.ask("[...document.querySelectorAll('button')].find(b => b.innerText == 'none').focus()")
  page.press("Enter")
  page.wait("location.search.includes('sel=none')")
  page.ask("[...document.querySelectorAll('th')].find(h => /seed/.test(h.innerText)).focus()")
  page.press("Enter")
  page.wait("location.search.includes('sort=seed')")
  assert page.ask("location.pathname") == "/"
  page.ask("document.activeElement.blur()")
  page.press("Enter")
  page.wait("location.pathname.startsWith('/run/')")


@pytest.mark.parametrize(
  "words, rows",
  [
    ("rate-1 seed=1", 2),
    ("seed=1", 2),
    ("dense_lr=0.00", 0),
    ("dense_lr=0.00.*", 34),
    ("[", 0),
    ("rate-1 dense_lr>0.004", 3),
    ("rate-1 optim.dense_lr<=3e-3 seed>0", 2),
    ("rate-1 bpb<1.15", 3),
    ("val/bpb<0", 0),
    ("nothing<1", 0),
  ],
)
def test_a_key_has_the_value_that_a_filter_names(page, served, made, words, rows):
  """All of it: seed=1 is not seed 10. A pattern may leave it open."""
  page.open(f"{served}/?f={quote(words)}")
  page.wait(f"document.body.innerText.includes('{rows} of 34 runs')")
  assert page.ask("document.querySelectorAll('tbody tr').length") == rows


def test_a_log_axis_has_ticks_that_are_read(page, served, made):
  """At least three on each, whatever decades it spans; what a canvas is told to write is noted."""
  note = """window.written = new Map(); const write = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
      const of = this.canvas.closest(".panel")?.querySelector("b").innerText;
      written.set(of, [...(written.get(of) || []), [text, this.textAlign]]);
      return write.call(this, text, x, y); }"""
  noted = page.send("Page.addScriptToEvaluateOnNewDocument", source=note)["identifier"]
  page.open(f"{served}/?f=rate-1&log=1")
  page.wait("document.querySelectorAll('.panel[data-y] canvas').length == 6")
  told = page.ask("[...written]")
  page.send("Page.removeScriptToEvaluateOnNewDocument", identifier=noted)
  labels = {of: {text for text, align in texts if align == "right"} for of, texts in told}
  assert len(labels) == 6 and all(len(of - {""}) >= 3 for of in labels.values()), labels


def test_what_lies_under_the_cursor_is_told_value_first(page, served, made):
  """A caption is cut at its end: there stands the curve's name, which its colour tells too."""
  page.open(f"{served}/?f=rate-1&x=step")
  page.wait("document.querySelectorAll('.panel[data-y] canvas').length == 6")
  box = page.ask(
    "(r => [r.x + r.width / 2, r.y + r.height / 2])"
    "(document.querySelector('.panel .u-over').getBoundingClientRect())"
  )
  page.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
  page.wait("/ at /.test(document.querySelector('.panel .readout').innerText)", 5)
  told = page.ask("document.querySelector('.panel .readout').innerText")
  value, place, name = re.fullmatch(r"([\d.]+) at ([\d,]+) · (.+ · seed \d)", told).groups()
  assert 2.5 < float(value) < 6 and 0 < int(place.replace(",", "")) <= 2000
  assert name.startswith(("baseline", "variant"))


def test_curves_can_be_means_of_what_is_shown(page, served, made):
  """Of 5 % of the points around each, as NumPy has them; fewer spikes, and the address says so."""
  page.open(f"{served}/?sel={made[1]['baseline', 0]}&x=step&tags=grad_norm/all")
  page.wait("document.querySelector('.panel[data-y][data-curves=\"1\"]')")
  y = np.random.default_rng(0).standard_normal(100)
  y[[3, 4, 50]] = np.nan
  script = (
    "import('/static/charts.js').then(m => [...m.smoothed(%s, 0.05)].map(v => isNaN(v) ? null : v))"
  )
  found = page.ask(script % json.dumps(y.tolist()))
  known = [np.nanmean(y[max(0, i - 2) : i + 3]) if np.isfinite(y[i]) else None for i in range(100)]
  assert [v is None for v in found] == [v is None for v in known]
  np.testing.assert_allclose(
    *([v for v in of if v is not None] for of in (found, known)), rtol=1e-5
  )
  page.press("m")
  page.press("m")
  page.wait("location.search.includes('mean=5') && document.querySelector('[data-curves=\"2\"]')")
  assert page.errors == []


@pytest.mark.parametrize(
  "module, script, told",
  [
    (
      "charts",
      "m.apart([[1, NaN], [2, 3], [1, NaN], [1, NaN]].map(y => ({ y, dash: [] })))"
      ".map(c => c.dash)",
      [[], [], [6, 6], [6, 12]],
    ),
    (
      "charts",  # one hardly higher than another is drawn over it too; one that is apart is not
      "m.apart([[1, 2, 3, 9], [1.01, 2.01, 3.01, 8], [1.2, 2.2, 3.2, 9]]"
      ".map(y => ({ y, dash: [] }))).map(c => c.dash)",
      [[], [6, 6], []],
    ),
    (
      "charts",
      "[[2.58, 5.2], [0.1, 9], [1e-5, 0.2], [0.995, 1.005]].map(([a, b]) => m.logTicks(a, b))",
      [
        [3, 3.5, 4, 4.5, 5],
        [0.1, 0.2, 0.5, 1, 2, 5],
        [1e-5, 1e-4, 1e-3, 0.01, 0.1],
        [0.996, 0.998, 1, 1.002, 1.004],
      ],
    ),
    (
      "charts",
      "[[], [1, null], [1, null, 2], [1, 2, null, 3]].map(m.few)",
      [True, True, True, False],
    ),
    (
      "format",
      "[2e-4, -2e-4, 2.51e-5, 0.25, -3, 0].map(v => m.short(v))",
      ["2e-4", "−2e-4", "2.51e-5", "0.25", "−3", "0"],
    ),
    (
      "format",
      "[0, 1.8e-5, 5e-4, 0.001, 0.5, 12, 4000].map(v => m.textOf('time/gather_s')(v, 3))"
      ".concat([7e-4, 6543].map(v => m.textOf('train/tokens_per_s')(v, 3)))",
      ["0 s", "0.018 ms", "0.5 ms", "1 ms", "500 ms", "12 s", "4000 s", "7e-4", "6.54k"],
    ),
    (
      "format",
      "[[1, 2.5, null], [0.6331, 0.63312, 0.63314], [12340, 12350, 12360]]"
      ".map(v => m.ticks(v, m.short))",
      [["1", "2.5", ""], ["0.6331", "0.63312", "0.63314"], ["12.34k", "12.35k", "12.36k"]],
    ),
    (
      "format",
      "[3, 4].map(d => m.xText('time', 3725, d))",
      ["62 min", "1:02:05"],
    ),
    (
      "format",
      "[-0.04, 0.04, -0.06, 0].map(v => m.measure({ factor: 1, format: ',.1f' }, v, true))",
      ["0.0", "0.0", "−0.1", "0"],
    ),
    (
      "format",
      "['off +10', 'off -2', 'off +0', 'a-10', 'a-9', 'off +2', 'off -4', 'lr=-2', 'lr=-3', 'off']"
      ".sort(m.byName)",
      "a-9,a-10,lr=-3,lr=-2,off,off -4,off -2,off +0,off +2,off +10".split(","),
    ),
  ],
)
def test_curves_and_numbers_can_be_told_apart(page, served, module, script, told):
  page.open(f"{served}/static/index.html")
  page.wait("document.readyState == 'complete'")
  assert page.ask(f"import('/static/{module}.js').then(m => {script})") == told


def test_an_address_gives_the_same_selection_and_zoom_in_a_new_profile(
  browser, page, served, made, tmp_path
):
  some = [made[1]["baseline", 0], made[1]["variant", 0]]
  address = f"{served}/?sel={','.join(some)}&x=step&from=500&to=900&log=1&tags=train/loss,val/bpb"
  state = """JSON.stringify([
    [...document.querySelectorAll('button.swatch')].map(b => b.ariaPressed),
    [...document.querySelectorAll('.panel')].map(p => ({...p.dataset})), location.search,
    [...document.querySelectorAll('button.on')].map(b => b.innerText)])"""
  ready = "document.querySelectorAll('.panel[data-last=\"900\"] canvas').length == 2"
  page.open(address)
  page.wait(ready)
  with chrome(browser, tmp_path / "other") as other:
    other.size(1280, 1000)
    other.open(address)
    other.wait(ready)
    assert other.ask(state) == page.ask(state)
  pressed = json.loads(page.ask(state))[0]
  assert pressed.count("true") == 2 and page.ask("location.search").count("from=500") == 1


def test_a_corrupt_run_and_lost_records_leave_the_page_alive(page, browser, tmp_path):
  root = tmp_path / "root"
  records = Experiments(root)
  claim = Hypothesis("It learns.", "val/bpb", "lower", 0.0)
  experiment = records.create("two", "research", [claim])
  base = configs.load(REPO / "configs/moonlet/cpu.toml", env={})
  ids = [start(records, experiment, "arm", seed, base) for seed in (0, 1)]
  for run in ids:
    fill(root, run, 0, STEPS, curves(STEPS, 0, 0.0, 1))
    records.update_run(run, status="completed")
  records.close()
  broken = Root(root).metrics(ids[0], 0)
  broken.write_bytes(broken.read_bytes()[:9000])
  server = Served(root, tmp_path / "cache")
  try:
    page.open(server.address + "/?tags=train/loss")
    page.wait('document.querySelector(\'.panel[data-curves="1"][data-points="200"]\')')
    page.open(f"{server.address}/run/{ids[0]}")
    page.wait("document.body.innerText.includes('cannot be read')")
    page.open(server.address + "/")
    page.wait("document.querySelectorAll('tbody tr').length == 2")
    Root(root).experiments_db.write_bytes(b"no database any more, whatever one does with it" * 30)
    page.wait("document.body.innerText.includes('corrupt')", 15)
    assert page.ask("document.querySelectorAll('tbody tr').length") == 2
  finally:
    server.stop()


def test_the_pages_memory_is_flat_while_lines_come(page, served, made):
  """Thirty looks at a growing run; the heap after them is that after the first ten, within 4 MB."""
  root, ids = made
  run = ids["variant", 2]
  page.open(f"{served}/?sel={','.join(ids.values())}&x=step")
  page.wait("document.querySelectorAll('.panel canvas').length == 6")
  writer, sizes = Metrics(root, run), []
  heap = "(gc(), performance.memory.usedJSHeapSize)"
  for step in range(2010, 2010 + 30 * 10, 10):
    writer.add(step, 1000 * step, {"train/loss": 3.0})
    writer.flush()
    page.wait(f"document.querySelector('.panel[data-last=\"{step}\"]')")
    sizes.append(page.ask(heap))
  writer.rewind(2000)
  assert max(sizes[-5:]) - max(sizes[5:10]) < 4e6, [round(s / 1e6, 1) for s in sizes]
