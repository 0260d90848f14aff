"""The configuration's file: TOML parsed once into nmoe.config.sections.Config.

A file holds sections of keys (two levels, nothing deeper). `extends = "base.toml"` (relative to the
file) makes it the few lines that differ. Environment overrides `NMOE_<SECTION>__<KEY>=value` come
last; their values follow TOML's rules (strings in quotes). `${NMOE_NAME:-default}` expands inside
strings, for names that start with NMOE_ only. Paths are relative to the file that names them, and a
leading ~ is a home folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import tomli

from nmoe.config.rules import validate
from nmoe.config.sections import SECTIONS, Config, leaves
from nmoe.errors import ConfigError
from nmoe.files import resolved
from nmoe.tables import nearest, parsed, read, typed

MAX_CHAIN = 100  # files that extend one another
PATHS = (("data", "mixture"), ("data", "tokenizer"), ("eval", "suite"))
HOME_PATHS = ("run.root", *map(".".join, PATHS))  # where a leading ~ is a home folder
HF = "hf:"  # of data.tokenizer: what follows is a path
_VARIABLE = re.compile(r"\$(\$\{)|\$\{([^}:]*)(?::-([^}]*))?\}|(\$\{)")


def load(path: str | Path, env: Mapping[str, str] | None = None) -> Config:
  """Parse a TOML file with its `extends` chain, then the environment's overrides, and validate.

  Raises ConfigError naming the file, the key, the value and the nearest valid name.
  """
  env = os.environ if env is None else env
  values, origins = _read(Path(path), ())
  for (section, key), value in overrides(env).items():
    if isinstance(values.setdefault(section, {}), dict):
      values[section][key] = value
    origins[f"{section}.{key}"] = f"environment NMOE_{section.upper()}__{key.upper()}"
  return _build(values, origins, str(path), env)


def loads(text: str, name: str = "<string>", env: Mapping[str, str] | None = None) -> Config:
  """Like `load`, from a string without `extends` or overrides (the resolved TOML of a record)."""
  table = parsed(text, name)
  return _build(table, _origins(table, name), name, os.environ if env is None else env)


def overrides(env: Mapping[str, str]) -> dict[tuple[str, str], Any]:
  """The NMOE_<SECTION>__<KEY> entries of the environment: (section, key) -> TOML value."""
  values = {}
  near = {f"NMOE_{s}_{f.name}".upper(): (s, f.name) for s in SECTIONS for f in fields(SECTIONS[s])}
  for name in sorted(env):
    if name in near:
      section, key = near[name]
      raise ConfigError(
        f"environment {name}: {section}.{key} is overridden by NMOE_{section.upper()}__"
        f"{key.upper()}, with two lines between section and key; rename or unset it"
      )
    if not name.startswith("NMOE_") or "__" not in name:
      continue
    section, _, key = name[len("NMOE_") :].lower().partition("__")
    if not section or not key:
      raise ConfigError(f"environment {name}: overrides are named NMOE_<SECTION>__<KEY>; unset it")
    try:
      table = tomli.loads(f"value = {env[name]}")
    except (ValueError, RecursionError) as error:
      raise ConfigError(
        f"environment {name}={env[name]!r} is not a TOML value ({error}); "
        f"quote strings: {name}='\"{env[name]}\"'"
      ) from error
    if table.keys() != {"value"}:
      raise ConfigError(f"environment {name}={env[name]!r} is more than one TOML value; set one")
    values[section, key] = table["value"]
  return values


def changed(config: Config, values: Mapping[str, Any]) -> Config:
  """A copy with dotted keys replaced, e.g. changed(config, {"train.seed": 1}).

  Checked like a file's, but strings are taken as they are. Raises ConfigError.
  """
  known = leaves(config)
  for key, value in values.items():
    if key not in known:
      raise ConfigError(f"unknown key {key} = {value!r}{nearest(key, known)}")
  tables: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
  for key, value in (known | dict(values)).items():
    section, name = key.split(".")
    tables[section][name] = value
  return _checked(tables, {}, "config")


def to_toml(config: Config) -> str:
  """The resolved configuration: every key, no `extends`; `loads` reads it back."""
  lines = []
  for section in fields(config):
    lines.append(f"[{section.name}]")
    part = getattr(config, section.name)
    lines += [f"{leaf.name} = {toml_value(getattr(part, leaf.name))}" for leaf in fields(part)]
    lines.append("")
  return "\n".join(lines)


def toml_value(value: Any) -> str:
  """A value in TOML as `loads` reads it back: nothing in it is taken for a variable."""
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, str):
    return quoted(value).replace("${", "$${")
  if isinstance(value, (tuple, list)):
    return "[" + ", ".join(toml_value(v) for v in value) + "]"
  return repr(value)


def quoted(text: str) -> str:
  """A string in TOML, whatever its characters."""
  return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _origins(table: Mapping[str, Any], name: str) -> dict[str, str]:
  return {
    f"{section}.{key}": name
    for section, part in table.items()
    if isinstance(part, dict)
    for key in part
  }


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
  """The merged table of a file and what it extends, and the file that each key came from."""
  by = f" (extended by {chain[-1]})" if chain else ""
  what = f"configuration{by}"
  if len(chain) > MAX_CHAIN:
    raise ConfigError(f"{path}: extends more than {MAX_CHAIN} files in a row{by}; merge some")
  try:
    path = resolved(path)
  except (OSError, ValueError) as error:
    raise ConfigError(f"{str(path)!r}: the {what} cannot be read: {error}") from error
  if not path.name.isprintable() or os.fsencode(path.name).decode(errors="replace") != path.name:
    raise ConfigError(f"{str(path)!r}: the {what} cannot be read: rename it, in printable UTF-8")
  if path in chain:
    names = " -> ".join(p.name for p in (*chain, path))
    raise ConfigError(f"{path}: extends itself ({names}); break the circle")
  table = parsed(read(path, what), str(path))
  parent = table.pop("extends", None)
  table.pop("evidence", None)  # of a sweep's transfer.toml: for people and a launch, not for a run
  for section, key in PATHS:
    part = table.get(section, {})
    if isinstance(part, dict) and isinstance(part.get(key), str):
      part[key] = _anchor(part[key], key, path)
  if parent is None:
    return table, _origins(table, str(path))
  if not isinstance(parent, str):
    raise ConfigError(f"{path}: extends = {parent!r} is not a path in quotes")
  merged, origins = _read(path.parent / Path(os.path.expanduser(parent)), (*chain, path))
  for section, part in table.items():
    known = isinstance(part, dict) and isinstance(merged.get(section, {}), dict)
    merged[section] = {**merged.get(section, {}), **part} if known else part
  return merged, {**origins, **_origins(table, str(path))}


def _anchor(value: str, key: str, path: Path) -> str:
  """A relative path is relative to the file that names it."""
  kind = HF if key == "tokenizer" else ""
  place = value.removeprefix(kind)
  named = not value.startswith(kind) or (key == "suite" and not value.endswith(".toml"))
  if named or not place or place.startswith(("/", "$", "~")):
    return value
  return f"{kind}{path.parent / place}"


def _build(
  values: Mapping[str, Any], origins: Mapping[str, str], name: str, env: Mapping[str, str]
) -> Config:
  for section, table in values.items():
    if section not in SECTIONS:
      where = next((o for key, o in origins.items() if key.startswith(f"{section}.")), name)
      raise ConfigError(f"{where}: unknown section [{section}]{nearest(section, SECTIONS)}")
    if not isinstance(table, dict):
      raise ConfigError(f"{name}: {section} = {table!r} must be a section [{section}]")
  tables = {}
  for section, cls in SECTIONS.items():
    texts = {f.name: f.default for f in fields(cls) if isinstance(f.default, str)}
    tables[section] = {
      key: _expanded(value, f"{origins.get(f'{section}.{key}', name)}: {section}.{key}", env)
      for key, value in (texts | values.get(section, {})).items()
    }
  return _checked(tables, origins, name)


def _checked(
  tables: Mapping[str, Mapping[str, Any]], origins: Mapping[str, str], name: str
) -> Config:
  """The configuration of these sections, or ConfigError."""
  parts = {s: typed(tables[s], cls, name, s, origins) for s, cls in SECTIONS.items()}
  config = Config(**parts)
  validate(config, origins, name)
  return config


def _expanded(value: Any, where: str, env: Mapping[str, str]) -> Any:
  """Expand a string, or the strings of a list; in a path a leading ~ too."""
  if isinstance(value, list):
    return [_expanded(v, where, env) for v in value]
  if not isinstance(value, str):
    return value
  expanded = _expand(value, where, env)
  if not where.endswith(HOME_PATHS) or not expanded.removeprefix(HF).startswith("~"):
    return expanded
  try:
    kind = HF if expanded.startswith(HF) else ""
    return f"{kind}{Path(expanded.removeprefix(HF)).expanduser()}"
  except RuntimeError as error:
    raise ConfigError(f"{where} = {value!r}: {error}; write the folder's path") from error


def _expand(value: str, where: str, env: Mapping[str, str]) -> str:
  """${NMOE_NAME:-default} from the environment; `$${` is a literal `${`.

  As in a shell, the default also stands in for an empty value.
  """

  def one(match: re.Match[str]) -> str:
    if match[1]:
      return match[1]
    if match[4]:
      raise ConfigError(
        f"{where} = {value!r}: a ${{ that is not ${{NMOE_NAME}} or ${{NMOE_NAME:-default}}; "
        "write $${ for the characters themselves"
      )
    name, default = match[2], match[3]
    if default is not None and "${" in default:
      raise ConfigError(f"{where} = {value!r}: the default of {name} holds a ${{; write a value")
    if not name.startswith("NMOE_"):
      raise ConfigError(
        f"{where} = {value!r}: ${{{name}}} may not be read; only NMOE_ names expand"
      )
    if env.get(name):
      return env[name]
    if default is None:
      raise ConfigError(
        f"{where} = {value!r}: {name} is not set and has no default; write ${{{name}:-default}}"
      )
    return default

  return _VARIABLE.sub(one, value)
