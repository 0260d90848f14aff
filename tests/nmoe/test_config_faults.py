"""Values that cannot work are refused when the configuration is read, with key and value."""

import math
import os
from pathlib import Path

import pytest
from test_config import BASE, BASE_TEXT, base_file, variant, write

from nmoe.config.file import changed, load, loads
from nmoe.config.sections import leaves
from nmoe.data.mixture import load_mixture
from nmoe.errors import ConfigError

pytestmark = pytest.mark.faults
FLOATS = [key for key, value in leaves(BASE).items() if type(value) is float]
INTS = [key for key, value in leaves(BASE).items() if type(value) is int]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", FLOATS)
def test_no_number_is_infinite(key, value):
  if key == "optim.clip_norm" and value == math.inf:
    assert changed(BASE, {key: value}).optim.clip_norm == math.inf, "no clipping"
    return
  with pytest.raises(ConfigError, match=f"{key} = "):
    changed(BASE, {key: value})


@pytest.mark.parametrize("key", INTS)
def test_no_number_is_beyond_what_records_hold(key):
  for value in (2**63, 10**25):
    with pytest.raises(ConfigError, match=f"{key} = {value}"):
      changed(BASE, {key: value})


@pytest.mark.parametrize(
  "key, value",
  [
    ("train.seed", 2**63 - 1),
    ("train.seed", 2**63 - 3),
    ("moe.num_experts", 10**8),
    ("model.num_layers", 10**6),
    ("experiment.seeds", 10**9),
    ("experiment.name", ""),
    ("experiment.name", " \t"),
    ("experiment.statement", ""),
    ("run.root", ""),
    ("run.root", "a\0b"),
    ("data.mixture", ""),
    ("model.norm_eps", 1e30),
    ("optim.eps", 1e30),
    ("model.init_std", 1e30),
    ("moe.bias_update_rate", 1e30),
    ("precision.finish_tokens", 1228801),
  ],
)
def test_values_that_cannot_work_are_refused(key, value):
  with pytest.raises(ConfigError, match=key):
    changed(BASE, {key: value})


def test_a_normalised_router_of_one_expert_has_no_gradient():
  with pytest.raises(ConfigError, match=r"moe\.normalize.*top_k = 1.*no gradient"):
    changed(BASE, {"moe.top_k": 1})
  assert changed(BASE, {"moe.top_k": 1, "moe.normalize": False})


@pytest.mark.parametrize(
  "key, value, need",
  [
    ("schedule.decay_tokens", 2048, "no step"),
    ("schedule.warmup_tokens", 2048, "no step"),
    ("schedule.decay_tokens", 1228800 - 81920 + 1, "exceeds"),
  ],
)
def test_phases_that_no_step_reaches_are_refused(key, value, need):
  with pytest.raises(ConfigError, match=f"{key.split('.')[0]}.*{need}"):
    changed(BASE, {key: value})


def test_phases_are_of_the_tokens_that_are_trained():
  """1,228,800 is 300 batches: a token less trains 299, into which 299 batches of phases fit."""
  keys = {"schedule.total_tokens": 1228799, "schedule.decay_tokens": 299 * 4096 - 81920}
  assert changed(BASE, keys).steps == 299
  with pytest.raises(
    ConfigError, match="exceeds total_tokens 1228799, of which 1224704 are trained in 299 steps"
  ):
    changed(BASE, keys | {"schedule.decay_tokens": 299 * 4096 - 81919})


@pytest.mark.parametrize("key, value", [("launch.port", 65536), ("launch.threads", 10**6)])
def test_numbers_that_no_machine_takes(key, value):
  with pytest.raises(ConfigError, match=f"{key} = {value}"):
    changed(BASE, {key: value})


@pytest.mark.parametrize("name", ["NMOE__DIM", "NMOE_MODEL__", "NMOE___DIM", "NMOE__"])
def test_an_override_without_a_section_or_a_key(tmp_path, name):
  with pytest.raises(ConfigError, match=f"environment {name}: overrides are named"):
    load(base_file(tmp_path), {name: "3"})


# --- files ---


def test_a_byte_order_mark(tmp_path):
  path = tmp_path / "b.toml"
  path.write_bytes(b"\xef\xbb\xbf" + BASE_TEXT.encode())
  assert load(path, env={}).model == BASE.model


@pytest.mark.parametrize("key", ["run.root", "data.mixture"])
def test_a_home_folder(tmp_path, monkeypatch, key):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  section, name = key.split(".")
  env = {f"NMOE_{section.upper()}__{name.upper()}": '"~/x"'}
  assert leaves(load(base_file(tmp_path), env))[key] == str(tmp_path / "home" / "x")
  text = BASE_TEXT.replace('".nmoe"', '"${NMOE_ROOT:-.nmoe}"')
  assert loads(text, env={"NMOE_ROOT": "~/y"}).run.root == str(tmp_path / "home" / "y")
  with pytest.raises(ConfigError, match=f"{key} = '~nobody-here/x'"):
    load(base_file(tmp_path), {next(iter(env)): '"~nobody-here/x"'})


def test_a_variable_in_a_default_is_refused():
  text = BASE_TEXT.replace('".nmoe"', '"${NMOE_A:-${NMOE_B:-x}}"')
  with pytest.raises(ConfigError, match=r"run\.root.*default.*\$\{"):
    loads(text, env={})


def test_an_unknown_section_of_the_environment_is_named(tmp_path):
  with pytest.raises(ConfigError, match="NMOE_MODLE__DIM.*model"):
    load(base_file(tmp_path), {"NMOE_MODLE__DIM": "3"})


def test_a_circle_of_links(tmp_path):
  (tmp_path / "v.toml").symlink_to("w.toml")
  (tmp_path / "w.toml").symlink_to("v.toml")
  for read in (load, load_mixture):
    with pytest.raises(ConfigError, match=r"cannot be read: .*(Too many levels|loop)"):
      read(tmp_path / "v.toml")


@pytest.mark.parametrize("extends", ["a\\u0000b", "fifo", "/dev/zero", "."])
def test_what_is_no_file_is_not_read(tmp_path, extends):
  os.mkfifo(tmp_path / "fifo")
  path = write(tmp_path, "v.toml", f'extends = "{extends}"\n')
  with pytest.raises(ConfigError, match=r"v\.toml"):
    load(path, env={})


def test_a_long_chain_and_deep_brackets(tmp_path):
  base_file(tmp_path)
  before = "base.toml"
  for i in range(1500):
    write(tmp_path, f"{i}.toml", f'extends = "{before}"\n')
    before = f"{i}.toml"
  with pytest.raises(ConfigError, match="extends"):
    load(tmp_path / before, env={})
  with pytest.raises(ConfigError, match=r"variant\.toml"):
    load(variant(tmp_path, "[precision]\nlinears = " + "[" * 4000 + "]" * 4000), env={})


def test_the_messages_name_the_file(tmp_path):
  with pytest.raises(ConfigError, match=str(Path(tmp_path / "variant.toml"))):
    load(variant(tmp_path, "[optim]\ndense_lr = inf\n"), env={})


# --- similar ones ---


@pytest.mark.parametrize(
  "body, need",
  [
    ("[optim]\ndense_lr = 1" + "0" * 400, "dense_lr has 401 digits"),
    ("[model]\ndim = 1" + "0" * 5000, "not valid TOML"),
    ("[data]\nweights_from = [[1" + "0" * 400 + ", 1.0]]", "weights_from.* has 401 digits"),
    ("[scaling]\nhorizon = 1e3", r"horizon = 1000\.0 must be in \[0, 2\]"),
    ("[model]\nnum_layers = 1001", "num_layers = 1001"),
  ],
)
def test_numbers_without_end_are_one_error(tmp_path, body, need):
  with pytest.raises(ConfigError, match=rf"variant\.toml: .*{need}"):
    load(variant(tmp_path, body + "\n"), env={})


def test_an_override_of_too_many_digits(tmp_path):
  with pytest.raises(ConfigError, match="NMOE_MODEL__DIM=.*is not a TOML value"):
    load(base_file(tmp_path), {"NMOE_MODEL__DIM": "9" * 5000})


@pytest.mark.parametrize(
  "holes, need",
  [
    (((5,),), "pairs"),
    (((1, 2, 3),), "pairs"),
    (((-1, 5),), "pairs"),
    (((5, 0),), "pairs"),
    (((5, 10), (7, 3)), "overlap"),
    (((2**63 - 1, 2**63 - 1),), "beyond 64 bits"),
  ],
)
def test_holes_are_pairs_that_lie_apart(holes, need):
  with pytest.raises(ConfigError, match=rf"data\.holes = .*{need}"):
    changed(BASE, {"data.holes": holes})


def test_steps_that_are_skipped_count_from_one():
  assert changed(BASE, {"train.skip_steps": (1, 2)}).train.skip_steps == (1, 2)
  for step in (0, -1):
    with pytest.raises(ConfigError, match=r"train\.skip_steps.*count from 1"):
      changed(BASE, {"train.skip_steps": (step,)})


@pytest.mark.parametrize(
  "key, value, need",
  [
    ("model.init", "import:", "digest"),
    ("model.init", "import:../../other", "digest"),
    ("prod.notify", "mail\0x", "NUL"),
    ("slurm.partition", "a\n#SBATCH --exclusive", "one line"),
    ("launch.interface", "eth0\x1b[2J", "one line"),
    ("experiment.name", "a\udcff", "UTF-8"),
    ("data.mixture", "/caf\udce9/m.toml", "UTF-8"),
    ("experiment.statement", "x" * 10_001, "10001 characters"),
  ],
)
def test_strings_that_their_reader_cannot_take(key, value, need):
  with pytest.raises(ConfigError, match=f"{key} .*{need}"):
    changed(BASE, {key: value})


def test_a_file_whose_name_is_no_utf8(tmp_path):
  path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.toml"))
  path.write_text(BASE_TEXT)
  with pytest.raises(ConfigError, match=r"caf.udce9\.toml.*rename it"):
    load(path, env={})


@pytest.mark.parametrize("name", ["NMOE_MODEL_DIM", "NMOE_TRAIN_MICRO_BATCH"])
def test_an_override_with_one_line_too_few(tmp_path, name):
  """It would be taken for a variable of the user's, and the run train something else."""
  with pytest.raises(ConfigError, match=f"environment {name}: .* NMOE_[A-Z]+__[A-Z_]+, with two"):
    load(base_file(tmp_path), {name: "64"})
  assert load(base_file(tmp_path), {"NMOE_CORPUS": "64"}).model == BASE.model


@pytest.mark.parametrize(
  "key, value, found",
  [
    ("data.tokenizer", "hf:~/t.json", "hf:{}/t.json"),
    ("data.tokenizer", "hf:t.json", "hf:{}/t.json"),
    ("eval.suite", "~/s.toml", "{}/s.toml"),
    ("eval.suite", "s.toml", "{}/s.toml"),
    ("eval.suite", "quick", "quick"),
  ],
)
def test_paths_are_of_the_file_that_names_them(tmp_path, monkeypatch, key, value, found):
  monkeypatch.setenv("HOME", str(tmp_path))
  section, name = key.split(".")
  config = load(variant(tmp_path, f'[{section}]\n{name} = "{value}"\n'), env={})
  assert leaves(config)[key] == found.format(tmp_path)


def test_a_base_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  base_file(tmp_path)
  path = write(tmp_path, "v.toml", 'extends = "~/base.toml"\n')
  assert load(path, env={}).model == BASE.model
