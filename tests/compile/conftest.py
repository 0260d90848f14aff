from pathlib import Path
from typing import NamedTuple

import pytest
import table


class Compiled(NamedTuple):
  rows: list[dict[str, str]]
  cache: Path


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Compiled:
  """All kernels: what each costs, and the cache that now has them."""
  cache = tmp_path_factory.mktemp("kernels")
  return Compiled(table.compiled(cache), cache)
