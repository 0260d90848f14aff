"""The mixture's TOML: what is read, and the error for everything that is wrong."""

from math import inf
from pathlib import Path

import pytest

from nmoe.data.mixture import FilesSource, HuggingFaceSource, Mixture, PythonSource, load_mixture
from nmoe.errors import ConfigError

FILES = '[[source]]\nname = "a"\nkind = "files"\npaths = ["a.txt"]\nformat = "text"\n'
HUB = '[[source]]\nname = "h"\nkind = "huggingface"\ndataset = "o/n"\n'
COMMIT = "0123456789" * 4


def write(tmp_path, text):
  path = tmp_path / "mixture.toml"
  path.write_text(text)
  return path


def test_all_kinds(tmp_path):
  text = (
    "[mixture]\nholdout = 0.25\n"
    + FILES
    + "weight = 2\nmax_documents = 5\n"
    + HUB
    + f'revision = "{COMMIT}"\nsplit = "dev"\nconfig = "en"\ntext_field = "body"\nweight = 0.5\n'
    + '[[source]]\nname = "c"\nkind = "python"\npart = "code"\nweight = 1\n'
  )
  assert load_mixture(write(tmp_path, text)) == Mixture(
    holdout=0.25,
    sources=(
      FilesSource(
        name="a", paths=(str(tmp_path / "a.txt"),), format="text", weight=2.0, max_documents=5
      ),
      HuggingFaceSource(
        name="h",
        dataset="o/n",
        revision=COMMIT,
        split="dev",
        config="en",
        text_field="body",
        weight=0.5,
      ),
      PythonSource(name="c", part="code", weight=1.0),
    ),
  )


def test_temperature_may_be_infinite(tmp_path):
  assert load_mixture(write(tmp_path, "[mixture]\ntemperature = inf\n" + FILES)).temperature == inf


def test_the_embedded_mixture():
  path = Path(__file__).parents[2] / "configs/moonlet/stdlib.toml"
  assert [(s.kind, s.part) for s in load_mixture(path).sources] == [
    ("python", "code"),
    ("python", "prose"),
  ]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[mixture\n", "not valid TOML"),
    ("", r"at least one \[\[source\]\]"),
    ('[source]\nname = "a"\n', r"at least one \[\[source\]\]"),
    ("[mixtures]\n" + FILES, "unknown key mixtures = .*did you mean 'mixture'"),
    (
      "[mixture]\ntemprature = 2\n" + FILES,
      "unknown key temprature = 2; did you mean 'temperature'",
    ),
    ("[mixture]\ntemperature = 0\n" + FILES, r"temperature = 0\.0 must be positive"),
    ("[mixture]\ntemperature = nan\n" + FILES, "temperature = nan is not a number"),
    ("[mixture]\nholdout = 1\n" + FILES, r"holdout = 1\.0 must be in \(0, 1\)"),
    ("[mixture]\nholdout = true\n" + FILES, "holdout = True is bool, must be float"),
    (FILES.replace('"files"', '"file"'), "source 1: kind = 'file' must be one of 'files'"),
    (FILES.replace("name", "nam"), "unknown key nam = 'a'; did you mean 'name'"),
    (FILES.replace('format = "text"', ""), "source 1: files: format is missing"),
    (FILES.replace('"text"', '"csv"'), "format = 'csv' must be one of 'text', 'jsonl', 'parquet'"),
    (FILES.replace('["a.txt"]', '"a.txt"'), "paths = 'a.txt' must be a list of strings"),
    (FILES.replace('["a.txt"]', "[]"), r"source 'a': paths = \(\) must name at least one file"),
    (FILES + 'weight = "2"\n', "weight = '2' is str, must be float"),
    (FILES + "weight = -1\n", r"source 1: files: weight = -1\.0 must be positive"),
    (FILES + "weight = inf\n", "weight = inf must be positive and finite"),
    (FILES + "max_documents = -1\n", "max_documents = -1 must not be negative"),
    (FILES.replace('"a"', '"../a"'), "name = '../a' may hold"),
    (FILES + FILES, "two sources are named 'a'"),
    (FILES + "weight = 1\n" + FILES.replace('"a"', '"b"'), "'a' has a weight and 'b' has none"),
    ("[mixture]\ntemperature = 2\n" + FILES + "weight = 1\n", "temperature has no effect"),
    (HUB, "source 1: huggingface: revision is missing"),
    (HUB + 'revision = "main"\n', "revision = 'main' must be the 40 hex digits"),
  ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
  path = write(tmp_path, text)
  with pytest.raises(ConfigError, match=rf"(?s)^{path}: .*{message}"):
    load_mixture(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ConfigError, match=f"{tmp_path}/none.toml: the mixture cannot be read"):
    load_mixture(tmp_path / "none.toml")
