"""`nmoe watch`: the figures that the terminal shows are those of the records."""

import io
import math
import time
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from dashboard import make
from rich.console import Console

from nmoe.errors import RecordError
from nmoe.records import goodput
from nmoe.records.attempts import Attempts
from nmoe.records.condition import ago
from nmoe.records.experiments import Experiments
from nmoe.records.live import Live
from nmoe.records.metrics import Metrics
from nmoe.records.reader import Evaluation
from stages import watch
from stages.text import rounded
from stages.watch import BLOCKS, FIGURES, curve, fitting, picture


@pytest.fixture
def live(root, tmp_path):
  return Live(root, tmp_path / "cache")


def shown(live, run_id, width=140):
  console, seen = Console(record=True, width=width), live.snapshot()
  console.print(picture(live, seen, seen.run(run_id), width))
  return console.export_text()


def test_the_last_figures_of_a_run_are_shown(root, live):
  run = make(root, seeds=(2,))["variant", 2]
  writer = Metrics(root, run)
  values = {"train/loss": 2.34567, "val/bpb": 1.25, "time/forward_s": 3.0, "time/step_s": 1.0}
  values |= {"moe/0/load_max_over_mean": 1.5, "moe/3/load_max_over_mean": 2.5, "moe/3/dead": 4.0}
  writer.add(41, 4100, values | {"train/tokens_per_s": 1234.5, "train/mfu": 0.407})
  writer.flush()
  text = shown(live, run)
  for part in ("topk-1 · variant · seed 2", "completed", "2.3457", "1.2500", "1,234", "40.7 %"):
    assert part in text, part
  assert "time: forward 75 %, step 25 %" in text
  assert "fullest expert over mean 2.50 in MoE layer 3, 4 dead experts" in text


def test_a_production_run_with_evaluations_fits_eighty_columns(root, live):
  """Its goodput and events, the late rank, the newest of its evaluations."""
  run = make(root, seeds=(0,))["baseline", 0]
  history = Attempts(root)
  number = history.begin(run, engine="local", job_id="", nodes=["a"], commit="c", step=0)
  history.started(run, number, 0, "a", {"startup": {}})
  results = {"eval/asked/acc": 0.75, "eval/asked/acc_se": 0.031, "eval/asked/bpb": 1.5}
  history.add_evaluation(run, Evaluation(60, "mine", "d", "cpu fp32", results, 1.0))
  writer = Metrics(root, run)
  values = {"eval/asked/acc": 0.25, "eval/told/acc": 0.5, "train/loss": 2.0, "val/loss": 2.0}
  values |= {f"rank/{r}/{p}_s": 1.0 + (r == 1) * (p == "load") for r in range(3) for p in PHASES}
  writer.add(41, 4100, values | {"time/load_s": 1.0, "time/forward_s": 1.0, "time/clip_s": 1e-4})
  writer.flush()
  history.end(run, number, outcome="completed", exit_status=0, step=41)
  history.close()
  for width in (80, 160):
    text = shown(live, run, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    told = " ".join(text.split())
    seconds = goodput.production(root, run)
    for part in (
      "step 41, 4.1 k of 4.1 k tokens",
      f"goodput {100 * seconds.goodput:.1f} %, ETTR {100 * seconds.ettr:.1f} %",
      "attempt 1, step 0: launch",
      "ranks: rank 1 is 1 s above the median in load, 12.5 % of the time between logs",
      "asked 0.7500 ± 0.031 1.5000 60",
      "told 0.5000 — 41",
    ):
      assert part in told, part
    assert "clip" not in told.partition("time: ")[2].partition("ranks:")[0]


PHASES = "load forward backward clip step gather log graph".split()


def test_a_run_that_logged_nothing_and_one_that_failed(root, live):
  ids = make(root, seeds=(0,), steps=range(0))
  records = Experiments(root)
  records.update_run(ids["variant", 0], error="step 8: the loss is not finite [bold]")
  records.close()
  text = shown(live, ids["variant", 0])
  assert "rank_0.duckdb is missing" in text and "not finite [bold]" in text


def test_watching_ends_with_the_run_and_the_newest_is_the_default(root, live):
  ids = make(root, seeds=(0,))
  console = Console(record=True, width=140)
  watch.watch(live, None, console)
  assert ids["variant", 0] in console.export_text()


@pytest.mark.parametrize("width, height", [(60, 20), (80, 20), (120, 20), (80, 24)])
def test_a_low_terminal_shows_what_matters_most(root, live, width, height):
  """The late rank, goodput and the last event stay; figures and tasks make room."""
  run = make(root, seeds=(0,))["baseline", 0]
  history = Attempts(root)
  number = history.begin(run, engine="local", job_id="", nodes=["a"], commit="c", step=0)
  history.started(run, number, 0, "a", {"startup": {}})
  writer = Metrics(root, run)
  values = {tag: 1.0 for tag in FIGURES} | {f"eval/t{i}/acc": 0.5 for i in range(14)}
  values |= {f"rank/{r}/{p}_s": 1.0 + (r == 1) * (p == "load") for r in range(3) for p in PHASES}
  writer.add(42, 4200, values)
  writer.flush()
  seen = live.snapshot()
  console = Console(record=True, width=width, height=height, file=io.StringIO())
  console.print(fitting(live, seen, seen.run(run), console))
  text = console.export_text()
  assert len(text.rstrip("\n").splitlines()) < height
  words = " ".join(text.split())
  for part in ("training loss", "rank 1 is 1 s above the median", "goodput", ": launch", "t0"):
    assert part in words, part


def test_the_end_of_a_run_that_failed_is_on_a_low_screen_with_its_reason(root, live, monkeypatch):
  """The last picture stays on the terminal: were it higher than that, its head would be gone."""
  run = make(root, seeds=(0,))["variant", 0]
  writer = Metrics(root, run)
  writer.add(42, 4200, {tag: 1.0 for tag in FIGURES} | {f"eval/t{i}/acc": 0.5 for i in range(14)})
  writer.flush()
  records = Experiments(root)
  records.update_run(run, status="failed", error="step 43: the loss is not finite")
  records.close()
  states = iter(("running", "failed"))
  found = watch.find
  monkeypatch.setattr(watch, "find", lambda *of: replace(found(*of), status=next(states)))
  monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
  written = io.StringIO()
  watch.watch(live, run, Console(file=written, width=80, height=20, force_terminal=True))
  last = written.getvalue().rpartition(run)[2]
  assert "failed" in last and "the loss is not finite" in last
  assert last.count("\n") < 20


def test_a_curve_has_its_ends_beside_it_where_there_is_room(root, live):
  run = make(root, seeds=(0,), steps=range(0))["variant", 0]
  writer = Metrics(root, run)
  for step in range(1, 201):
    norm = (0.5, 0.75, 0.625, 0.625)[min(step // 50, 3)]
    writer.add(step, 100 * step, {"train/loss": 2.0, "grad_norm/all": norm, "lr/dense": 1e-3})
  writer.flush()
  for width in (100, 120, 200):
    lines = [line.rstrip() for line in shown(live, run, width).splitlines()]
    (norm,) = (line for line in lines if line.startswith("gradient norm"))
    (rate,) = (line for line in lines if line.startswith("learning rate"))
    assert norm.split()[2] == "0.625" and norm.endswith("0.5 to 0.75")
    assert " to " not in rate, "a flat one has one value"
  assert "0.5 to 0.75" not in shown(live, run, 80)


def test_what_a_researcher_must_see_has_a_colour(root, live):
  """A value that is not finite, and a last line that is older than lines of this run come."""
  run = make(root, seeds=(0,), steps=range(0))["variant", 0]
  writer = Metrics(root, run)
  for step in range(1, 6):
    nan = dict.fromkeys(("grad_norm/all", "data/wait_s", "train/mfu"), math.nan)
    writer.add(step, step, {"train/loss": 2.0} | nan)
    writer.flush()
  seen = live.snapshot()
  of = replace(seen.run(run), status="running")
  assert styles(picture(live, seen, of, 120), "nan") == {"red"}
  assert styles(picture(live, seen, of, 120), " ago") == {""}
  assert "nan s" not in shown(live, run) and "nan %" not in shown(live, run)
  with patch.object(watch.time, "time", return_value=time.time() + 600):
    assert styles(picture(live, seen, of, 120), "10 min ago") == {"yellow"}


def test_a_layer_of_nan_hides_no_other_and_no_share_is_of_nan(root, live):
  run = make(root, seeds=(0,), steps=range(0))["variant", 0]
  writer = Metrics(root, run)
  loads = {f"moe/{layer}/load_max_over_mean": value for layer, value in enumerate((math.nan, 3.5))}
  dead = {"moe/0/dead": math.nan, "moe/1/dead": 2.0}
  times = {"time/step_s": math.inf, "time/forward_s": 1.0}
  for step in (1, 2):
    writer.add(step, step, {"train/loss": 2.0} | loads | dead | times)
  writer.flush()
  text = shown(live, run, 80)
  assert "over mean 3.50 in MoE layer 1, 2 dead experts" in text, text
  assert "nan" not in text and "time: forward 100 %" in text, text


def test_a_long_name_leaves_the_numbers_beside_it(root, live):
  run = make(root, seeds=(0,), steps=range(0))["variant", 0]
  writer = Metrics(root, run)
  writer.add(1, 1, {"train/loss": 2.0, f"eval/{'n' * 200}/acc": 0.4321, "eval/t/bpb": 1.2345})
  writer.flush()
  text = shown(live, run, 80)
  assert "0.4321" in text and "1.2345" in text and "accuracy" in text, text


@pytest.mark.parametrize(
  "seconds, told",
  [(0.4, "0 s ago"), (89, "89 s ago"), (2846, "47 min ago"), (9000, "2.5 h ago")]
  + [(345_600, "4.0 d ago"), (-30, "30 s ahead of this clock")],
)
def test_how_long_ago_is_told_in_the_largest_unit(seconds, told):
  assert ago(time.time() - seconds) == told


def test_seconds_have_their_unit_and_a_suites_mean_its_name(root, live):
  run = make(root, seeds=(0,), steps=range(0))["variant", 0]
  writer = Metrics(root, run)
  values = {"train/loss": 2.0, "data/wait_s": 1.61e-5, "checkpoint/stall_s": 1230.4}
  values |= {f"eval/{task}/acc": 0.5 for task in ("asked", "mine", "told")}
  writer.add(1, 1, values)
  writer.flush()
  seen = live.snapshot()
  of = replace(seen.run(run), toml='[eval]\nsuite = "some/where/mine.toml"\n')
  console = Console(record=True, width=80)
  console.print(picture(live, seen, of, 80))
  lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
  assert "waiting for data 16.1 µs" in lines and "checkpoint stall 1,230 s" in lines
  assert [line.split(" 0.5")[0] for line in lines[-3:]] == ["mean of mine", "asked", "told"]


def styles(drawn, words):
  """Of the pieces of a picture in which these words stand."""
  pieces = Console(width=120).render(drawn)
  return {str(piece.style or "").replace("none", "") for piece in pieces if words in piece.text}


def test_a_run_that_was_resumed_says_so(root, live):
  run = make(root, seeds=(0,))["variant", 0]
  writer = Metrics(root, run)
  writer.add(41, 4100, {"train/loss": 2.0, "startup/first_step_s": 3.0, "startup/rewound_steps": 7})
  writer.add(42, 4200, {"train/loss": 2.0})
  writer.flush()
  words = " ".join(shown(live, run, 80).split())
  assert "resumed at step 40, 7 steps back" in words and "ago" in words


def test_a_start_whose_first_line_has_no_loss_yet_is_no_start(root, live):
  """A file that was imported, or of which lines are missing."""
  run = make(root, seeds=(0,))["variant", 0]
  writer = Metrics(root, run)
  writer.add(41, 4100, {"startup/first_step_s": 3.0})
  writer.flush()
  assert "resumed" not in shown(live, run, 80)


def test_an_interrupted_run_tells_what_goes_on_with_it(root, live):
  ids = make(root, seeds=(0,))
  seen = live.snapshot()
  console = Console(record=True, width=100)
  run = replace(seen.run(ids["variant", 0]), status="interrupted")
  console.print(picture(live, seen, run, 100))
  assert "its process ended; the same command goes on with it" in console.export_text()


def test_only_a_run_that_goes_on_has_time_left(root, live):
  run = make(root, seeds=(0,), steps=range(0))["variant", 0]
  writer = Metrics(root, run)
  writer.add(1, 1000, {"train/loss": 2.0, "train/tokens_per_s": 100.0})
  writer.flush()
  seen = live.snapshot()
  for status, left in (("running", True), ("interrupted", False), ("failed", False)):
    of = replace(seen.run(run), status=status, toml="[schedule]\ntotal_tokens = 4000\n")
    console = Console(record=True, width=100)
    console.print(picture(live, seen, of, 100))
    assert ("0:00:30 left" in console.export_text()) == left, status


def test_a_pipe_gets_whole_lines_of_now_and_of_the_end(root, live, monkeypatch):
  run = make(root, seeds=(0,))["variant", 0]
  states = iter(("running", "running", "completed"))
  found = watch.find
  monkeypatch.setattr(watch, "find", lambda *of: replace(found(*of), status=next(states)))
  monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
  written = io.StringIO()
  watch.watch(live, run, Console(file=written, width=100))
  heads = [line for line in written.getvalue().splitlines() if line.startswith(run)]
  assert ["running" in line for line in heads] == [True, False]
  assert written.getvalue().endswith("\n") and "\x1b" not in written.getvalue()


def test_an_unknown_run_is_refused_with_the_newest(root, live):
  with pytest.raises(RecordError, match="no records"):
    watch.watch(live, None, Console())
  ids = make(root, seeds=(0,))
  with pytest.raises(RecordError, match=f"no run 'x'; the newest are: {ids['variant', 0]}"):
    watch.watch(live, "x", Console())


def test_a_curve_goes_from_its_largest_to_its_least():
  assert curve(np.arange(8.0), 8) == BLOCKS
  assert curve(np.arange(8.0)[::-1], 8) == BLOCKS[::-1]
  spiked = np.concatenate([[1000.0], np.linspace(2, 1, 99)])
  assert curve(spiked, 20)[:2] == "██" and curve(spiked, 20)[-1] == "▁"
  assert curve(np.array([1.0, 1.0, np.nan]), 8) == "▁▁" and curve(np.array([np.nan, 1.0]), 8) == ""


@pytest.mark.parametrize(
  "number, unit, told",
  [
    (999_400, "", "999 k"),
    (999_999, "", "1 M"),
    (999.6, "", "1 k"),
    (0, "", "0"),
    (0.25, "", "0.25"),
    (4.5e9, "B", "4.5 GB"),
    (0.00238, "s", "2.38 ms"),
    (1.61e-5, "s", "16.1 µs"),
    (0, "s", "0 s"),
  ],
)
def test_three_digits_and_a_prefix_say_how_much(number, unit, told):
  """What rounds up to the next prefix has that one: 1 M, not 1e+03 k."""
  assert rounded(number, unit) == told
