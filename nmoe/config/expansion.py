"""${NMOE_NAME:-default} inside the strings of a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nmoe.errors import ConfigError

_VARIABLE = re.compile(r"\$(\$\{)|\$\{([^}:]*)(?::-([^}]*))?\}|(\$\{)")


def expand_all(value: Any, where: str, env: Mapping[str, str]) -> Any:
  """Expand a string, or the strings of a list."""
  if isinstance(value, list):
    return [expand_all(v, where, env) for v in value]
  return expand(value, where, env) if isinstance(value, str) else value


def expand(value: str, where: str, env: Mapping[str, str]) -> str:
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
