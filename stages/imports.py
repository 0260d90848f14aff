"""`nmoe import`: a HuggingFace folder as a configuration and as weights that a run begins from."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.data import tokenizer
from nmoe.errors import ConfigError, DataError
from nmoe.files import alone, clear_unfinished
from nmoe.model.imports import PARTIAL, import_folder
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.checkpoints import check_new, importable
from stages.text import plain


def run(folder: Path, out: Path, root: Path, console: Console) -> None:
  """Store the weights in the root, write the configuration and say what was left out."""
  importable(folder, out)
  for parent, name in ((Root(root).imports, PARTIAL), (out.parent, out.name)):
    for left in clear_unfinished(parent, name):
      console.print(plain(f"removed {left}: a killed import had left it"), soft_wrap=True)
  try:
    with alone(out) as partial:
      check_new(out)
      with console.status(plain(f"reading {folder}")):
        found = import_folder(folder, Root(root))
      config = configs.changed(found.config, {"run.root": str(root.absolute())})  # the weights' own
      (partial / out.name).write_text(configs.to_toml(config), encoding="utf-8")
      check_new(out)
      (partial / out.name).rename(out)
  except OSError as error:
    raise ConfigError(f"{out} was not written ({error}); name another file") from error

  def say(line: str) -> None:
    console.print(plain(line), soft_wrap=True)

  if found.unknown:
    say(f"keys of config.json that were not understood: {', '.join(found.unknown)}")
  if found.left:
    say(f"not of our model: {counted(len(found.left), 'tensor')}, the first is {found.left[0]}")
  if found.wide:
    say(
      f"{counted(len(found.wide), 'tensor')} of other types than bf16, the first is "
      f"{found.wide[0]}: all are stored in fp32, so that none is rounded; to train in bf16 set "
      'target.dtype = "bf16"'
    )
  if (why := _unfit(found.config)) is not None:
    say(f"its tokenizer.json is not for training: {why}")
  if found.config.data.tokenizer == "byte" and found.config.model.vocab_size != 257:
    say(
      "no tokenizer.json: for evaluation and inspection only; to train on, set data.tokenizer = "
      '"hf:PATH"'
    )
  say(f"weights: {Root(root).imported(found.digest)}")
  say(f"{out}: set [data] mixture, [optim] and [schedule], then train it")


def _unfit(config: Config) -> str | None:
  """Why the tokenizer that came along cannot be trained with, if so."""
  name, rows = config.data.tokenizer, config.model.vocab_size
  if not name.startswith("hf:"):
    return None
  try:
    ids = tokenizer.get(name).vocab_size
  except DataError as error:
    return str(error)
  if ids <= rows:
    return None
  return f"it has {ids} ids, the model {rows} rows; take those beyond out of its added_tokens"
