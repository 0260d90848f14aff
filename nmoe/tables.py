"""TOML tables as frozen dataclasses: one converter, whose messages name file, key and value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import inf
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli

from nmoe.errors import ConfigError


@dataclass(frozen=True)
class Range:
  """The numbers that a field may hold; `str` says what is required."""

  gt: float | None = None
  ge: float | None = None
  lt: float | None = None
  le: float | None = None

  def __contains__(self, value: float) -> bool:
    compared = ((gt, self.gt), (ge, self.ge), (lt, self.lt), (le, self.le))
    return all(limit is None or holds(value, limit) for holds, limit in compared)

  def __str__(self) -> str:
    if self in _IN_WORDS:
      return _IN_WORDS[self]
    if self.lt is None and self.le is None:
      return f"must be at least {self.ge}" if self.gt is None else f"must exceed {self.gt}"
    lower = f"[{self.ge}" if self.gt is None else f"({self.gt}"
    return f"must be in {lower}, " + (f"{self.le}]" if self.lt is None else f"{self.lt})")


_IN_WORDS = {
  Range(gt=0): "must be positive",
  Range(ge=0): "must not be negative",
  Range(gt=0, lt=inf): "must be positive and finite",
}


def ranged(default: Any = MISSING, metadata: Mapping[str, Any] | None = None, **limits: Any) -> Any:
  """A field of a dataclass whose number is limited by gt, ge, lt, le (as in `Range`)."""
  kept = dict(metadata or {})
  if limits:
    kept["range"] = Range(**limits)
  return field(default=default, metadata=kept)


def read(path: Path, what: str) -> str:
  """The text of a TOML file of UTF-8, with or without a byte order mark. Raises ConfigError naming
  the path and `what` it is: it is missing, no regular file, no UTF-8.
  """
  try:
    if path.exists() and not path.is_file():
      raise ConfigError(f"{path}: the {what} cannot be read: it is no regular file")
    return path.read_text(encoding="utf-8-sig")
  except (OSError, ValueError) as error:
    raise ConfigError(f"{path}: the {what} cannot be read: {error}") from error


def parsed(text: str, name: str) -> dict[str, Any]:
  """The table of a TOML text. Raises ConfigError naming `name`, a file."""
  try:
    return tomli.loads(text)
  except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits too
    raise ConfigError(f"{name}: not valid TOML: {error}") from error


def typed(
  table: Mapping[str, Any],
  cls: type,
  where: str,
  section: str = "",
  origins: Mapping[str, str] | None = None,
) -> Any:
  """`cls`, a dataclass, from the values of a table.

  Unknown and missing keys, wrong types and numbers out of a field's range are ConfigErrors, which
  name the key as `section.key` after `origins[section.key]`, the file it came from, else `where`.
  """
  if not isinstance(table, Mapping):
    raise ConfigError(f"{where}: {section or 'it'} = {table!r} must be a table of keys")
  prefix, hints = f"{section}." if section else "", get_type_hints(cls)
  known = {f.name: f for f in fields(cls)}
  values = {}
  for key, value in table.items():
    origin, name = (origins or {}).get(prefix + key, where), prefix + key
    if key not in known:
      raise ConfigError(f"{origin}: unknown key {name} = {value!r}{nearest(key, known)}")
    values[key] = _converted(value, hints[key], f"{origin}: {name}")
    limits = known[key].metadata.get("range")
    if limits is not None and values[key] is not None and values[key] not in limits:
      raise ConfigError(f"{origin}: {name} = {values[key]!r} {limits}")
  missing = [k for k, f in known.items() if _required(f) and k not in values]
  if missing:
    under = f" under [{section}]" if section else ""
    raise ConfigError(f"{where}: {prefix}{missing[0]} is missing; add it{under}")
  return cls(**values)


def _required(f: Any) -> bool:
  return f.default is MISSING and f.default_factory is MISSING


def _converted(value: Any, hint: Any, where: str) -> Any:
  """A TOML value as the field's type, or ConfigError. ints widen to float, nothing else does."""
  if get_origin(hint) is Literal:
    choices = get_args(hint)
    if value not in choices or isinstance(value, bool):
      near = nearest(str(value), [str(c) for c in choices])
      raise ConfigError(f"{where} = {value!r} must be one of {', '.join(map(repr, choices))}{near}")
    return value
  if get_origin(hint) is tuple:
    item = get_args(hint)[0]
    if not isinstance(value, (list, tuple)):
      raise ConfigError(f"{where} = {value!r} must be a list{' of strings' * (item is str)}")
    return tuple(_converted(v, item, f"{where}[{i}]") for i, v in enumerate(value))
  kinds = [t for t in (get_args(hint) or (hint,)) if t is not type(None)]
  if kinds == [float] and type(value) is int:
    value = _widened(value, where)
  if type(value) not in kinds:
    raise ConfigError(f"{where} = {value!r} is {type(value).__name__}, must be {kinds[0].__name__}")
  if value != value:
    raise ConfigError(f"{where} = nan is not a number that a run can use")
  return value


def _widened(value: int, where: str) -> float:
  try:
    return float(value)
  except OverflowError as error:
    raise ConfigError(
      f"{where} has {len(str(abs(value)))} digits: no float can hold it; write a smaller number"
    ) from error


def nearest(name: str, valid: Iterable[str]) -> str:
  """The end of a message about an unknown name: the most similar valid one, else all of them."""
  valid = list(valid)
  close = difflib.get_close_matches(name, valid, n=1)
  return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"
