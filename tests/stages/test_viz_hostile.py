"""The dashboard in a browser where the root is hostile: markup in names, values that are no
numbers, files that are cut, exchanged or gone, records that lose an experiment, two who look on.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from chrome import chrome
from pages import STEPS, Served, start
from roots import curves, fill

from nmoe.config import file as configs
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Hypothesis
from nmoe.records.root import Root

pytestmark = pytest.mark.browser
BASE = Path(__file__).resolve().parents[2] / "configs/moonlet/cpu.toml"
MARKUP = '<img src=x onerror="window.hit=1"><b>&amp;'
SIGHT = "document.body.innerText"


def made(root, names=("one",), arm="arm", seeds=1):
  """Experiments of one arm; their runs' ids."""
  records, ids = Experiments(root), []
  base = configs.load(BASE, env={})
  for name in names:
    claim = Hypothesis(f"{name} holds. {MARKUP}", "val/bpb", "lower", 0.005)
    experiment = records.create(name, "research", [claim])
    for seed in range(seeds):
      run = start(records, experiment, arm, seed, base)
      fill(root, run, 0, STEPS, curves(STEPS, seed, 0.0, 2))
      records.update_run(run, status="failed", error=f"step 8: {MARKUP}")
      ids.append(run)
  records.close()
  return ids


@pytest.fixture
def root(tmp_path):
  return tmp_path / "root"


@pytest.fixture
def serve(root, tmp_path):
  """The address of a server of the root, started when asked."""
  servers = []

  def begin():
    servers.append(Served(root, tmp_path / f"cache-{len(servers)}"))
    return servers[-1].address

  yield begin
  for server in servers:
    server.stop()


def test_markup_in_names_is_text(root, serve, page):
  (run,) = made(root, names=(MARKUP,), arm=MARKUP)
  writer = Metrics(root, run)
  writer.add(2010, 2_010_000, {f"eval/{MARKUP}/acc": 0.5, f"grad_norm/{MARKUP}": 1.0})
  writer.flush()
  log = Root(root).logs(run)
  log.mkdir(parents=True)
  (log / "rank_0.txt").write_text(f"step 8 {MARKUP}\x1b[31m\n")
  address = serve()
  pages = ["/", f"/run/{run}", f"/run/{run}/router", f"/run/{run}/ranks", f"/prod/{run}"]
  pages += [
    f"/compare?a={run}&b={run}",
    "/experiments",
    "/experiment/img-src-x-onerror-window-hit-1-b-amp-1",
  ]
  for path in pages:
    page.open(address + path)
    page.wait("document.querySelector('main > *')")
    page.wait("!/reading/.test(document.querySelector('main .empty')?.innerText)")
    if not path.endswith(("/router", "/ranks")) and "/prod/" not in path:
      page.wait(f"{SIGHT}.includes('onerror=')")
    assert page.ask("[window.hit === undefined, document.querySelectorAll('main img').length]") == [
      True,
      0,
    ], path
  page.open(f"{address}/run/{run}")
  page.wait(f"{SIGHT}.includes('grad_norm/<img') && {SIGHT}.includes('step 8 <img')")
  assert [e for e in page.errors if "404" not in e] == []


def test_values_that_are_no_numbers_are_gaps(root, serve, page):
  """A loss that is NaN from a step on, one that is NaN throughout, an infinite norm."""
  first, second = made(root, seeds=2)
  values = curves(STEPS, 0, 0.0, 2)
  late = np.where(STEPS > 1000, np.nan, values["train/loss"])
  norm = np.where(STEPS == 500, np.inf, values["grad_norm/all"])
  for run, loss in ((first, late), (second, np.full(len(STEPS), np.nan))):
    Root(root).metrics(run, 0).unlink()
    fill(root, run, 0, STEPS, values | {"train/loss": loss, "grad_norm/all": norm})
  address = serve()
  page.open(f"{address}/?sel={first},{second}&x=step&tags=train/loss,grad_norm/all")
  page.wait("document.querySelectorAll('.panel[data-y] canvas').length == 2")
  loss, norms = page.ask(
    "[...document.querySelectorAll('.panel')].map(p => p.dataset.y.split(',').map(Number))"
  )
  assert 2.5 < loss[0] < loss[1] < 6 and 0 < norms[0] < norms[1] < 6
  page.open(f"{address}/run/{first}")
  page.wait("document.querySelectorAll('.panel[data-y] canvas').length >= 8")
  assert page.ask("document.querySelector('.panel .readout').innerText") == "NaN", "of the loss now"
  for path in (f"/run/{second}", f"/compare?a={first}&b={second}", f"/run/{second}/router"):
    page.open(address + path)
    page.wait("document.querySelectorAll('.panel canvas').length >= 2")
  assert page.errors == []


PAINTED = """(c => { const { data } = c.getContext("2d").getImageData(60, 4, c.width - 64, 1);
  const each = Array.from({ length: data.length / 4 }, (_, i) => data.slice(4 * i, 4 * i + 4));
  return new Set(each.map((one) => one.join()));
})(document.querySelector("figure[data-rows='2'] canvas"))"""


def test_a_layer_of_infinite_load_spoils_no_other(root, serve, page):
  """The scale is that of what is finite; what is not is blank; the worst layer is the other."""
  (run,) = made(root)
  values = curves(STEPS, 0, 0.0, 2)
  load = values["moe/0/load_max_over_mean"]
  values["moe/0/load_max_over_mean"] = np.where(STEPS % 70 == 0, np.inf, load)
  values["moe/0/load_max_over_mean"][-1] = np.nan
  fill(root, run, 0, STEPS, values | {f"moe/{i}/dead": np.zeros(len(STEPS)) for i in range(2)})
  page.open(f"{serve()}/run/{run}/router")
  page.wait("document.querySelectorAll('.panel canvas').length >= 4")
  page.wait(f"[...{PAINTED}].length > 2", 5)
  colours = page.ask(f"[...{PAINTED}]")
  assert "0,0,0,0" in colours and "0,0,0,255" not in colours
  assert page.ask("document.querySelector('figure .scale').innerText").startswith("1, balanced")
  assert "2 × mean" in page.ask("document.querySelector('figure .scale').innerText")
  assert page.ask("document.querySelectorAll('.facts b')[2].innerText") == "1"
  low = page.ask(
    "[...document.querySelectorAll('.panel')].find(p => /^dead/.test(p.innerText)).dataset.y"
  )
  assert -0.5 < float(low.split(",")[0]) <= 0, "there are no fewer dead experts than none"


def test_a_file_that_is_cut_and_one_that_is_exchanged_while_watched(root, serve, page):
  run, other = made(root, seeds=2)
  address = serve()
  page.open(f"{address}/run/{run}?x=step")
  page.wait("document.querySelector('.panel[data-last=\"2000\"] canvas')")
  file = Root(root).metrics(run, 0)
  whole = file.read_bytes()
  file.write_bytes(whole[:9000])
  page.wait(f"{SIGHT}.includes('cannot be read')", 10)
  assert page.ask("Boolean(document.querySelector('.panel[data-last=\"2000\"] canvas'))")
  Root(root).metrics(other, 0).replace(file)
  writer = Metrics(root, run)
  writer.add(2020, 2_020_000, {"train/loss": 1.0})
  writer.flush()
  page.wait("document.querySelector('.panel[data-last=\"2020\"]')", 10)
  page.wait(f"!{SIGHT}.includes('cannot be read')", 10)


def test_a_root_that_vanishes_and_returns(root, serve, page):
  made(root, seeds=2)
  page.open(serve() + "/")
  page.wait("document.querySelectorAll('tbody tr').length == 2")
  away = root.with_name("away")
  root.rename(away)
  page.wait(f"{SIGHT}.includes('holds no records')", 15)
  assert page.ask("document.querySelectorAll('tbody tr').length") == 2
  assert not root.exists(), "a reader makes nothing"
  away.rename(root)
  page.wait(f"!{SIGHT}.includes('holds no records')", 15)


def test_an_experiment_that_is_deleted_while_it_is_looked_at(root, serve, page, tmp_path):
  made(root, names=("kept",))
  before = tmp_path / "before.db"
  shutil.copy(Root(root).experiments_db, before)
  gone = made(root, names=("gone",))[0]
  address = serve()
  page.open(f"{address}/experiment/gone-1")
  page.wait(f"{SIGHT}.includes('gone holds.')")
  before.replace(Root(root).experiments_db)
  page.wait(f"{SIGHT}.includes(\"no experiment 'gone-1'\")", 15)
  page.open(f"{address}/run/{gone}")
  page.wait(f"{SIGHT}.includes(\"no run '{gone}'\")")
  page.open(f"{address}/?sel={gone}")
  page.wait("document.querySelectorAll('tbody tr').length == 1")
  page.press("a")
  page.wait("document.querySelector('.panel canvas')")


def test_no_runs_and_addresses_that_are_none(root, serve, page):
  Experiments(root).close()
  address = serve()
  page.open(address + "/")
  page.wait(f"{SIGHT}.includes('No runs yet')")
  for key in ("j", "k", "x", "a", "c", "Enter", "t", "l"):
    page.press(key)
  for path, told in (
    ("/run/%E0%A4%A", "no run"),
    ("/run/none", "no run 'none'"),
    ("/experiment/none", "no experiment"),
    ("/compare?a=none&b=none", "no run"),
    ("/compare", "Select at least two"),
    ("/experiments", "No experiments yet"),
  ):
    page.open(address + path)
    page.wait(f"{SIGHT}.includes({told!r})" if "'" not in told else f'{SIGHT}.includes("{told}")')
  page.open(address + "/?f=(")
  page.wait(f"{SIGHT}.includes('not a pattern yet')")
  assert not [error for error in page.errors if "404" not in error]


TYPED = (
  "x=bad",
  "x=constructor",
  "from=abc&to=def",
  "from=5",
  "from=9000&to=1000",
  "from=5000&to=5000",
  "from=1e308&to=1e309",
  "at=abc",
  "sort=__proto__",
  "cols=constructor,__proto__,val/bpb&tags=toString,train/loss",
)


def test_what_makes_no_sense_in_an_address_is_as_if_it_were_not_there(root, serve, page):
  (run,) = made(root)
  address = serve()
  of_ranks = {f"rank/{rank}/forward_s": np.ones(len(STEPS)) for rank in (0, 1)}
  fill(root, run, 0, STEPS, curves(STEPS, 0, 0.0, 2) | of_ranks)
  paths = [
    "/",
    f"/run/{run}",
    f"/run/{run}/router",
    f"/run/{run}/ranks",
    f"/compare?a={run}&b={run}",
  ]
  for path, query in [(path, query) for path in paths for query in TYPED]:
    page.open(address + path + ("&" if "?" in path else "?") + query)
    page.wait(
      "document.querySelector('.panel canvas') && !/must be/.test(document.body.innerText)", 8
    )
    assert not page.ask(f"{SIGHT}.includes('in this range')"), (path, query)
    assert page.errors == [], (path, query)


def test_an_address_of_no_page_says_so_and_leads_back(root, serve, page):
  (run,) = made(root)
  address = serve()
  for path in ("/nothing", f"/run/{run}/more", "/run/", "/etc/passwd"):
    page.open(address + path)
    page.wait(f"{SIGHT}.includes('No such page') && document.querySelector('main a[href=\"/\"]')")
  assert page.ask("fetch('/api/none').then(a => a.text())") == "Not Found"


def test_a_run_before_its_first_result_has_its_newest_line_in_the_table(root, serve, page):
  """Results come with an evaluation; until then a loss, a speed and an MFU are those logged."""
  made(root)
  records = Experiments(root)
  claim = Hypothesis("It runs.", "val/bpb", "lower", 0.005)
  run = start(
    records, records.create("under way", "research", [claim]), "arm", 0, configs.load(BASE)
  )
  values = {"train/loss": 2.5, "train/tokens_per_s": 12345.0, "train/mfu": 0.421}
  writer = Metrics(root, run)
  writer.add(10, 1000, {tag: np.nan for tag in values})
  writer.add(20, 2000, values)
  writer.flush()
  page.open(serve() + "/")
  cells = "[...document.querySelectorAll('tbody tr')[0].cells].slice(6, 10).map(c => c.innerText)"
  page.wait(f"{cells}.join() == '—,2.5000,12,345,42.1'", 10)
  writer.add(30, 3000, values | {"train/loss": 2.25})
  writer.flush()
  page.wait(f"{cells}[1] == '2.2500'", 10)
  records.close()


def test_two_browsers_see_the_same_new_line(root, serve, page, browser, tmp_path):
  (run,) = made(root)
  address = serve()
  with chrome(browser, tmp_path / "other") as other:
    for one, path in ((page, f"/run/{run}?x=step"), (other, f"/?sel={run}&x=step")):
      one.size(1280, 1000)
      one.open(address + path)
      one.wait("document.querySelector('.panel[data-last=\"2000\"] canvas')")
    writer = Metrics(root, run)
    writer.add(2010, 2_010_000, {"train/loss": 3.0, "val/bpb": 1.0})
    writer.flush()
    for one in (page, other):
      one.wait("document.querySelector('.panel[data-last=\"2010\"]')", 10)
      assert one.errors == []
