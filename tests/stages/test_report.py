"""The report: its numbers against the records, and the page as a browser shows it."""

import io
import math
import os
import re
import shutil
import sqlite3
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from drawings import panels, points
from rich.console import Console
from roots import RECORD, start_run

from nmoe.config import file as configs
from nmoe.config.sections import fingerprint
from nmoe.errors import RecordError
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Hypothesis
from stages import show
from stages.judge.paired import compare
from stages.report.findings import gather
from stages.report.html import write_report
from stages.report.terminal import terminal_summary

REPO = Path(__file__).resolve().parents[2]
BASE = REPO / "configs" / "moonlet" / "cpu.toml"
STATEMENT = "Muon on attention and dense matrices lowers held-out bits per byte by at least 0.02."
STEPS, BATCH, LAYERS = 300, 4096, 3
FACTS = {  # that the page shows
  "data_digest": "5f0c2d9e8a41",
  "commit": "4794e4a8c3b1d2e5f60718293a4b5c6d7e8f9012",
  "diff": "--- a/nmoe/x.py\n+++ b/nmoe/x.py\n-a < b\n+a & b\n",
  "code_version": "0f1e2d3c4b5a",
  "environment": {"python": "3.11.7", "torch": "2.13.0", "platform": "Linux-x86_64"},
}


def log_run(root, run, speed, rng):
  """What a run of the cpu configuration logs, made up."""
  writer = Metrics(root, run.id)
  for step in range(10, STEPS + 1, 10):
    share = step / STEPS
    loss = 1.35 + 3.9 * math.exp(-speed * 5 * share) + rng.normal(0, 0.03)
    factor = min(1, share / 0.07, (1 - share) / 0.2 + 1e-3)
    row = {
      "train/loss": loss,
      "train/bpb": loss / math.log(2),
      "lr/dense": 3e-3 * factor,
      "grad_norm/all": 0.4 + 2 * math.exp(-6 * share) + abs(rng.normal(0, 0.05)),
    }
    times = {"load": 0.01, "forward": 0.7, "backward": 1.4, "clip": 0.02, "step": 0.12 / speed}
    row |= {f"time/{phase}_s": t + abs(rng.normal(0, 0.01)) for phase, t in times.items()}
    for layer in range(LAYERS):
      peak = 1.1 + (2.2 - 0.3 * layer) * math.exp(-speed * 6 * share) + abs(rng.normal(0, 0.05))
      row |= {
        f"moe/{layer}/load_max_over_mean": peak,
        f"moe/{layer}/load_p05": 0.8,
        f"moe/{layer}/load_p50": 1.0,
        f"moe/{layer}/load_p95": 1.2,
        f"moe/{layer}/dead": 0.0,
        f"moe/{layer}/entropy": 0.99,
        f"moe/{layer}/bias_range": 0.04 * share,
      }
    if step % 50 == 0:
      row |= {"val/loss": loss + 0.05, "val/bpb": (loss + 0.05) / math.log(2)}
    writer.add(step, step * BATCH, row)
  writer.flush()


def make(
  root, stage="ablate", seeds=3, arms=("baseline", "variant"), effect=0.05, statement=STATEMENT
):
  """An experiment of made-up runs; returns its id and the metric of each arm."""
  rng = np.random.default_rng(0)
  db = Experiments(root)
  e = db.create("moonlet-cpu-muon", stage, [Hypothesis(statement, "val/bpb", "lower", 0.02)])
  base = configs.load(BASE, env={})
  values = {arm: [] for arm in arms}
  for seed in range(seeds):
    shared = rng.normal(0, 0.015)
    for i, arm in enumerate(arms):
      config = configs.changed(base, {"train.seed": seed, "optim.matrices": ("adamw", "muon")[i]})
      told = {"toml": configs.to_toml(config), "fingerprint": fingerprint(config, "d")}
      run = start_run(db, e.id, arm, seed, **told, **FACTS)
      log_run(root, run, 1 + 0.3 * i, rng)
      bpb = 2.31 + shared - effect * i + rng.normal(0, 0.003)
      results = {
        "val/bpb": bpb,
        "val/loss": bpb * math.log(2),
        "unigram_bpb": 4.62,
        "train/tokens_per_s": 18500 - 900 * i + rng.normal(0, 60),
        "memory/peak_bytes": 1.1e9 + 4e6 * i,
        "wall_s": 66.0 + 3.3 * i,
        "load/max_over_mean": 1.14,
        "load/dead": 0,
        "steps": STEPS,
        "tokens": STEPS * BATCH,
      }
      values[arm].append(bpb)
      db.update_run(run.id, status="completed", results=results)
  if len(arms) == 2:
    judged = compare(*values.values(), direction="lower", min_effect=0.02)
    db.conclude(e.id, judged.verdict, judged.as_dict())
  db.close()
  return e.id, values


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
  root = tmp_path_factory.mktemp("ablation")
  name, values = make(root)
  return root, values, write_report(root, name)


def cells(html, label):
  """The text of a table row, tags removed."""
  label = re.escape(label.replace("'", "&#x27;"))
  row = re.search(rf"<tr[^>]*><td>{label}</td>(.*?)</tr>", html)[1]
  return [unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall("<td[^>]*>(.*?)</td>", row)]


def text_of(root, name):
  console = Console(width=200, record=True, file=open(os.devnull, "w"))
  console.print(terminal_summary(root, name))
  return console.export_text()


def test_numbers_are_those_of_the_records(ablation):
  root, values, path = ablation
  html = path.read_text()
  d = compare(*values.values(), direction="lower", min_effect=0.02)
  assert d.verdict == "confirmed"
  a, b, difference = cells(html, "held-out bits per byte")
  for cell, arm in ((a, "baseline"), (b, "variant")):
    assert cell.startswith(f"{np.mean(values[arm]):.4f} ± ")
  wanted = f"{d.mean_difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]".replace("-", "−")
  assert difference == wanted
  assert d.reason in html and f"{d.mde:.4f}" in html and f"{d.noise_floor:.4f}" in html
  assert cells(html, "tokens per second")[0].startswith("18,5")
  assert cells(html, "bits per byte of a unigram model") == ["4.6200", "4.6200", "0"]
  assert cells(html, "peak memory, GiB")[:2] == ["1.02", "1.03"]
  assert cells(html, "<code>optim.matrices</code>") == ["'adamw'", "'muon'", "identity"]
  text = text_of(root, "moonlet-cpu-muon")
  assert wanted in text and d.reason in text.replace("\n", " ") and STATEMENT in text


def test_time_to_loss_is_read_off_the_held_out_curve(ablation):
  """The made-up losses fall monotonically but for noise, the variant's faster."""
  html = ablation[2].read_text()
  a, b, _ = cells(html, "tokens to the baseline's final loss")
  tokens = [int(cell.split(" ±")[0].replace(",", "")) for cell in (a, b)]
  assert 0 < tokens[1] < tokens[0] < STEPS * BATCH


def test_the_page_loads_nothing(ablation):
  html = ablation[2].read_text()
  assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|<link[^>]*href=\"(?!data:)|@import", html)
  for name in ("differences", "loss", "optimizer", "load", "phases"):
    assert html.count(f'id="{name}"') == 1


def test_what_lies_beside_the_page_repeats_the_experiment(ablation):
  root, _, path = ablation
  html = path.read_text()
  first = gather(root, "moonlet-cpu-muon").runs[0]
  config = configs.load(path.parent / "baseline.toml", env={})
  assert fingerprint(config, "d") == first.fingerprint
  assert (path.parent / "changes.patch").read_text() == first.diff
  assert f"git checkout {first.commit}" in html and f"nmoe rerun {first.id}" in html
  lines = ["nmoe ablate", path.parent / "baseline.toml", path.parent / "variant.toml", "--seeds 3"]
  assert " \\\n  ".join(map(str, lines)) in html
  assert "-a &lt; b" in html


def test_the_flight_recorder_is_drawn_with_the_worst_of_each_operand(ablation, tmp_path):
  assert 'id="flight"' not in ablation[2].read_text()
  name, _ = make(tmp_path, seeds=2)
  shares = {"saturated": 0.0123, "underflow": 0.0}
  for i, run in enumerate(r for r in Experiments(tmp_path).runs(name) if r.arm == "variant"):
    writer = Metrics(tmp_path, run.id)
    for step, late in ((100, 0), (200, 1)):
      values = {
        "flight/1/q/fprop_x/sqnr_db": 22.0,
        "flight/2/experts/w2.fprop_x/sqnr_db": 20.0 - late + i,
        "flight/2/experts/w2.fprop_x/sqnr_db_min": 17.0 - late - i,
        "flight/2/experts/w2.fprop_x/7/sqnr_db": 3.0,
        "flight/1/q/dgrad_dy/sqnr_db": math.inf,
      }
      values |= {f"flight/1/q/fprop_x/{kind}": v for kind, v in shares.items()}
      writer.add(step, step * BATCH, values)
    writer.flush()
  html = write_report(tmp_path, name).read_text()
  row = ["x, forward", "layer 2 experts w2", "19.5", "15.5", "1.23", "0"]
  at = html.index("<h2>Quantization")
  assert cells(html[at:], "variant") == row
  assert html.count('id="flight"') == 1 and "layer 1 q" in html
  found = gather(tmp_path, name).arms[1].flight("sqnr_db")
  assert [place[:2] for place in found] == [(1, "q"), (1, "q"), (2, "experts w2")]


@pytest.mark.faults
def test_text_of_the_records_is_not_markup(tmp_path):
  hostile = "<script>alert('x')</script> & [bold]π[/bold]"
  name, _ = make(tmp_path, seeds=2, statement=hostile, arms=("a<b>&", "b"))
  html = write_report(tmp_path, name).read_text()
  assert hostile not in html and "a<b>" not in html
  assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; [bold]π" in html
  assert hostile in text_of(tmp_path, name)


def test_one_arm(tmp_path):
  name, values = make(tmp_path, stage="research", arms=("cpu",))
  html = write_report(tmp_path, name).read_text()
  assert cells(html, "held-out bits per byte")[0].startswith(f"{np.mean(values['cpu']):.4f} ± ")
  assert "unigram model" in html and "variant − baseline" not in html.split("</style>")[-1]
  assert 'id="differences"' not in html and 'id="loss"' in html
  assert "nmoe research run" in html and "There is no conclusion yet." in html


def test_checks_benches_and_reruns_do_not_claim_to_be_of_another_command(tmp_path):
  """Their runs can be repeated one by one; the experiment that a rerun repeats keeps its line."""
  first, _ = make(tmp_path, stage="research", arms=("cpu",))
  again, _ = make(tmp_path, stage="research", arms=("cpu",))
  checked, _ = make(tmp_path, stage="check", arms=("cpu",))
  Experiments(tmp_path).link(again, first, "repeats", "of a run")
  pages = {name: write_report(tmp_path, name).read_text() for name in (first, again, checked)}
  assert ["nmoe research run" in page for page in pages.values()] == [True, False, False]
  for name, page in pages.items():
    assert f"nmoe rerun {gather(tmp_path, name).runs[0].id}" in page


def test_a_run_that_failed_and_one_that_never_logged(tmp_path):
  name, _ = make(tmp_path)
  db = Experiments(tmp_path)
  failed, silent = (r for r in db.runs(name) if r.arm == "variant" and r.seed in (1, 2))
  db.update_run(failed.id, status="failed", results={}, error="step 7: loss is <nan>")
  (tmp_path / "metrics" / silent.id / "rank_0.duckdb").unlink()
  html = write_report(tmp_path, name).read_text()
  assert "(2 of 3 runs)" in cells(html, "held-out bits per byte")[1]
  assert "step 7: loss is &lt;nan&gt;" in html and html.count("completed</td>") == 5
  assert "variant, not completed" in html


@pytest.mark.parametrize("seeds", [0, 1])
def test_few_or_no_runs(tmp_path, seeds):
  name, _ = make(tmp_path, stage="research", seeds=seeds, arms=("cpu",))
  html = write_report(tmp_path, name).read_text()
  assert STATEMENT in html and ("<h2>Results" in html) == bool(seeds)
  assert text_of(tmp_path, name)


def test_one_pair_has_no_interval(tmp_path):
  name, values = make(tmp_path, seeds=1)
  html = write_report(tmp_path, name).read_text()
  d = values["variant"][0] - values["baseline"][0]
  assert cells(html, "held-out bits per byte")[2] == f"{d:+.4f}".replace("-", "−")
  assert ">Inconclusive</span>" in html


def test_a_record_of_another_version_is_still_shown(tmp_path):
  name, _ = make(tmp_path, seeds=1)
  with sqlite3.connect(tmp_path / "experiments.db") as db:
    db.execute("DROP TRIGGER completed_runs_keep_their_toml")
    db.execute("UPDATE runs SET toml = replace(toml, '[model]', '[model]\nwings = 2')")
  html = write_report(tmp_path, name).read_text()
  assert "Not comparable by this version of nmoe: baseline: " in html


def test_only_the_newest_run_of_a_seed_counts(tmp_path):
  name, _ = make(tmp_path, seeds=1)
  db = Experiments(tmp_path)
  old = next(r for r in db.runs(name) if r.arm == "variant")
  record = {k: getattr(old, k) for k in RECORD}
  new = db.start_run(name, "variant", 0, **record)
  db.update_run(new.id, status="completed", results={"val/bpb": 1.0})
  assert [r.id for r in gather(tmp_path, name).arms[1].runs] == [new.id]


def test_unknown_experiments_and_folders_in_the_way(tmp_path):
  with pytest.raises(RecordError, match="holds no records"):
    write_report(tmp_path, "muon")
  name, _ = make(tmp_path, seeds=1)
  with pytest.raises(RecordError, match="no experiment 'nothing'"):
    write_report(tmp_path, "nothing")
  (tmp_path / "reports").write_text("in the way")
  with pytest.raises(RecordError, match="the report cannot be written"):
    write_report(tmp_path, name)


def open_in_browser(browser, path, profile):
  """(the DOM after scripts ran, the console's lines)."""
  flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
  quiet = "--disable-background-networking --disable-component-update --enable-logging=stderr"
  size = f"--window-size=1180,4200 --virtual-time-budget=8000 --user-data-dir={profile}"
  command = [browser, *f"{flags} {quiet} {size}".split(), "--dump-dom", path.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_curves_are_those_of_the_runs(ablation):
  """Mean over seeds, read back from the picture; the band holds every seed."""
  root, _, path = ablation
  figure = panels(path.read_text(), "loss")
  assert [title for title, _ in figure] == ["training loss", "held-out bits per byte"]
  for (_, plot), tag in zip(figure, ("train/loss", "val/bpb"), strict=True):
    for arm in gather(root, path.parent.name).arms:
      seeds = arm.series(tag)
      x, y = points(plot, next(e for e in plot.iter("polyline") if e.get("data-name") == arm.name))
      _, _, low, high = map(float, plot.get("data-range").split())
      pixel = (high - low) / float(plot.get("height"))
      np.testing.assert_allclose(x, seeds[0][0], atol=0.06 * STEPS * BATCH / 400)
      np.testing.assert_allclose(y, np.mean([of for _, of in seeds], axis=0), atol=0.06 * pixel)
  assert len(list(figure[0][1].iter("polygon"))) == 2


@pytest.mark.browser
def test_a_browser_draws_every_plot_and_reports_no_error(ablation, browser, tmp_path):
  dom, console = open_in_browser(browser, ablation[2], tmp_path / "profile")
  assert console == []
  assert "Confirmed</span>" in dom and "Muon on attention" in dom


@pytest.mark.browser
def test_a_broken_page_would_be_noticed(browser, tmp_path):
  page = tmp_path / "broken.html"
  page.write_text("<!doctype html><script>notThere.draw('loss')</script>")
  _, console = open_in_browser(browser, page, tmp_path / "profile")
  assert any("notThere is not defined" in line for line in console)


def test_a_root_of_an_older_schema_is_listed_shown_and_reported(tmp_path):
  """Made by 85916c7; its database stays as it is."""
  old = REPO / "tests" / "data" / "experiments-85916c7.db"
  shutil.copy(old, tmp_path / "experiments.db")
  out = io.StringIO()
  console = Console(file=out, width=160)
  show.experiments(tmp_path, console)
  for name in ("tiny-muon-1", "tiny-1", "rerun-tiny-muon-1", "long-1"):
    show.experiment(tmp_path, name, console)
    page = write_report(tmp_path, name)
    assert page == tmp_path / "reports" / name / "index.html"
  said = out.getvalue()
  assert said.count("Muon is better.") == 2 and "4/4" in said and "0/1" in said
  assert "variant − baseline = +0.1195 [−0.6904, +0.9293] over 2 seeds" in " ".join(said.split())
  page = (tmp_path / "reports" / "tiny-muon-1" / "index.html").read_text(encoding="utf-8")
  assert '+0.1195 <i class="pm">[−0.6904, +0.9293]</i>' in page
  assert (tmp_path / "experiments.db").read_bytes() == old.read_bytes()


@pytest.mark.faults
def test_an_arm_of_a_foreign_database_writes_nothing_outside_the_report(tmp_path):
  """And what a shell would read as its own is quoted in the commands."""
  root = tmp_path / "a root; echo"
  root.mkdir()
  name, _ = make(root, seeds=1, arms=("../../outside", "$(id) x"))
  page = write_report(root, name)
  assert sorted(p.name for p in page.parent.iterdir()) == [
    "_.._outside.toml",
    "__id_ x.toml",
    "changes.patch",
    "index.html",
  ]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a root; echo"]
  html = unescape(page.read_text(encoding="utf-8"))
  assert f"git apply '{page.parent}/changes.patch'" in html
  assert f"'{page.parent}/__id_ x.toml'" in html and f"--root '{root}'" in html
