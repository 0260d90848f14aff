"""Text from people, in every table and line of a terminal: shown as it is."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labs import write_files
from rich.console import Console
from roots import start_run

from nmoe.config import file as configs
from nmoe.records.experiments import Experiments
from nmoe.records.reader import Hypothesis
from stages import ablate, show
from stages.text import plain, print_lines, visible

REPO = Path(__file__).resolve().parents[2]
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer"
TEXTS = (GLOO, "by 3 % [see notes/x] [/notes]", "x [/]", "[bold]b", "[link=file:///x]y", "a\\[b]")
pytestmark = pytest.mark.faults


def record(root: Path, text: str, arm: str = "arm") -> str:
  """An experiment in which every string that people or other libraries write is `text`."""
  db = Experiments(root)
  e = db.create(text, "ablate", [Hypothesis(text, "val/bpb", "lower", 0.0)])
  run = start_run(db, e.id, arm, 0, environment={"torch": text}, target=text)
  db.update_run(run.id, status="failed", error=text)
  db.conclude(e.id, "refuted", {"reason": text})
  db.link(e.id, e.id, "refines", text)
  db.close()
  return e.id


def shown(root: Path, name: str) -> str:
  out = io.StringIO()
  console = Console(file=out, width=400)
  show.experiments(root, console)
  show.experiment(root, name, console)
  return out.getvalue()


@pytest.mark.parametrize("text", TEXTS)
def test_tables_show_text_as_it_is(tmp_path, text):
  """In the list once, in the experiment as statement, arm, reason, error and link."""
  assert shown(tmp_path, record(tmp_path, text, arm=text)).count(text) >= 6


@pytest.mark.parametrize("code", ["\x1b[2J\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\r", "\u202e"])
def test_text_cannot_steer_the_terminal(tmp_path, code):
  said = shown(tmp_path, record(tmp_path, f"before{code}after", arm=f"a{code}"))
  assert code not in said and "\x1b" not in said and visible(code) in said
  command = [sys.executable, "-m", "stages.cli", "experiments", "show", code, "--root"]
  done = subprocess.run([*command, str(tmp_path)], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 1 and "no experiment" in done.stderr and "\x1b" not in done.stderr


@given(st.text())
def test_plain_text_has_no_style_and_no_control(text):
  made = plain(text)
  assert made.spans == [] and made.plain == visible(text)
  assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in made.plain)


def test_names_of_configurations_and_their_differences(tmp_path):
  base = configs.load(write_files(tmp_path), env={})
  text = "by 3 % [see notes/x] [/notes]"
  other = configs.changed(base, {"experiment.name": text, "data.mixture": f"/x/{text}.toml"})
  out = io.StringIO()
  show.plan(other, Console(file=out, width=400))
  ablate.differences(base, other, Console(file=out, width=400))
  assert out.getvalue().count(text) == 2


def test_plan_shows_the_schedule_and_what_is_rounded(tmp_path):
  """21,503 tokens are 20 batches of 1,024 and 1,023 tokens that nothing trains."""
  base = configs.load(write_files(tmp_path), env={})
  keys = {"total_tokens": 21503, "batch_tokens": 1024, "warmup_tokens": 4096, "decay_tokens": 2048}
  keys |= {"decay": "linear"}
  config = configs.changed(base, {f"schedule.{key}": value for key, value in keys.items()})
  out = io.StringIO()
  show.plan(config, Console(file=out, width=400))
  rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines()]
  assert "20 steps of 1,024 tokens, 20,480 in all" in out.getvalue()
  assert ["warm-up", "4,096", "4", "0.125", "0.875"] in rows
  assert ["sustain", "14,336", "14", "1", "1"] in rows
  assert ["decay", "2,048", "2", "0.75", "0.25"] in rows
  assert "and 1,023 tokens more, too few for a step" in out.getvalue()
  (embed,) = (row for row in rows if row[:1] == ["embed"])
  assert embed[3:5] == ["0.01", "0.0025"]  # peak and last of dense_lr 0.01


def test_a_row_is_a_line_and_columns_align_in_cells():
  """Of wide characters, line breaks and tabs; one cell that is too wide moves its own row alone."""
  rows = [("表表", 1, "a\nb\tc"), ("x" * 60, 2, ""), ("ab", 30, "d" * 200)]
  out = io.StringIO()
  print_lines(("name", "n", "text"), rows, Console(file=out, width=20))
  lines = ["name  n   text", "表表  1   a b c", "x" * 60 + "  2", "ab    30  " + "d" * 200]
  assert out.getvalue().splitlines() == lines
  empty = io.StringIO()
  print_lines(("name", "n"), [], Console(file=empty))
  assert empty.getvalue() == "name  n\n"


def test_a_long_name_gives_a_short_id_and_tables_stay_readable(tmp_path):
  """It moves its own row alone, and all of it is there."""
  record(tmp_path, "short")
  e = record(tmp_path, "n" * 300)
  assert len(e) <= 80
  out = io.StringIO()
  show.experiments(tmp_path, Console(file=out, width=80))
  head, long, short = out.getvalue().splitlines()
  assert long.startswith(f"{e}  ablate") and long.endswith("n" * 300) and "refuted" in long
  assert short.index("ablate") == head.index("stage") < 45
