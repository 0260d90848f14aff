"""Pages of runs that have little or nothing to show: each says what is missing, and why.

Files that are gone, empty, cut or locked, runs without experts, with one rank or one log line, with
values that are no numbers, experiments without runs, and names that are longer than any line.
"""

import subprocess
import sys
import time

import duckdb
import numpy as np
import pytest
from chrome import chrome
from pages import STEPS, Served
from roots import add_loads, curves, fill, start_run
from test_viz_hostile import BASE

from nmoe.config import file as configs
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics
from nmoe.records.reader import ArmRecord, Hypothesis
from nmoe.records.root import Root

pytestmark = pytest.mark.browser
NAMES = "gone early empty cut void dense one tiny nan locked whole".split()
HOLD = "import duckdb, sys; d = duckdb.connect(sys.argv[1]); print(flush=True); sys.stdin.read()"
MAIN = "document.querySelector('main').innerText"
LONG = "n" * 200


def claimed(records, name, arms=()):
  claim = Hypothesis(f"{name} holds.", "val/bpb", "lower", 0.005)
  return records.create(name, "research", [claim], arms).id


def made(root):
  """Name -> id of a run that ended with a result, but for "early"; the files are as they were."""
  records = Experiments(root)
  base = configs.load(BASE, env={})
  odd, long, ids = claimed(records, "odd"), claimed(records, LONG), {}
  for seed, name in enumerate((*NAMES, LONG)):
    toml = configs.to_toml(configs.changed(base, {"train.seed": seed}))
    ids[name] = start_run(records, long if name == LONG else odd, name, seed, toml=toml).id
    results = {} if name == "early" else {"val/bpb": 1.2}
    records.update_run(ids[name], status="failed" if name == "early" else "completed")
    records.update_run(ids[name], results=results)
  claimed(records, "none")
  claimed(records, "grid", [ArmRecord("a", {"lr": 1.0}, ""), ArmRecord("b", {"lr": 2.0}, "")])
  records.close()
  values = curves(STEPS, 0, 0.0, 2)
  for name in ("empty", "cut", "locked", "whole"):
    fill(root, ids[name], 0, STEPS, values)
    add_loads(root, ids[name], STEPS[::50], 2, 16)
  dense = {tag: of for tag, of in values.items() if not tag.startswith("moe/")}
  fill(root, ids["dense"], 0, STEPS, dense)
  fill(root, ids["nan"], 0, STEPS, values | {"train/loss": np.full(len(STEPS), np.nan)})
  one = {tag: of[:1] for tag, of in curves(STEPS, 0, 0.0, 1).items()}
  ranks = {"rank/0/forward_s": np.ones(1), "rank/0/backward_s": np.ones(1)}
  fill(root, ids["one"], 0, STEPS[:1], one | ranks)
  fill(root, ids["tiny"], 0, STEPS[:1], {"train/loss": np.ones(1)})
  fill(root, ids[LONG], 0, STEPS, values | {f"eval/{LONG}/acc": values["train/mfu"]})
  void = Metrics(root, ids["void"])
  void.add(1, 1, {"train/loss": 1.0})
  void.flush()
  with duckdb.connect(str(void.path)) as db:
    db.execute("DELETE FROM metrics")
  Root(root).metrics(ids["empty"], 0).write_bytes(b"")
  cut = Root(root).metrics(ids["cut"], 0)
  cut.write_bytes(cut.read_bytes()[:9000])
  return ids


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
  """(address, root, ids) of a served root, whose "locked" is held open for writing."""
  folder = tmp_path_factory.mktemp("odd")
  ids = made(folder / "root")
  command = [sys.executable, "-c", HOLD, str(Root(folder / "root").metrics(ids["locked"], 0))]
  holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  holder.stdout.readline()
  server = Served(folder / "root", folder / "cache")
  yield server.address, folder / "root", ids
  server.stop()
  holder.communicate()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
  with chrome(browser, tmp_path_factory.mktemp("profile")) as page:
    page.size(1280, 1000)
    yield page


GONE = "rank_0.duckdb is missing: it was deleted or moved"
TOLD = {
  "gone": GONE,
  "early": "rank_0.duckdb is missing: the run ended before its first log line, or it was deleted",
  "empty": "rank_0.duckdb is empty (0 bytes)",
  "cut": "rank_0.duckdb cannot be read",
  "void": "rank_0.duckdb holds no line",
  "locked": "rank_0.duckdb is locked by another process",
}
OF_RUN = ("/run/{}", "/run/{}/router", "/run/{}/ranks", "/?sel={}", "/compare?a={}&b={}")


def told(page, sentence):
  """The page's words, once the sentence is among them; it is an error for none to come."""
  page.wait(f"{MAIN}.includes({sentence!r})", 8)
  return page.ask(MAIN)


@pytest.mark.parametrize("path", OF_RUN)
@pytest.mark.parametrize("name", TOLD)
def test_every_page_says_why_a_run_has_no_curves(page, odd, name, path):
  address, _, ids = odd
  page.open(address + path.format(ids[name], ids["whole"]))
  text = told(page, TOLD[name])
  assert "no MoE layer" not in text and "one rank" not in text, "what is not known is not said"


@pytest.mark.parametrize(
  "name, path, sentence",
  [
    ("dense", "/router", "None of the 15 tags that it logged is the load of a MoE layer"),
    ("tiny", "/router", "None of the 1 tag that it logged is the load of a MoE layer"),
    ("one", "/router", "1\nMoE layer\n"),
    ("dense", "/ranks", "Its log has no phases of several ranks: it has one."),
    ("one", "/ranks", "Its log has no phases of several ranks: it has one."),
    ("nan", "", "NaN or infinite throughout"),
    ("nan", "/router", "This run did not log the load of each expert."),
  ],
)
def test_a_run_that_logged_little_says_what_it_lacks(page, odd, name, path, sentence):
  address, _, ids = odd
  page.open(f"{address}/run/{ids[name]}{path}")
  told(page, sentence)
  assert page.errors == []


@pytest.mark.parametrize(
  "path, sentence",
  [
    ("/experiment/none-1", "No run of it has begun."),
    ("/sweep/grid-1", "No run of it has begun."),
    ("/compare?a={dense}&b={whole}", "No seed is on both sides: there are no pairs."),
    ("/compare?a={early}&b={early}", "No result yet"),
    ("/compare?a={gone}&b={gone}", "No curve was logged by both sides at a common step."),
  ],
)
def test_tables_and_differences_without_a_row_say_so(page, odd, path, sentence):
  address, _, ids = odd
  page.open(address + path.format(**ids))
  told(page, sentence)


@pytest.mark.parametrize("width", (1280, 2560))
def test_a_name_of_200_characters_widens_no_page(page, odd, width):
  address, _, ids = odd
  page.size(width, 1000)
  run = ids[LONG]
  for path in (
    f"/run/{run}",
    f"/?sel={run}",
    f"/compare?a={ids['whole']}&b={run}",
    f"/experiment/{LONG[:60]}-1",
    "/experiments",
  ):
    page.open(address + path)
    page.wait("document.querySelector('main > *')")
    page.wait("!/reading/.test(document.querySelector('main .empty')?.innerText)")
    time.sleep(0.3)
    assert page.ask("document.documentElement.scrollWidth - innerWidth") <= 0, path


def test_a_file_is_read_once_its_lock_is_gone_though_nothing_was_written(page, odd):
  """Also a run that is watched from before its first line gets its router page by itself."""
  address, root, ids = odd
  held = Root(root).metrics(ids["tiny"], 0)
  holder = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  holder.stdout.readline()
  with duckdb.connect(str(Root(root).metrics(ids["void"], 0))) as db:
    db.execute("CHECKPOINT")  # another stat: it is looked at again
  page.size(1280, 1000)
  page.open(f"{address}/run/{ids['void']}/router")
  told(page, TOLD["void"])
  held.touch()
  page.open(f"{address}/run/{ids['tiny']}")
  told(page, TOLD["locked"])
  holder.communicate()
  page.wait("document.querySelector('.panel[data-points=\"1\"] canvas')", 20)
  page.wait(f"!{MAIN}.includes('locked')", 20)
  page.open(f"{address}/run/{ids['void']}/router")
  told(page, TOLD["void"])
  writer = Metrics(root, ids["void"])
  writer.add(10, 10, {"moe/0/load_max_over_mean": 1.5})
  writer.flush()
  page.wait("document.querySelector('figure[data-rows=\"1\"] canvas')", 10)
