"""The command line as a user meets it: in processes of its own, and each command by name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from labs import write_variant
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from nmoe.config import file as configs
from nmoe.config.file import load
from nmoe.errors import ConfigError
from nmoe.evals.sources import prepare
from nmoe.records.experiments import Experiments
from stages import workbench
from stages.cli import ROOT, app

REPO = Path(__file__).parents[2]
MUON = (
  '[experiment]\nname = "tiny-muon"\nstatement = "Muon is better."\n[optim]\nmatrices = "muon"\n'
)


def shell(*words: str, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
  """`nmoe words…` in a process of its own."""
  return subprocess.run(
    [sys.executable, *python, "-m", "stages.cli", *map(str, words)],
    capture_output=True,
    text=True,
    timeout=120,
    cwd=REPO,
    env={**os.environ, "COLUMNS": "160", **env},
  )


def nmoe(*words: str, code: int = 0) -> str:
  """`nmoe words…` in this process: its output."""
  done = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "200"})
  assert done.exit_code == code, (done.output, done.exception)
  return done.output


@pytest.mark.faults
@pytest.mark.parametrize("words", [("plan", "configs/moonlet/cpu.toml"), ("--help",)])
def test_a_terminal_that_is_not_utf8(words):
  done = shell(*words, PYTHONIOENCODING="ascii")
  assert done.returncode == 0 and done.stderr == "" and len(done.stdout) > 400


@pytest.mark.faults
@pytest.mark.parametrize("words", [("plan", "configs/moonlet/cpu.toml"), ("--help",)])
def test_an_output_that_is_full(words):
  with Path("/dev/full").open("w") as full:
    done = subprocess.run(
      [sys.executable, "-m", "stages.cli", *words],
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      cwd=REPO,
    )
  said = "error: the output of this command: No space left on device; free space\n"
  assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.faults
def test_a_current_folder_that_is_gone(tmp_path, lab):
  """Names of it are refused; whole ones do not need it."""
  gone, here = tmp_path / "gone", str(REPO)
  gone.mkdir()
  start = f"import os, runpy, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
  start += "runpy.run_module('stages.cli', run_name='__main__')"
  for more, status, said in (
    (("experiments", "list"), 1, "error: .nmoe is of the current folder, which is gone; go to "),
    (("plan", "a.toml"), 1, "error: a.toml is of the current folder, which"),
    (("experiments", "list", "--root", str(lab.root)), 0, ""),
  ):
    command = [sys.executable, "-P", "-c", start, *more]  # a script has no "" on its path either
    done = subprocess.run(
      command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": here}
    )
    gone.mkdir()
    assert done.returncode == status and said in done.stderr, done.stderr


@pytest.mark.faults
def test_a_terminal_without_columns(lab):
  """Some of those that machines open say 0: a table would be nothing at all."""
  done = shell("experiments", "list", "--root", str(lab.root), COLUMNS="0")
  assert done.returncode == 0 and "tiny-1" in done.stdout


def test_help_is_instant():
  """No torch and nothing else that is slow; half a second of processor time, start included, and at
  most 1.75 of what typer itself takes to be imported, which is most of it.
  """
  done = shell("--help", python=("-X", "importtime"))
  assert done.returncode == 0
  for word in ("ablate", "research", "experiments", "bench", "check", "prep-mixture", "doctor"):
    assert word in done.stdout
  imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
  assert "typer" in imported
  assert not imported & {"torch", "numpy", "datasets", "duckdb", "tiktoken"}
  commands = ("-m", "stages.cli", "--help"), ("-c", "import typer.rich_utils")
  ours, typers = (min(processor_s(command) for _ in range(5)) for command in commands)
  assert ours <= min(0.5, 1.75 * typers)


def processor_s(command: tuple[str, ...]) -> float:
  """Of Python for this command, its start included."""
  begun = os.times()
  subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, check=True)
  ended = os.times()
  spent = ended.children_user + ended.children_system
  return spent - begun.children_user - begun.children_system


def test_the_stages_start_without_torch():
  """The parent of every run; only its children import torch."""
  modules = (
    "stages.ablate, stages.research, stages.proofs.bench_step, stages.runs, stages.report.html, "
    "stages.evals"
  )
  line = f"import sys, {modules}; print('torch' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=REPO)
  assert (done.stdout, done.stderr) == ("False\n", "")


BROKEN = {  # what is asked of the run "found": the end of the error
  "a run of eval": ("eval", "none", "no run 'none'; the newest are: "),
  "a step of eval": ("eval", "found", "--step", "4", "has the steps 12, not 4"),
  "a suite": ("eval", "found", "--suite", "quik", "'quik' is unknown; did you mean 'quick'?"),
  "a suite's file": ("eval", "found", "--suite", "no.toml", "No such file or directory"),
  "a suite's items": ("eval", "found", "--suite", "short", "no items of task csqa_0shot"),
  "a CSV's folder": (
    "eval",
    "found",
    "--suite",
    "MINE",
    "--out",
    "no/a.csv",
    "no/a.csv is no file",
  ),
  "a run of export": ("export", "none", "OUT", "no run 'none'; the newest are: "),
  "a step of export": ("export", "found", "OUT", "--step", "4", "has the steps 12, not 4"),
  "a dtype": ("export", "found", "OUT", "--dtype", "fp16", "must be bf16 or fp32"),
  "a check": ("export", "found", "OUT", "--check", "all", "must be full, layers or tensors"),
  "a folder": ("export", "found", ".", "is there already"),
}


@pytest.mark.faults
def test_eval_and_export_say_at_once_what_is_wrong(lab):
  """Without torch, whose import takes seconds: one line each."""
  run = lab.record(train__checkpoint_every=0)
  assert lab.attempt(run) == 0
  words = {"found": run, "OUT": str(lab.root.parent / "out")}
  (lab.root.parent / "mine.toml").write_text('tasks = ["pairs"]\n')
  (lab.root.parent / "items.jsonl").write_text(
    '{"task": "pairs", "context": "n", "choices": [" a", " b"], "gold": 0}\n'
  )
  prepare(lab.root.parent / "items.jsonl", lab.root)
  words["MINE"] = str(lab.root.parent / "mine.toml")
  asked = [[words.get(word, word) for word in case[:-1]] for case in BROKEN.values()]
  code = (
    "import sys\nfrom stages.cli import app\n"
    f"for words in {asked!r}:\n"
    "  try:\n"
    f"    app([*words, '--root', {str(lab.root)!r}])\n"
    "  except SystemExit as end:\n"
    "    print(end.code, 'torch' in sys.modules)\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
  assert done.stdout == "1 False\n" * len(BROKEN), done.stderr
  lines = done.stderr.splitlines()
  assert len(lines) == len(BROKEN)
  for line, case in zip(lines, BROKEN.values(), strict=True):
    assert line.startswith("error: ") and case[-1] in line, line


def test_an_ablation_from_the_shell(lab):
  """Two real children, the records and the report; a second call says what it reuses."""
  variant = write_variant(lab.file, "muon", MUON)
  done = shell("ablate", lab.file, variant, "--seeds", "1")
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  page = Path(re.search(r"report: (\S+)", done.stdout)[1])
  assert page.is_file()
  assert "inconclusive" in done.stdout  # one seed has no interval
  runs_ = lab.records.runs("tiny-muon-1")
  assert [(r.arm, r.status) for r in runs_] == [("baseline", "completed"), ("variant", "completed")]
  assert lab.records.find("tiny-muon").status == "completed"
  listed = nmoe("experiments", "list", "--root", lab.root)
  assert "tiny-muon-1" in listed and "2/2" in listed and "Muon is better." in listed
  shown = nmoe("experiments", "show", "tiny-muon", "--root", lab.root)
  assert all(run.id in shown for run in runs_) and "inconclusive" in shown
  page.unlink()
  assert str(page) in nmoe("report", "tiny-muon-1", "--root", lab.root)
  assert page.is_file()


@pytest.mark.parametrize(
  "words",
  [
    ("experiments", "list"),
    ("experiments", "show", "x"),
    ("report", "x"),
    ("rerun", "x"),
    ("viz",),
    ("watch",),
  ],
)
def test_a_root_without_records_is_one_error_and_stays_as_it_was(tmp_path, words):
  root = tmp_path / "root"
  done = shell(*words, "--root", root)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith(f"error: {root} holds no records (no experiments.db)")
  assert not root.exists()


def test_commands_and_configurations_have_one_default_root(monkeypatch):
  monkeypatch.delenv("NMOE_ROOT", raising=False)
  for file in sorted((REPO / "configs").glob("mo*/*.toml")):
    if "[experiment]" in file.read_text(encoding="utf-8"):
      assert Path(load(file).run.root) == ROOT, file


def test_errors_are_one_message_and_status_one(lab):
  done = shell("ablate", lab.file, lab.file)
  assert done.returncode == 1
  assert done.stderr.startswith("error: the variant computes the same as the baseline")
  assert "Traceback" not in done.stderr
  typo = write_variant(lab.file, "typo", "[moe]\ntop_kk = 3\n")
  done = shell("config", "show", typo)
  assert done.returncode == 1
  assert "unknown key moe.top_kk = 3; did you mean 'top_k'?" in done.stderr
  done = shell("config", "show", lab.file, NMOE_MOE__TOP_K="9")
  assert "NMOE_MOE__TOP_K: moe.top_k = 9 exceeds num_experts 4" in done.stderr


@pytest.mark.parametrize("command", ["resume", "ep"])
@pytest.mark.parametrize(
  ("ranks", "said"), [("1,two", "must be whole numbers"), ("1,3", "choose from 1, 2, 4$")]
)
def test_numbers_of_ranks_that_mean_nothing(lab, launches, command, ranks, said):
  done = CliRunner().invoke(app, ["check", command, str(lab.file), "--ranks", ranks])
  assert isinstance(done.exception, ConfigError)
  assert re.search(said, str(done.exception))
  assert launches.ids == []


def test_a_cpu_has_no_kernels_to_build(lab):
  done = CliRunner().invoke(app, ["kernels", "build", str(lab.file)])
  assert isinstance(done.exception, ConfigError)
  assert "pass --arch sm_90a or sm_100a" in str(done.exception)


def test_config_show_and_diff(lab):
  shown = nmoe("config", "show", lab.file)
  assert configs.loads(shown) == lab.config
  variant = write_variant(lab.file, "muon", MUON + "dense_lr = 1e-3\n[train]\nlog_every = 7\n")
  assert nmoe("config", "diff", lab.file, variant).splitlines() == [
    "optim.matrices (identity): 'adamw' -> 'muon'",
    "optim.dense_lr (schedule): 0.01 -> 0.001",
    "train.log_every (free): 1 -> 7",
    "experiment.name (free): 'tiny' -> 'tiny-muon'",
    "experiment.statement (free): 'It learns.' -> 'Muon is better.'",
  ]
  assert nmoe("config", "diff", lab.file, lab.file) == ""


def test_plan(lab):
  said = nmoe("plan", lab.file)
  assert "FLOPs per token, forward and backward" in said
  assert "Bytes of a rank at the step's peak" in said


def test_the_plan_of_a_small_model_is_not_all_zeros(lab):
  """Two layers; the first has an MLP, the second a router, a shared and four experts."""
  q, kv_a, kv_b, o = 2 * 32 * 32, 32 * 32, 16 * 64, 32 * 32
  body = 2 * (q + kv_a + kv_b + o + 16 + 2 * 32) + 32 + 3 * 32 * 64 + 4 * 32 + 5 * 3 * 32 * 32
  said = nmoe("plan", lab.file)
  told = f"{(body + 2 * 257 * 32) / 1e3:.3f} k parameters"
  assert told in said and f"(without embedding and head {body / 1e3:.3f} k" in said
  assert " kFLOP " in said and " MiB " in said


def test_plan_has_the_mixture_by_tokens(lab):
  text = "[data]\nweights = [2]\nweights_from = [[2048, 1]]\n"
  said = nmoe("plan", write_variant(lab.file, "phases", text))
  assert "Shares by training tokens" in said
  mixture = said[said.index("Shares by training tokens") :]
  assert [line.split()[1:6:2] for line in mixture.splitlines() if "2,048" in line] == [
    ["0", "2,048", "0"],
    ["2,048", "6,144", "4"],
  ]


def test_doctor_finds_a_cpu(lab):
  assert "cpu" in nmoe("doctor", lab.file)


def test_prep_mixture(lab, tmp_path, monkeypatch):
  """Prints the folder; says how far it is; finds what is there."""
  said, prepare = [], workbench.prepare

  def counting(mixture, tokenizer, root, progress, verify):
    def told(*place):
      said.append(place)
      progress(*place)

    return prepare(mixture, tokenizer, root, told, verify)

  monkeypatch.setattr(workbench, "prepare", counting)
  words = ("prep-mixture", lab.file.with_name("mixture.toml"), "--tokenizer", "byte")
  folder = nmoe(*words, "--root", tmp_path / "other").strip()
  assert Path(folder).name == lab.data.name and Path(folder).parent.parent == tmp_path / "other"
  size = sum(len(line) - 12 for line in lab.file.with_name("text.jsonl").read_text().splitlines())
  assert said == [("text", 200, size)]
  assert nmoe(*words, "--root", tmp_path / "other").strip() == folder
  assert len(said) == 1


def test_missing_records(tmp_path):
  Experiments(tmp_path / "empty").close()
  done = shell("experiments", "show", "nothing", "--root", tmp_path / "empty")
  assert done.returncode == 1
  assert "no experiment 'nothing'; the newest are: none yet" in done.stderr


@pytest.mark.parametrize("words", [(), ("research",), ("experiments",), ("config",), ("bench",)])
def test_a_group_without_a_command_shows_its_help(words):
  done = CliRunner().invoke(app, list(words))
  assert "Commands" in done.output


def test_seeds_must_be_positive(lab):
  nmoe("research", "run", lab.file, "--seeds", "0", code=2)


def test_no_word_of_a_help_is_taken_for_markup():
  """As `[experiment]` would be, which is then not shown."""
  group, said = get_command(app), []
  for command in (group, *descendants(group)):
    options = [p.help for p in command.params if getattr(p, "help", None)]
    said += [text for text in (command.help, *options) if text]
  assert len(said) > 100
  assert [text for text in said if Text.from_markup(text).plain != text] == []


def descendants(command):
  for child in getattr(command, "commands", {}).values():
    yield child
    yield from descendants(child)
