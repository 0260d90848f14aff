"""The configuration: round trips, layers, tags, and an error that names file, key and value.

One file: every configuration is one text of which a key differs.
"""

from dataclasses import MISSING, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from model_configs import SHIPPED

from nmoe.config import file as configs
from nmoe.config.file import load, loads, to_toml
from nmoe.config.sections import SECTIONS, Config, diff, fingerprint, kind, leaves
from nmoe.errors import ConfigError
from nmoe.tables import Range

BASE_TEXT = """
[experiment]
name = "base"
statement = "The smallest valid file, with a few defaults written out."
[run]
root = ".nmoe"
[target]
arch = "cpu"
dtype = "fp32"
[model]
vocab_size = 257
dim = 128
num_layers = 4
dense_dim = 384
num_heads = 4
qk_rope_dim = 16
[moe]
num_experts = 16
top_k = 4
expert_dim = 64
[data]
mixture = "mixture.toml"
tokenizer = "byte"
seq_len = 256
[optim]
dense_lr = 3e-3
router_lr = 3e-3
expert_lr = 3e-3
[schedule]
batch_tokens = 4096
total_tokens = 1228800
warmup_tokens = 81920
[train]
micro_batch = 16
"""
BASE = loads(BASE_TEXT, env={})
GRAPH = {"target.arch": "sm_100a", "target.dtype": "bf16", "train.cuda_graph": True}
MXFP8 = {"target.dtype": "bf16", "rdep.payload": "mxfp8"}
NVFP4 = MXFP8 | {"rdep.payload": "nvfp4"}
HINTS = {
  f"{section}.{f.name}": get_type_hints(cls)[f.name]
  for section, cls in SECTIONS.items()
  for f in fields(cls)
}
REQUIRED = [
  f"{section}.{f.name}"
  for section, cls in SECTIONS.items()
  for f in fields(cls)
  if f.default is MISSING
]
RULED = ("data.tokenizer", "model.init", "experiment.metric")  # strings whose form has a rule
TEXTS = st.text(min_size=1).filter(lambda t: t.strip() and "\0" not in t and t[0] != "~")
LINES = st.from_regex(r"[\w.:/@ -]*[\w]", fullmatch=True).filter(str.isprintable)  # into scripts
FREE_STRINGS = [key for key, hint in HINTS.items() if hint is str and key not in RULED]


def write(folder: Path, name: str, text: str) -> Path:
  (folder / name).write_text(text, encoding="utf-8")
  return folder / name


def base_file(folder: Path) -> Path:
  return write(folder, "base.toml", BASE_TEXT)


def variant(folder: Path, text: str) -> Path:
  """A file in `folder` that extends the base."""
  return write(folder, "variant.toml", f'extends = "{base_file(folder).name}"\n{text}')


def unchecked(config: Config, key: str, value: Any) -> Config:
  """A copy with one leaf replaced and no invariant checked."""
  section, name = key.split(".")
  return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def other_value(key: str, value: Any) -> Any:
  """Another value of the leaf's type."""
  hint = HINTS[key]
  if get_origin(hint) is Literal:
    return next(choice for choice in get_args(hint) if choice != value)
  if get_origin(hint) is tuple:
    return ("o",) if value == () else ()
  return {bool: lambda: not value, str: lambda: value + "x"}.get(hint, lambda: value + 1)()


@given(
  strings=st.fixed_dictionaries(
    {k: LINES if k[:6] in ("launch", "slurm.", "jobset") else TEXTS for k in FREE_STRINGS}
  ),
  rate=st.floats(min_value=1e-300, max_value=1e30),
  clip=st.floats(min_value=1e-300),
  seed=st.integers(0, 2**63 - 4),
  linears=st.lists(st.sampled_from(["q", "kv_a", "kv_b", "o", "dense", "shared"])),
  flag=st.booleans(),
)
def test_a_resolved_file_reads_back_equal(strings, rate, clip, seed, linears, flag):
  """Any text (quotes, controls, ${…}), any float to the last bit; the environment plays no part."""
  config = configs.changed(
    BASE,
    {
      **strings,
      "optim.dense_lr": rate,
      "optim.clip_norm": clip,
      "train.seed": seed,
      "precision.linears": tuple(linears),
      "rdep.peer_access": flag,
    },
  )
  again = loads(to_toml(config), env={"NMOE_ROOT": "/elsewhere", "NMOE_TRAIN__SEED": "7"})
  assert again == config and diff(again, config) == {}
  assert fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_file_resolves_and_reads_back(path):
  config = load(path, env={})
  assert loads(to_toml(config), env={}) == config


@pytest.mark.parametrize("key", HINTS)
def test_the_fingerprint_ignores_free_fields_and_nothing_else(key):
  changed = unchecked(BASE, key, other_value(key, leaves(BASE)[key]))
  assert list(diff(BASE, changed)) == [key]
  assert (fingerprint(changed) == fingerprint(BASE)) == (kind(key) == "free")


def test_weights_by_tokens_read_back(tmp_path):
  rows = "weights_from = [[4096, 1, 3], [8192, 0.5, 0]]"
  config = load(variant(tmp_path, f"[data]\n{rows}\n"), env={})
  assert config.data.weights_from == ((4096.0, 1.0, 3.0), (8192.0, 0.5, 0.0))
  assert loads(to_toml(config), env={}) == config
  assert configs.changed(config, {"train.seed": 1}).data == config.data


def test_the_fingerprint_covers_the_data_and_not_the_spelling():
  assert fingerprint(BASE, "a") != fingerprint(BASE, "b")
  assert len(fingerprint(BASE)) == 16
  whole, point = (configs.changed(BASE, {"model.rope_theta": v}) for v in (10000, 10000.0))
  assert fingerprint(whole) == fingerprint(point)


@pytest.mark.parametrize("key", HINTS)
def test_a_wrong_type_names_file_key_and_value(key, tmp_path):
  section, name = key.split(".")
  path = variant(tmp_path, f"[{section}]\n{name} = 1979-05-27\n")
  with pytest.raises(ConfigError) as error:
    load(path, env={})
  assert all(part in str(error.value) for part in (str(path), key, "1979, 5, 27"))


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("[model]\ndim = 128.0", "model.dim = 128.0 is float, must be int"),
    ("[model]\ndim = true", "model.dim = True is bool, must be int"),
    ("[model]\ntie_embeddings = 1", "model.tie_embeddings = 1 is int, must be bool"),
    ("[optim]\ndense_lr = nan", "optim.dense_lr = nan"),
    ("[optim]\ndense_lr = 1e39", "optim.dense_lr = 1e+39 must be in [0, 1e+30]"),
    ("[optim]\nexpert_weight_decay = 1e7", "optim.expert_weight_decay = 10000000.0 must be in"),
    ('[target]\narch = "sm_100"', "did you mean 'sm_100a'?"),
    ('[precision]\nlinears = "q"', "precision.linears = 'q' must be a list"),
    ('[precision]\nlinears = ["q", "kv"]', "precision.linears[1] = 'kv' must be one of"),
    ("[model]\ndims = 1", "unknown key model.dims = 1; did you mean 'dim'?"),
    ("[modle]\ndim = 1", "unknown section [modle]; did you mean 'model'?"),
    ("[model.mla]\ndim = 1", "unknown key model.mla"),
  ],
)
def test_messages(text, said, tmp_path):
  with pytest.raises(ConfigError) as error:
    load(variant(tmp_path, text), env={})
  assert said in str(error.value) and str(tmp_path / "variant.toml") in str(error.value)


@given(key=st.sampled_from(sorted(HINTS)), data=st.data())
def test_a_mistyped_key_is_refused_with_the_nearest_name(key, data):
  section, name = key.split(".")
  cut = data.draw(st.integers(0, len(name) - 1))
  typo = name[:cut] + name[cut + 1 :]
  assume(typo and f"{section}.{typo}" not in HINTS)
  text = to_toml(BASE).replace(f"[{section}]\n", f"[{section}]\n{typo} = 1\n")
  with pytest.raises(
    ConfigError, match=rf"unknown key {section}\.{typo} = 1; (did you mean|valid:)"
  ):
    loads(text, env={})


@given(st.text())
def test_any_text_is_a_configuration_or_a_config_error(text):
  with pytest.raises(ConfigError):
    loads(text, env={})


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_required_key_says_where_it_belongs(key):
  section, name = key.split(".")
  before, after = to_toml(BASE).split(f"[{section}]\n")
  line = next(line for line in after.split("\n") if line.startswith(f"{name} = "))
  with pytest.raises(ConfigError, match=rf"{key} is missing; add it under \[{section}\]"):
    loads(before + f"[{section}]\n" + after.replace(line + "\n", "", 1), env={})


def test_extends_is_the_few_lines_that_differ(tmp_path):
  middle = variant(tmp_path, "[optim]\ndense_lr = 1e-4\nexpert_lr = 2e-4\n[moe]\ntop_k = 2")
  last = write(tmp_path, "last.toml", f'extends = "{middle.name}"\n[optim]\nexpert_lr = 3\n')
  assert diff(load(tmp_path / "base.toml", env={}), load(last, env={})) == {
    "moe.top_k": (4, 2),
    "optim.dense_lr": (3e-3, 1e-4),
    "optim.expert_lr": (3e-3, 3.0),
  }


def test_an_error_names_the_file_of_the_chain_that_holds_the_key(tmp_path):
  middle = variant(tmp_path, "[moe]\ntop_k = 99")
  last = write(tmp_path, "last.toml", 'extends = "variant.toml"\n[optim]\ndense_lr = 1')
  with pytest.raises(ConfigError, match=rf"^{middle}: moe.top_k = 99 exceeds num_experts 16"):
    load(last, env={})


@pytest.mark.parametrize(
  ("files", "said"),
  [
    ({"a": 'extends = "a.toml"'}, r"extends itself \(a.toml -> a.toml\)"),
    ({"a": 'extends = "b.toml"', "b": 'extends = "a.toml"'}, r"a.toml -> b.toml -> a.toml"),
    (
      {"a": 'extends = "b.toml"'},
      r"b.toml: the configuration \(extended by .*a.toml\) cannot",
    ),
    ({"a": "extends = 3"}, r"a.toml: extends = 3 is not a path in quotes"),
    ({"a": "model = 3"}, r"model = 3 must be a section \[model\]"),
    ({"a": 'extends = "b.toml"\nmodel = 3', "b": "[model]"}, r"model = 3 must be a section"),
    ({"a": "[model"}, r"a.toml: not valid TOML"),
    ({}, r"a.toml: the configuration cannot be read: .*No such file"),
  ],
)
def test_broken_chains(files, said, tmp_path):
  for name, text in files.items():
    write(tmp_path, f"{name}.toml", text)
  with pytest.raises(ConfigError, match=said):
    load(tmp_path / "a.toml", env={"NMOE_MODEL__DIM": "64"})


def test_a_file_that_is_not_utf8(tmp_path):
  (tmp_path / "a.toml").write_bytes(b"name = '\xff'")
  with pytest.raises(ConfigError, match="a.toml: the configuration cannot be read"):
    load(tmp_path / "a.toml", env={})


def test_a_suite_is_relative_to_the_file_that_names_it(tmp_path):
  child = variant(tmp_path, '[eval]\nsuite = "mine.toml"')
  assert load(child, env={}).eval.suite == str(tmp_path / "mine.toml")
  assert load(variant(tmp_path, '[eval]\nsuite = "short"'), env={}).eval.suite == "short"


def test_a_metric_is_a_measure_or_of_a_suite_of_one_s_own(tmp_path):
  own = '[experiment]\nmetric = "eval/mine/bpb"\n[eval]\nsuite = "mine.toml"'
  assert load(variant(tmp_path, own), env={}).experiment.metric == "eval/mine/bpb"
  for wrong, said in (
    ('metric = "val/bbp"', "'val/bbp' is none of the measures, .*did you mean 'val/bpb'"),
    ('metric = "eval/mine/p_correct"', "is none of the measures, nor eval/NAME/bpb"),
    ('metric = "eval/a/b/bpb"', "is none of the measures"),
    ('metric = "eval/other/bpb"', "is not measured by .eval. suite = .*mine.toml"),
  ):
    with pytest.raises(ConfigError, match=said):
      load(variant(tmp_path, own.replace('metric = "eval/mine/bpb"', wrong)), env={})


def test_a_mixture_is_relative_to_the_file_that_names_it(tmp_path):
  (tmp_path / "deep").mkdir()
  variant(tmp_path, '[data]\nmixture = "own.toml"')
  child = write(tmp_path / "deep", "child.toml", 'extends = "../variant.toml"')
  assert load(child, env={}).data.mixture == str(tmp_path / "own.toml")
  assert load(tmp_path / "base.toml", env={}).data.mixture == str(tmp_path / "mixture.toml")
  absolute = variant(tmp_path, '[data]\nmixture = "/data/m.toml"')
  assert load(absolute, env={}).data.mixture == "/data/m.toml"


def test_overrides_win_and_follow_toml(tmp_path):
  env = {
    "NMOE_OPTIM__DENSE_LR": "1e-4",
    "NMOE_TARGET__DTYPE": '"bf16"',
    "NMOE_PRECISION__LINEARS": '["q", "o"]',
    "NMOE_RDEP__PEER_ACCESS": "false",
    "NMOE_RUN__ROOT": '"${NMOE_ROOT:-/tmp}/runs"',
    "NMOE_ROOT": "/fast",
    "OTHER__KEY": "1",
  }
  config = load(variant(tmp_path, "[optim]\ndense_lr = 5"), env=env)
  base = load(tmp_path / "base.toml", env={})
  assert {key: new for key, (_, new) in diff(base, config).items()} == {
    "optim.dense_lr": 1e-4,
    "target.dtype": "bf16",
    "precision.linears": ("q", "o"),
    "rdep.peer_access": False,
    "run.root": "/fast/runs",
  }


@pytest.mark.parametrize(
  ("name", "value", "said"),
  [
    ("NMOE_TARGET__DTYPE", "bf16", "quote strings: NMOE_TARGET__DTYPE='\"bf16\"'"),
    ("NMOE_MODEL__DIM", "64\nnum_layers = 1", "is more than one TOML value"),
    ("NMOE_MODEL__DIM", "", "is not a TOML value"),
    ("NMOE_MODEL__DIMS", "64", "environment NMOE_MODEL__DIMS: unknown key model.dims = 64"),
    ("NMOE_MODLE__DIM", "64", "unknown section [modle]; did you mean 'model'?"),
    ("NMOE_MODEL__DIM", "6.5", "environment NMOE_MODEL__DIM: model.dim = 6.5 is float"),
    ("NMOE_MOE__TOP_K", "17", "environment NMOE_MOE__TOP_K: moe.top_k = 17 exceeds num_experts 16"),
  ],
)
def test_a_wrong_override_names_the_variable(name, value, said, tmp_path):
  with pytest.raises(ConfigError) as error:
    load(base_file(tmp_path), env={name: value})
  assert said in str(error.value)


@pytest.mark.parametrize(
  ("text", "env", "root"),
  [
    ("${NMOE_ROOT:-/data}", {}, "/data"),
    ("${NMOE_ROOT:-/data}", {"NMOE_ROOT": "/fast"}, "/fast"),
    ("${NMOE_ROOT:-/data}", {"NMOE_ROOT": ""}, "/data"),
    ("${NMOE_A}/${NMOE_B:-b}/c", {"NMOE_A": "a"}, "a/b/c"),
    ("${NMOE_A}", {"NMOE_A": "${NMOE_B}"}, "${NMOE_B}"),
    ("$${NMOE_ROOT}", {}, "${NMOE_ROOT}"),
    ("$5 $x", {}, "$5 $x"),
  ],
)
def test_expansion(text, env, root, tmp_path):
  assert load(variant(tmp_path, f'[run]\nroot = "{text}"'), env=env).run.root == root


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("${HOME}", "${HOME} may not be read; only NMOE_ names expand"),
    ("${NMOE_A}", "NMOE_A is not set and has no default"),
    ("${NMOE_A:b}", "write $${ for the characters themselves"),
    ("${NMOE_A", "write $${ for the characters themselves"),
  ],
)
def test_refused_expansions(text, said, tmp_path):
  with pytest.raises(ConfigError) as error:
    load(variant(tmp_path, f'[run]\nroot = "{text}"'), env={"HOME": "/root"})
  assert said in str(error.value) and "run.root" in str(error.value)


def test_a_default_root_expands_too(tmp_path):
  text = to_toml(BASE).replace('root = ".nmoe"\n', "")
  assert loads(text, env={"NMOE_ROOT": "/fast"}).run.root == "/fast"
  assert loads(text, env={}).run.root == ".nmoe"


@pytest.mark.parametrize(
  ("key", "values", "said"),
  [
    ("moe.num_groups", {"moe.num_groups": 3}, "must divide num_experts 16"),
    ("moe.topk_groups", {"moe.topk_groups": 2}, "exceeds num_groups 1"),
    ("moe.top_k", {"moe.num_groups": 8}, "exceeds the 2 experts that topk_groups 1 leaves"),
    ("launch.ranks", {"launch.ranks": 3}, "num_experts 16; choose one of 1, 2, 4, 8, 16"),
    ("launch.ranks", {"launch.ranks": 12}, "replicate the experts: rdep.group = one of 1, 2, 4"),
    ("rdep.group", {"launch.ranks": 8, "rdep.group": 3}, "num_experts 16: 0 (all), 1, 2, 4, 8"),
    ("rdep.group", {"launch.ranks": 6, "rdep.group": 4}, "must divide ranks 6"),
    (
      "launch.ranks_per_node",
      {"launch.ranks": 2, "launch.ranks_per_node": 1, "rdep.group": 1},
      '2 hosts of 2 ranks, and launch.engine "local" starts ranks on this one alone',
    ),
    ("rdep.group", {"rdep.group": -1}, "must not be negative"),
    ("schedule.batch_tokens", {"schedule.batch_tokens": 4097}, "the nearest are 4096 and 8192"),
    ("schedule.batch_tokens", {"schedule.batch_tokens": 1}, "the nearest are 4096 and 8192"),
    ("schedule.total_tokens", {"schedule.total_tokens": 4095}, "is less than one batch 4096"),
    ("schedule.warmup_tokens", {"schedule.decay_tokens": 1_200_000}, "exceeds total_tokens"),
    ("schedule.final_ratio", {"schedule.final_ratio": 1.5}, "must be in [0, 1]"),
    ("model.num_dense_layers", {"model.num_dense_layers": 5}, "exceeds num_layers 4"),
    ("model.qk_rope_dim", {"model.qk_rope_dim": 15}, "must be even"),
    ("model.dim", {"model.dim": 0}, "must be positive"),
    ("train.seed", {"train.seed": -1}, "must not be negative"),
    ("optim.beta2", {"optim.beta2": 1.0}, "must be in [0, 1)"),
    ("optim.dense_lr", {"optim.dense_lr": float("nan")}, "nan is not a number"),
    ("yarn.factor", {"yarn.factor": 0.5}, "must be at least 1"),
    ("rdep.capacity", {"rdep.capacity": 0.05}, "must be at least 0.1"),
    ("rdep.payload", {"rdep.payload": "mxfp8"}, 'target.dtype is "fp32"; set it to "bf16"'),
    ("rdep.payload", MXFP8 | {"model.dim": 80}, "model.dim is 80; make it a multiple of 32"),
    ("rdep.payload", MXFP8 | {"rdep.peer_access": False}, "is not for rdep.peer_access = false"),
    ("rdep.payload", {"rdep.payload": "nvfp4"}, 'target.dtype is "fp32"; set it to "bf16"'),
    ("rdep.payload", NVFP4 | {"model.dim": 80}, "model.dim is 80; make it a multiple of 32"),
    ("rdep.payload", NVFP4 | {"rdep.peer_access": False}, "is not for rdep.peer_access = false"),
    ("rdep.payload", {"rdep.payload": "nvfp8"}, "nvfp4"),
    ("data.weights_from", {"data.weights_from": ((4096.0,),)}, "rows of tokens and a weight"),
    (
      "data.weights_from",
      {"data.weights": (1.0,), "data.weights_from": ((4096.0, 1.0, 1.0),)},
      "have [1, 2] weights",
    ),
    ("data.weights_from", {"data.weights_from": ((0.0, 1.0),)}, "whole tokens above 0 that rise"),
    ("data.weights_from", {"data.weights_from": ((4096.5, 1.0),)}, "whole tokens above 0"),
    ("data.weights_from", {"data.weights_from": ((9.0, 1.0), (9.0, 2.0))}, "that rise"),
    ("data.weights_from", {"data.weights_from": ((1228800.0, 1.0),)}, "that no step reaches"),
    ("data.weights_from", {"data.weights_from": ((4096.0, -1.0, 2.0),)}, "no negative weights"),
    ("data.weights", {"data.weights": (0.0, 0.0)}, "a finite sum above 0"),
    ("data.fraction", {"data.fraction": 0.0}, "must be in (0, 1]"),
    ("target.dtype", {"target.arch": "sm_90a"}, 'fp32 is for arch = "cpu"'),
    ("target.dtype", {"target.dtype": "fp8"}, "set target.emulate_blockscale = true"),
    ("target.emulate_blockscale", {"target.emulate_blockscale": True}, "nothing to emulate"),
    ("train.cuda_graph", {"train.cuda_graph": True}, 'or target.arch = "sm_100a"'),
    ("train.cuda_graph", GRAPH | {"target.dtype": "fp8"}, 'or target.dtype = "bf16"'),
    ("train.routing_every", GRAPH | {"train.routing_every": 10}, "or train.cuda_graph = false"),
    (
      "moe.expert_dim",
      {"target.dtype": "fp8", "target.emulate_blockscale": True, "moe.expert_dim": 48},
      "must be a multiple of 32 for fp8 blocks",
    ),
    (
      "precision.bf16_first_layers",
      {"precision.bf16_first_layers": 3, "precision.bf16_last_layers": 2},
      "exceeds num_layers 4",
    ),
  ],
)
def test_invariants(key, values, said):
  with pytest.raises(ConfigError) as error:
    configs.changed(BASE, values)
  assert key in str(error.value) and said in str(error.value)


def test_changed_checks_names_and_types():
  with pytest.raises(
    ConfigError, match="unknown key optim.dense = 1; did you mean 'optim.dense_lr'"
  ):
    configs.changed(BASE, {"optim.dense": 1})
  with pytest.raises(ConfigError, match="train.seed = 1.5 is float, must be int"):
    configs.changed(BASE, {"train.seed": 1.5})


def test_every_number_has_a_range_or_none_is_needed():
  """A new numeric field states its range, or is named here as free of one."""
  ranged = {
    f"{section}.{f.name}"
    for section, cls in SECTIONS.items()
    for f in fields(cls)
    if "range" in f.metadata
  }
  free = {"yarn.beta_fast", "yarn.beta_slow", "yarn.mscale_all_dim"}
  numbers = {key for key in HINTS if HINTS[key] in (int, float)}
  assert numbers == ranged | free


@pytest.mark.parametrize("key", sorted(k for k in HINTS if HINTS[k] in (int, float)))
def test_every_default_is_in_its_range(key):
  section, name = key.split(".")
  f = next(f for f in fields(SECTIONS[section]) if f.name == name)
  assert f.default is MISSING or "range" not in f.metadata or f.default in f.metadata["range"]


@pytest.mark.parametrize(
  ("limits", "inside", "outside", "said"),
  [
    ({"gt": 0}, (1e-300, inf), (0, -1), "must be positive"),
    ({"ge": 0}, (0, inf), (-1e-300,), "must not be negative"),
    ({"ge": 0.1}, (0.1,), (0.09,), "must be at least 0.1"),
    ({"gt": 0, "lt": inf}, (1,), (0, inf), "must be positive and finite"),
    ({"ge": 0, "lt": 1}, (0, 0.99), (1, -1), "must be in [0, 1)"),
    ({"gt": 0, "le": 1}, (1,), (0, 1.01), "must be in (0, 1]"),
  ],
)
def test_ranges(limits, inside, outside, said):
  allowed = Range(**limits)
  assert all(v in allowed for v in inside) and not any(v in allowed for v in outside)
  assert str(allowed) == said


def test_sizes_that_follow_from_keys():
  c = configs.changed(BASE, {"launch.ranks": 2, "train.micro_batch": 4, "moe.top_k": 2})
  assert (c.steps, c.sequences, c.rank_tokens, c.rows, c.micro_batches) == (300, 16, 1024, 2048, 2)
