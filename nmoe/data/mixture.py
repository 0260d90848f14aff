"""Mixtures: the TOML file that says which text a run reads, parsed into frozen dataclasses.

[mixture]
temperature = 1.0       # p_i = n_i^(1/temperature) / sum_j n_j^(1/temperature), n_i tokens
holdout = 0.01          # fraction of documents kept for validation, by a hash of their content

[[source]]
name = "books"
kind = "files"          # or "huggingface", or "python"
paths = ["books/*.jsonl"]   # relative to this file
format = "jsonl"        # or "parquet", or "text" (one document per file)
text_field = "text"
weight = 2.0            # all sources have one, or none has (then the temperature rules)
max_documents = 1000    # 0: all

[[source]]
name = "web"
kind = "huggingface"
dataset = "owner/name"
config = "default"
revision = "<40 hex digits of a commit>"
split = "train"

[[source]]
name = "prose"
kind = "python"
part = "prose"          # or "code"
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import tomli

from nmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FilesSource:
  """Local files; `paths` are globs, absolute once loaded."""

  kind: ClassVar[str] = "files"
  name: str
  paths: tuple[str, ...]
  format: Literal["text", "jsonl", "parquet"]
  text_field: str = "text"
  weight: float | None = None
  max_documents: int = 0


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource:
  """A dataset of the Hub at one commit, streamed."""

  kind: ClassVar[str] = "huggingface"
  name: str
  dataset: str
  revision: str
  split: str = "train"
  config: str | None = None
  text_field: str = "text"
  weight: float | None = None
  max_documents: int = 0


@dataclass(frozen=True, kw_only=True)
class PythonSource:
  """Sources of the running Python: its .py files, or their comments and docstrings.

  tree "stdlib" is the standard library, "packages" what is installed beside it.
  """

  kind: ClassVar[str] = "python"
  name: str
  part: Literal["code", "prose"]
  tree: Literal["stdlib", "packages"] = "stdlib"
  weight: float | None = None
  max_documents: int = 0


Source = FilesSource | HuggingFaceSource | PythonSource
KINDS: dict[str, type] = {cls.kind: cls for cls in get_args(Source)}


@dataclass(frozen=True, kw_only=True)
class Mixture:
  sources: tuple[Source, ...]
  temperature: float = 1.0
  holdout: float = 0.01


def load_mixture(path: str | Path) -> Mixture:
  """Parse a mixture's TOML. Raises ConfigError naming the file, the key and the value."""
  path = Path(path).resolve()
  try:
    table = tomli.loads(path.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path}: the mixture cannot be read: {error}") from error
  except tomli.TOMLDecodeError as error:
    raise ConfigError(f"{path}: not valid TOML: {error}") from error
  _known(f"{path}", table, ("mixture", "source"))
  head, entries = table.get("mixture", {}), table.get("source", [])
  if not isinstance(head, dict) or not isinstance(entries, list) or not entries:
    raise ConfigError(f"{path}: needs one [mixture] at most and at least one [[source]]")
  sources = tuple(_source(f"{path}: source {i + 1}", e, path.parent) for i, e in enumerate(entries))
  head = _values(f"{path}: [mixture]", head, Mixture, without=("sources",))
  mixture = Mixture(sources=sources, **head)
  _validate(path, mixture, "temperature" in head)
  return mixture


def _source(where: str, entry: Any, folder: Path) -> Source:
  if not isinstance(entry, dict):
    raise ConfigError(f"{where} must be a table [[source]]")
  entry = dict(entry)
  kind = entry.pop("kind", None)
  if kind not in KINDS:
    raise ConfigError(f"{where}: kind = {kind!r} must be one of {', '.join(map(repr, KINDS))}")
  values = _values(f"{where}: {kind}", entry, KINDS[kind])
  if kind == FilesSource.kind:
    values["paths"] = tuple(str(folder / p) for p in values["paths"])
  return KINDS[kind](**values)


def _values(
  where: str, table: Mapping[str, Any], cls: type, without: Iterable[str] = ()
) -> dict[str, Any]:
  """The table's values as the dataclass's types; unknown and missing keys are errors."""
  hints = get_type_hints(cls)
  leaves = {f.name: f for f in fields(cls) if f.name not in without}
  _known(where, table, leaves)
  missing = [n for n, f in leaves.items() if f.default is MISSING and n not in table]
  if missing:
    raise ConfigError(f"{where}: {missing[0]} is missing; add it")
  return {key: _convert(f"{where}: {key}", value, hints[key]) for key, value in table.items()}


def _convert(where: str, value: Any, hint: Any) -> Any:
  """A TOML value as the field's type, or ConfigError; ints widen to float."""
  if get_origin(hint) is Literal:
    if value not in get_args(hint):
      raise ConfigError(
        f"{where} = {value!r} must be one of {', '.join(map(repr, get_args(hint)))}"
      )
    return value
  if get_origin(hint) is tuple:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
      raise ConfigError(f"{where} = {value!r} must be a list of strings, with at least one")
    return tuple(value)
  kinds = [t for t in (get_args(hint) or (hint,)) if t is not type(None)]
  if float in kinds and type(value) is int:
    value = float(value)
  if type(value) not in kinds:
    raise ConfigError(f"{where} = {value!r} is {type(value).__name__}, must be {kinds[0].__name__}")
  return value


def _known(where: str, table: Mapping[str, Any], valid: Iterable[str]) -> None:
  valid = list(valid)
  for key in table:
    if key not in valid:
      close = difflib.get_close_matches(key, valid, n=1)
      hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
      raise ConfigError(f"{where}: unknown key {key} = {table[key]!r}; {hint}")


def _validate(path: Path, mixture: Mixture, has_temperature: bool) -> None:
  for source in mixture.sources:
    for key, broken, need in _source_invariants(source):
      if broken:
        raise ConfigError(
          f"{path}: source {source.name!r}: {key} = {getattr(source, key)!r} {need}"
        )
  names = [s.name for s in mixture.sources]
  weighted = [s.name for s in mixture.sources if s.weight is not None]
  doubled = sorted({n for n in names if names.count(n) > 1})
  if doubled:
    raise ConfigError(f"{path}: two sources are named {doubled[0]!r}; each needs a name of its own")
  if weighted and len(weighted) < len(names):
    bare = next(n for n in names if n not in weighted)
    raise ConfigError(
      f"{path}: source {weighted[0]!r} has a weight and {bare!r} has none; give one to all or none"
    )
  if weighted and has_temperature:
    raise ConfigError(f"{path}: mixture.temperature has no effect on weighted sources; remove one")
  if not mixture.temperature > 0:
    raise ConfigError(f"{path}: mixture.temperature = {mixture.temperature!r} must be positive")
  if not 0 < mixture.holdout < 1:
    raise ConfigError(f"{path}: mixture.holdout = {mixture.holdout!r} must be between 0 and 1")


def _source_invariants(source: Source):
  """(key, broken?, what is required)."""
  simple = re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", source.name)
  yield "name", not simple, "may hold lower-case letters, digits, '.', '_' and '-' only"
  weight = source.weight
  yield (
    "weight",
    weight is not None and not 0 < weight < float("inf"),
    "must be positive and finite",
  )
  yield "max_documents", source.max_documents < 0, "must not be negative (0: all)"
  if isinstance(source, HuggingFaceSource):
    commit = re.fullmatch(r"[0-9a-f]{40}", source.revision)
    yield (
      "revision",
      not commit,
      (
        "must be the 40 hex digits of a commit, so that the text cannot change; "
        f"see https://huggingface.co/datasets/{source.dataset}/commits/main"
      ),
    )
