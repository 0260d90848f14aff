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
documents = "files"     # of text: or "paragraphs", apart by blank lines
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
tree = "stdlib"         # or "packages": what is installed beside it
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from nmoe.errors import ConfigError
from nmoe.files import resolved
from nmoe.tables import nearest, parsed, ranged, read, typed


@dataclass(frozen=True, kw_only=True)
class FilesSource:
  """Local files; `paths` are globs, or a file's very name, absolute once loaded."""

  kind: ClassVar[str] = "files"
  name: str
  paths: tuple[str, ...]
  format: Literal["text", "jsonl", "parquet"]
  text_field: str = "text"
  documents: Literal["files", "paragraphs"] = "files"
  weight: float | None = ranged(None, gt=0, lt=inf)
  max_documents: int = ranged(0, ge=0)


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
  weight: float | None = ranged(None, gt=0, lt=inf)
  max_documents: int = ranged(0, ge=0)


@dataclass(frozen=True, kw_only=True)
class PythonSource:
  """Sources of the running Python: its .py files, or their comments and docstrings.

  tree "stdlib" is the standard library, "packages" what is installed beside it.
  """

  kind: ClassVar[str] = "python"
  name: str
  part: Literal["code", "prose"]
  tree: Literal["stdlib", "packages"] = "stdlib"
  weight: float | None = ranged(None, gt=0, lt=inf)
  max_documents: int = ranged(0, ge=0)


Source = FilesSource | HuggingFaceSource | PythonSource
KINDS: dict[str, type] = {cls.kind: cls for cls in get_args(Source)}


@dataclass(frozen=True, kw_only=True)
class Sampling:
  """The keys of [mixture]."""

  temperature: float = ranged(1.0, gt=0)
  holdout: float = ranged(0.01, gt=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class Mixture(Sampling):
  sources: tuple[Source, ...]


@dataclass(frozen=True)
class Phase:
  """From which training token on a mixture holds, and its weights by source; None: its own."""

  tokens: int
  weights: Mapping[str, float] | None = None


def phases(
  names: Sequence[str], weights: Sequence[float], later: Sequence[Sequence[float]]
) -> tuple[Phase, ...]:
  """data.weights and data.weights_from by source. ConfigError if a row has too few or many."""
  rows = [(0.0, *weights), *later]
  for key, row in zip(("weights", *["weights_from"] * len(later)), rows, strict=True):
    if len(row) > 1 and len(row) - 1 != len(names):
      raise ConfigError(
        f"data.{key} has {len(row) - 1} weights, the mixture {len(names)} sources: {list(names)}; "
        "give one each, in that order"
      )
  own = (dict(zip(names, row[1:], strict=True)) if len(row) > 1 else None for row in rows)
  return tuple(Phase(int(row[0]), w) for row, w in zip(rows, own, strict=True))


def load_mixture(path: str | Path) -> Mixture:
  """Parse a mixture's TOML. Raises ConfigError naming the file, the key and the value."""
  path = resolved(path)
  table = parsed(read(path, "mixture"), str(path))
  for key in table.keys() - {"mixture", "source"}:
    near = nearest(key, ("mixture", "source"))
    raise ConfigError(f"{path}: unknown key {key} = {table[key]!r}{near}")
  head, entries = table.get("mixture", {}), table.get("source", [])
  if not isinstance(head, dict) or not isinstance(entries, list) or not entries:
    raise ConfigError(f"{path}: needs one [mixture] at most and at least one [[source]]")
  sources = tuple(_source(f"{path}: source {i + 1}", e, path.parent) for i, e in enumerate(entries))
  mixture = Mixture(sources=sources, **vars(typed(head, Sampling, f"{path}: [mixture]")))
  _validate(path, mixture, "temperature" in head)
  return mixture


def _source(where: str, entry: Any, folder: Path) -> Source:
  if not isinstance(entry, dict):
    raise ConfigError(f"{where} must be a table [[source]]")
  entry = dict(entry)
  kind = entry.pop("kind", None)
  if kind not in KINDS:
    raise ConfigError(f"{where}: kind = {kind!r} must be one of {', '.join(map(repr, KINDS))}")
  source = typed(entry, KINDS[kind], f"{where}: {kind}")
  if isinstance(source, FilesSource):
    return replace(source, paths=tuple(_anchored(p, folder, where) for p in source.paths))
  return source


def _anchored(pattern: str, folder: Path, where: str) -> str:
  """A path from the mixture's folder, whose name is no pattern; a leading ~ is a home folder."""
  try:
    path = Path(pattern).expanduser()
  except RuntimeError as error:
    raise ConfigError(f"{where}: paths: {pattern!r}: {error}; write the folder's path") from error
  if path.is_absolute() or (folder / path).is_file():
    return str(folder / path)
  return str(Path(escape(str(folder)), path))


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


def _source_invariants(source: Source):
  """(key, broken?, what is required)."""
  simple = re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", source.name)
  yield "name", not simple, "may hold lower-case letters, digits, '.', '_' and '-' only"
  if isinstance(source, FilesSource):
    yield "paths", not source.paths, "must name at least one file"
    cut = source.documents != "files" and source.format != "text"
    yield "documents", cut, f'is for format = "text"; the documents of {source.format} are rows'
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
