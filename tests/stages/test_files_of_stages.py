"""The files of sweeps, mixes and amendments: what is wrong with one is an error of its name."""

import io
import os

import pytest
from labs import write_files
from rich.console import Console

from nmoe.config import amend as rules
from nmoe.config import file as configs
from nmoe.errors import ConfigError
from stages.prod import amend
from stages.proxy import mix
from stages.proxy.file import load_sweep

pytestmark = pytest.mark.faults
SWEEP = """[sweep]
name = "s"
statement = "They stay."
base = "tiny.toml"
[budget]
runs = 100
[[scale]]
width = 2
"""
MIX = """[mix]
name = "m"
statement = "It is better."
base = "tiny.toml"
objective = [0.5, 0.5]
target_tokens = 100000
[budget]
runs = 70
"""
AMEND = """[[amend]]
at_tokens = 1024
key = "optim.dense_lr"
value = 1e-3
reason = "it is restless"
"""


@pytest.fixture
def base(tmp_path):
  """A configuration that a sweep takes."""
  path = write_files(tmp_path)
  text = path.read_text().replace("total_tokens = 6144", "total_tokens = 61440")
  path.write_text(text.replace("decay_tokens = 2048", "decay_tokens = 20480"))
  return path


def sweep(path):
  return load_sweep(path)


def mixes(path):
  return mix.run(path, Console(file=io.StringIO()))


def amendments(path):
  config, found = configs.load(path.with_name("tiny.toml"), env={}), amend.read(path)
  rules.check(config, [], found, 512, str(path))
  return found


READERS = [(sweep, SWEEP), (mixes, MIX), (amendments, AMEND)]


@pytest.mark.parametrize("read, text", READERS)
def test_a_file_of_a_stage_with_a_byte_order_mark(base, read, text):
  path = base.with_name("a.toml")
  path.write_bytes(b"\xef\xbb\xbf" + text.encode())
  try:
    assert read(path)
  except ConfigError as error:
    assert "has ['text']" in str(error), "a mix of one source"


@pytest.mark.parametrize("read, text", READERS)
def test_a_file_of_a_stage_that_is_no_text(base, read, text):
  path = base.with_name("a.toml")
  path.write_bytes(text.encode() + b"# caf\xe9\n")
  with pytest.raises(ConfigError, match=r"a\.toml: the .* cannot be read: .*0xe9"):
    read(path)
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(ConfigError, match=r"a\.toml: the .* cannot be read: it is no regular file"):
    read(path)


@pytest.mark.parametrize(
  "read, text, old, new, told",
  [
    (sweep, SWEEP, SWEEP, "sweep = 3\n", "sweep = 3 must be a table"),
    (sweep, SWEEP, "[[scale]]\nwidth = 2\n", "", r"at least one \[\[scale\]\]"),
    (sweep, SWEEP, "width = 2", "", r"scale 1: {} must be a table"),
    (sweep, SWEEP, "[sweep]", "scale = [1]\n[sweep]", "not valid TOML"),
    (sweep, SWEEP, "width = 2", "width = inf", "width = inf must be a positive factor"),
    (sweep, SWEEP, "width = 2", "width = 1" + "0" * 400, "must be a positive factor"),
    (sweep, SWEEP, "base =", "points = 1000000000\nbase =", "sweep.points = 1000000000"),
    (sweep, SWEEP, "base =", "seeds = 1000000000\nbase =", "sweep.seeds = 1000000000"),
    (sweep, SWEEP, "base =", "step = inf\nbase =", "sweep.step = inf"),
    (sweep, SWEEP, "base =", "router_step = 0.5\nbase =", "router_step = 0.5 must exceed 1"),
    (sweep, SWEEP, "base =", 'vary = ["joint", "joint"]\nbase =', "sweep.vary .* twice"),
    (sweep, SWEEP, "They stay.", " ", "sweep.statement = ' ' must say something"),
    (sweep, SWEEP, "[budget]", "[verdict]\nmax_shift = inf\n[budget]", "max_shift = inf"),
    (sweep, SWEEP, "[budget]", "[coords]\nwidths = [0]\n[budget]", "coords.widths"),
    (sweep, SWEEP, "[budget]", "[coords]\nlr = 1e39\n[budget]", "coords.lr = 1e.39"),
    (sweep, SWEEP, "[budget]", "[coords]\nexperts = 1\n[budget]", "coords.experts = 1 of which"),
    (sweep, SWEEP, "base =", 'target = "a\\u0000"\nbase =', "cannot be read: embedded null byte"),
    (mixes, MIX, MIX, "mix = 3\n", "mix = 3 must be a table"),
    (mixes, MIX, "[budget]", "[verdict]\nx = 1\n[budget]", r"unknown section \[verdict\]"),
    (mixes, MIX, "[0.5, 0.5]", "[inf, 1]", "must have a weight of 0 or more, and finite"),
    (mixes, MIX, '"m"', '""', "mix.name = '' must say something"),
    (mixes, MIX, "[0.5, 0.5]", "[0.5, 0.5]\nepochs = 1e308", "mix.epochs = 1e.308"),
    (amendments, AMEND, AMEND, "amend = [1]\n", "amend 1: has 1; it must have"),
    (amendments, AMEND, AMEND, "amend = []\n", "it must hold tables"),
    (amendments, AMEND, "1e-3", "2024-01-01", "value = 2024-01-01 is of no key's type"),
    (amendments, AMEND, "it is restless", "  ", "reason = '  ' must be"),
    (amendments, AMEND, "1024", "61440", "the run ends at 61440 tokens"),
    (amendments, AMEND, "1024", "9" * 30, "the run ends at 61440 tokens"),
    (amendments, AMEND, "optim.dense_lr", "data.weights", "value = 0.001 must be a list"),
  ],
)
def test_what_a_file_of_a_stage_cannot_say(base, read, text, old, new, told):
  path = base.with_name("a.toml")
  path.write_text(text.replace(old, new, 1))
  with pytest.raises(ConfigError, match=told):
    read(path)
